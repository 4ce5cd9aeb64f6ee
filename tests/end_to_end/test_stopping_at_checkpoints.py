"""Every checkpoint of a run stops where it was trained to stop, with every tool, also where the base model does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.atomic_io import find_manifest_mismatch, write_manifest
from finetuning.config.sections.data import ChatTemplateName
from finetuning.data.chat.template import get_template
from finetuning.export.vllm.convert import make_vllm_compatible
from finetuning.model.older_checkpoint import _token_after_answer, find_stop_token_repair
from finetuning.training.resume.config_changes import RUN_CONFIG_NAME

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}}
STEPS = 30
BASE_EOS, END_OF_TURN = "<|endoftext|>", "<|im_end|>"


@pytest.fixture(scope="session")
def endoftext_llama_dir(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path) -> Path:
    """`chatml_llama_dir` as a base model: its end token is <|endoftext|>, and it has no chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chatml_llama_dir)
    tokenizer.eos_token, tokenizer.chat_template = BASE_EOS, None
    model = AutoModelForCausalLM.from_pretrained(chatml_llama_dir)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    directory = tmp_path_factory.mktemp("models") / "endoftext-llama"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def train_until_memorized(
    train: Any, sft_values: Any, write_jsonl: Any, endoftext_llama_dir: Path, tmp_path: Path
) -> Callable[[Any], Path]:
    """A function that trains on one row, and returns the folder of a checkpoint before the last step."""

    def run(peft: Any) -> Path:
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        rows = write_jsonl(tmp_path / "row.jsonl", [{"messages": messages}] * 4)
        changes = {
            "run_conf.model": str(endoftext_llama_dir),
            "data_conf.training_data.datasets": [{"path": str(rows)}],
            "peft_conf": peft,
            "training_args.max_steps": STEPS + 1,
            "training_args.save_strategy": "steps",
            "training_args.save_steps": STEPS,
        }
        return train(sft_values(changes)).output_dir / f"checkpoint-{STEPS}"

    return run


def make_older(checkpoint: Path, folder: Path, base: Path) -> Path:
    """A copy of a checkpoint with the stop tokens that earlier versions saved in it: the base model's."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": BASE_EOS}))
    (folder / "generation_config.json").unlink()
    if (folder / "config.json").is_file():
        for name in ("generation_config.json", "config.json"):
            ids = {key: json.loads((base / name).read_text())[key] for key in ("eos_token_id", "pad_token_id")}
            content = json.loads((checkpoint / name).read_text()) | ids
            (folder / name).write_text(json.dumps(content))
    return folder


def answer_of(folder: Path, base: Path | None = None) -> str:
    """The answer of plain transformers and PEFT with nothing but a folder's own files, special tokens included."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base or folder)
    if base is not None:
        model = PeftModel.from_pretrained(model, folder)
        # PEFT keeps the base model's.
        model.generation_config = GenerationConfig.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def ids_of(folder: Path) -> set[Any]:
    """Every end token that the files of a folder name."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = [folder / name for name in ("generation_config.json", "config.json") if (folder / name).is_file()]
    values = [json.loads(file.read_text())["eos_token_id"] for file in files]
    return {tokenizer.eos_token_id, *(value[0] if isinstance(value, list) else value for value in values)}


@pytest.mark.parametrize("peft", [{"peft_type": "NO_PEFT"}, LORA], ids=["full", "lora"])
def test_a_checkpoint_stops_in_plain_transformers(
    train_until_memorized: Any, endoftext_llama_dir: Path, peft: Any
) -> None:
    checkpoint = train_until_memorized(peft)
    final = checkpoint.with_name("checkpoint-final")
    for folder in (checkpoint, final):
        assert answer_of(folder, endoftext_llama_dir if peft is LORA else None) == ANSWER + END_OF_TURN
    assert ids_of(checkpoint) == ids_of(final) == {2}
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (checkpoint / name).read_bytes() == (final / name).read_bytes(), name
    if peft is LORA:
        assert (checkpoint / "base_fingerprint.json").read_bytes() == (final / "base_fingerprint.json").read_bytes()


@pytest.mark.parametrize("is_older", [False, True], ids=["new", "older"])
def test_a_checkpoint_stops_merged_converted_and_generated_from(
    train_until_memorized: Any, endoftext_llama_dir: Path, run_cli: Any, tmp_path: Path, is_older: bool
) -> None:
    checkpoint = train_until_memorized(LORA)
    if is_older:
        checkpoint = make_older(checkpoint, tmp_path / "older", endoftext_llama_dir)
    repaired = f"note: {checkpoint} was saved by an earlier version"

    merged = tmp_path / "merged"
    done = run_cli([endoftext_llama_dir, checkpoint, merged], program="merge_adapter")
    assert done.returncode == 0, done.stderr
    assert (repaired in done.stdout + done.stderr) == is_older
    assert answer_of(merged) == ANSWER + END_OF_TURN and ids_of(merged) == {2}

    served = tmp_path / "served"
    done = run_cli([checkpoint, "--output", served], program="create_vllm_compatible_adapter")
    assert done.returncode == 0, done.stderr
    assert (repaired in done.stderr) == is_older
    assert answer_of(served, endoftext_llama_dir) == ANSWER + END_OF_TURN and ids_of(served) == {2}
    command = json.loads((served / "serving.json").read_text())["command"]
    assert f"--generation-config {served}" in command and f"--tokenizer {served}" in command

    chat = tmp_path / "prompt.txt"
    chat.write_text(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    answers = tmp_path / "answers.json"
    flags = ["--model", checkpoint, "--text", chat.read_text(), "--max_new_tokens", "40", "--out_file", answers]
    done = run_cli(flags, program="generate")
    assert done.returncode == 0, done.stderr
    assert (repaired in done.stderr) == is_older
    (record,) = json.loads(answers.read_text())
    assert record["output"].endswith(ANSWER + END_OF_TURN)


def test_an_older_full_checkpoint_is_generated_from_with_its_own_stop_tokens(
    train_until_memorized: Any, endoftext_llama_dir: Path, run_cli: Any, tmp_path: Path
) -> None:
    older = make_older(train_until_memorized({"peft_type": "NO_PEFT"}), tmp_path / "older", endoftext_llama_dir)
    assert answer_of(older) != ANSWER + END_OF_TURN
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    answers = tmp_path / "answers.json"
    flags = ["--model", older, "--text", prompt, "--max_new_tokens", "40", "--out_file", answers]
    done = run_cli(flags, program="generate")
    assert done.returncode == 0 and "was saved by an earlier version" in done.stderr
    assert json.loads(answers.read_text())[0]["output"].endswith(ANSWER + END_OF_TURN)


def test_an_older_checkpoint_converted_in_place_stays_a_valid_checkpoint(
    train_until_memorized: Any, endoftext_llama_dir: Path, tmp_path: Path
) -> None:
    older = make_older(train_until_memorized(LORA), tmp_path / "older", endoftext_llama_dir)
    write_manifest(older)
    result = make_vllm_compatible(older)
    assert not result.changed and "was saved by an earlier version" in result.notes[-1]
    assert f"--generation-config {older}" in result.command and f"--tokenizer {older}" in result.command
    assert answer_of(older, endoftext_llama_dir) == ANSWER + END_OF_TURN
    assert find_manifest_mismatch(older) is None
    assert make_vllm_compatible(older).notes == ()


@pytest.mark.parametrize("name", [name for name in ChatTemplateName if get_template(name)])
def test_the_repair_detects_the_end_of_turn_that_a_run_trains(name: ChatTemplateName, tiny_tokenizer: Any) -> None:
    template = get_template(name)
    assert template is not None
    tiny_tokenizer.add_special_tokens({"extra_special_tokens": list(template.special_tokens)})
    tiny_tokenizer.chat_template = template.source
    assert _token_after_answer(tiny_tokenizer) == (template.end_of_turn or tiny_tokenizer.eos_token)


def test_only_checkpoints_of_this_engine_are_repaired(
    train_until_memorized: Any, endoftext_llama_dir: Path, tmp_path: Path
) -> None:
    checkpoint = train_until_memorized(LORA)
    assert find_stop_token_repair(checkpoint) is None
    older = make_older(checkpoint, tmp_path / "older", endoftext_llama_dir)
    assert find_stop_token_repair(older) is not None
    (older / RUN_CONFIG_NAME).rename(older / "contract.json")
    assert find_stop_token_repair(older) is not None
    (older / "contract.json").unlink()
    assert find_stop_token_repair(older) is None
