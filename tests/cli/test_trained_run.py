"""What can be done with a run by the name of its output directory alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ForkServer

from finetuning.cli import chat, evaluate, generate, merge_adapter, serve
from finetuning.inference.generate import generate_batches

SYSTEM = "You are a helpful assistant."
QUESTION, ANSWER = "What is two plus two?", "Two plus two is four."


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path, write_jsonl: Any, run_cli: Any) -> Path:
    """A run that has trained an adapter to give one answer to one question, with a system prompt."""
    folder = tmp_path_factory.mktemp("run")
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]
    rows = write_jsonl(folder / "rows.jsonl", [{"messages": messages}] * 4)
    values = {
        "data_conf": {
            "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(rows)}]},
            "validation_data": {"type": "NONE"},
            "chat_template_name": "chat-ml",
        },
        "training_args": {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "learning_rate": 0.01,
            "max_steps": 40,
            "save_strategy": "no",
        },
        "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 4},
        "peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}},
        "run_conf": {"model": str(chatml_llama_dir)},
        "sft_args": {"max_seq_length": 128, "train_on_completions_only": True},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    done = run_cli(["sft", folder / "config.yaml"])
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder / "out"


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """A function that talks to a model, a line of input for each argument, and returns both outputs."""

    def run(folder: Path, *lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert chat.main([str(folder), "--temperature", "0", "--max-new-tokens", "16", *options]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def answer_of(run_dir: Path, messages: list[dict[str, str]], *, with_adapter: bool = True) -> str:
    """The greedy answer of transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "checkpoint-final")
    base = json.loads((run_dir / "checkpoint-final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if with_adapter:
        model = PeftModel.from_pretrained(model, run_dir / "checkpoint-final")
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(
        **inputs, max_new_tokens=16, do_sample=False, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def turns(*texts: str, system: str | None = SYSTEM) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    begin = [] if system is None else [{"role": "system", "content": system}]
    return begin + [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def test_a_conversation_remembers_what_was_said(run_dir: Path, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    prompts: list[list[int]] = []

    def record(generator: Any, encoded: Any, *args: Any, **kwargs: Any) -> Any:
        prompts.append(list(encoded[0].ids))
        return generate_batches(generator, encoded, *args, **kwargs)

    monkeypatch.setattr("finetuning.inference.chat.generate_batches", record)
    out, err = say(run_dir, QUESTION, "And four?", "/reset", "And four?")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "checkpoint-final")
    conversations = [turns(QUESTION), turns(QUESTION, ANSWER, "And four?"), turns("And four?")]
    expected = [tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"] for said in conversations]
    assert prompts == expected
    assert out == f"{ANSWER}\n{answer_of(run_dir, conversations[1])}\n{answer_of(run_dir, conversations[2])}\n"
    assert "checkpoint-final" in err and f"system prompt: {SYSTEM}" in err


def test_the_adapter_can_be_switched_off_to_compare(run_dir: Path, say: Any) -> None:
    out, err = say(run_dir, QUESTION, "/adapter off", "/again", "/adapter on", "/again")
    base = answer_of(run_dir, turns(QUESTION), with_adapter=False)
    assert base != ANSWER
    # Printed as it is: an answer of random weights may have line breaks.
    assert out == f"{ANSWER}\n{base}\n{ANSWER}\n"
    assert "adapter: off: the base model answers" in err


def test_the_system_prompt_can_be_changed(run_dir: Path, say: Any) -> None:
    out, err = say(run_dir, "/system none", QUESTION, "/system Be brief.", "/reset", QUESTION)
    expected = [answer_of(run_dir, turns(QUESTION, system=system)) for system in (None, "Be brief.")]
    assert out == "".join(f"{answer}\n" for answer in expected)
    assert "system prompt: Be brief." in err
    out, err = say(run_dir, "/system", options=("--system", ""))
    assert (out, "system prompt: none" in err) == ("", True)


def test_an_error_in_a_conversation_does_not_end_it(run_dir: Path, say: Any) -> None:
    out, err = say(run_dir, "/agains", "/adapter maybe", "/again", QUESTION, "/exit", QUESTION)
    assert out == f"{ANSWER}\n"
    assert 'error: there is no command /agains. Did you mean "/again"?' in err
    assert "error: /adapter takes on or off" in err
    assert "error: there is no question to answer again" in err


def test_what_does_not_fit_is_left_out_oldest_first(run_dir: Path, say: Any) -> None:
    long = "The quick brown fox jumps over the lazy dog and runs into the forest. " * 12
    out, err = say(run_dir, long, long, QUESTION, options=("--max-new-tokens", "300"))
    assert "its first 2 questions were left out" in err
    assert out.endswith(f"{ANSWER}\n")


def test_a_base_without_an_adapter_says_so(chatml_llama_dir: Path, say: Any) -> None:
    _, err = say(chatml_llama_dir, "/adapter off")
    assert "error: the model has no adapter" in err


def test_a_model_without_a_chat_template_is_not_talked_to(
    tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat.main([str(tiny_llama_dir)]) == 1
    assert "has no chat template" in capsys.readouterr().err


def test_generate_answers_the_first_training_prompt(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate.main([str(run_dir), "--max_new_tokens", "16"]) == 0
    out = capsys.readouterr().out
    prompt, answer, expected = out.split("# ")[1:]
    assert prompt.startswith("prompt: ") and f"system\n{SYSTEM}<|im_end|>" in prompt and QUESTION in prompt
    assert answer == f"answer\n{ANSWER}\n\n"
    assert expected.startswith(f"answer in the training data\n{ANSWER}<|im_end|>")
    assert list(tmp_path.iterdir()) == [], "nothing was to be written"
    stdout = (run_dir.parent / "stdout").read_text()
    assert f"  # answer the first training prompt\n  generate {run_dir}\n" in stdout
    assert f"  # talk to it\n  finetuning chat {run_dir}\n" in stdout


def test_generate_uses_the_chat_template_and_the_system_prompt_of_training(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate.main([str(run_dir), "answers.jsonl", "--text", QUESTION, "--max_new_tokens", "16"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{ANSWER}\n"
    assert f'with the system prompt "{SYSTEM}"' in captured.err
    (record,) = (json.loads(line) for line in Path("answers.jsonl").read_text().splitlines())
    assert record["answer"] == ANSWER and record["prompt"].startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>")
    assert generate.main([str(run_dir), "--raw", "--text", QUESTION]) == 0
    assert capsys.readouterr().out != f"{ANSWER}\n"


def test_an_earlier_answer_file_is_not_lost_without_a_word(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert generate.main(["--model", str(run_dir), "--text", QUESTION]) == 0
    first, second = (
        json.loads(Path(name).read_text()) for name in ("inference_result.json", "inference_result-2.json")
    )
    assert first == second and first[0]["input"].startswith("<|im_start|>system")
    capsys.readouterr()
    assert generate.main(["--model", str(run_dir), "--text", QUESTION, "--out_file", "inference_result.json"]) == 0
    assert "1 answer in inference_result.json, in place of an earlier file" in capsys.readouterr().err


def test_a_run_is_merged_by_its_name(
    run_dir: Path, chatml_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    assert merge_adapter.main([str(run_dir), str(tmp_path / "merged"), "--no-verify"]) == 0
    arguments = [str(chatml_llama_dir), str(run_dir / "checkpoint-final"), str(tmp_path / "expected")]
    assert merge_adapter.main([*arguments, "--no-verify"]) == 0
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert merged.keys() == expected.keys() and all(merged[name].equal(expected[name]) for name in merged)
    capsys.readouterr()
    assert merge_adapter.main([str(tmp_path / "merged"), str(tmp_path / "again")]) == 1
    assert "there is nothing to merge" in capsys.readouterr().err


@pytest.fixture
def held_out(tmp_path: Path, write_jsonl: Any) -> Path:
    """Rows of which the adapter answers one correctly, and the base model none."""
    rows = [{"messages": turns(QUESTION, ANSWER)}, {"messages": turns(QUESTION, "Five.")}]
    return write_jsonl(tmp_path / "held-out.jsonl", rows)


def test_evaluate_compares_with_the_base_model(
    run_dir: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge_adapter.main([str(run_dir), str(tmp_path / "merged"), "--no-verify"]) == 0
    capsys.readouterr()
    arguments = [str(run_dir), str(tmp_path / "merged"), "--data", str(held_out), "--max-new-tokens", "16"]
    assert evaluate.main(arguments) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["held-out.jsonl", "exact", "base", "0.0%"],
        ["held-out.jsonl", "exact", "adapter", "50.0%"],
        ["held-out.jsonl", "exact", "merged", "50.0%"],
    ]
    assert lines[4].startswith("held-out.jsonl, exact: adapter - base = +50.0 points")
    evaluation = json.loads((run_dir / "evaluations" / "held-out-exact.json").read_text())
    assert evaluation["models"]["adapter"] == str(run_dir / "checkpoint-final")
    answers = [json.loads(line) for line in (run_dir / "evaluations/held-out-exact.adapter.jsonl").open()]
    assert [answer["answer"] for answer in answers] == [ANSWER, ANSWER]
    prompts = {
        (run_dir / f"evaluations/held-out-exact.{label}.jsonl").read_text().count(f"system\\n{SYSTEM}<|im_end|>")
        for label in ("base", "adapter", "merged")
    }
    assert len(prompts) == 1, "the models were not shown the same prompts"
    report = (run_dir / "report.html").read_text()
    assert "<h2>Evaluation</h2>" in report and "+50.0 points" in report


def test_evaluate_says_what_is_wrong_before_a_model_is_loaded(
    run_dir: Path, held_out: Path, tmp_path: Path, write_jsonl: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    unanswered = write_jsonl(tmp_path / "unanswered.jsonl", [{"prompt": "a", "answer": "b"}])
    for arguments, message in [
        ([], "error: --data: nothing says which rows to evaluate on"),
        (["--data", str(unanswered)], "nothing to score: no row has correct_answers"),
        (["--data", str(held_out), "--score", "json"], "is not JSON"),
        (["--data", str(held_out), "--columns", "answer"], "error: --columns answer: is not FROM=TO"),
        (["--data", str(held_out), "--tasks", "orders"], "error: --data cannot be combined with --tasks"),
        (["--tasks", "orders", "--lm-eval", "/none/lm_eval"], "error: /none/lm_eval is not installed"),
    ]:
        assert evaluate.main([str(run_dir), *arguments]) == 1
        assert message in capsys.readouterr().err
    renamed = ["--data", str(unanswered), "--columns", "answer=correct_answers", "--no-base", "--max-new-tokens", "2"]
    assert evaluate.main([str(run_dir), *renamed, "--output", str(tmp_path / "results")]) == 0
    assert (tmp_path / "results" / "unanswered-exact.json").is_file()


FAKE_VLLM = """#!/bin/sh
trap 'exit 9' TERM
echo "$@"
touch "$READY"
[ "$WAITS" ] && while :; do sleep 0.05; done
exit 7
"""


@pytest.fixture
def fake_vllm(tmp_path: Path) -> Path:
    """A program in place of vLLM that prints its arguments."""
    program = tmp_path / "vllm"
    program.write_text(FAKE_VLLM)
    program.chmod(0o755)
    return program


def test_serve_runs_the_command_of_serving_json(run_dir: Path, tmp_path: Path, run_cli: Any, fake_vllm: Path) -> None:
    from finetuning.export.vllm.convert import make_vllm_compatible

    done = run_cli(
        ["serve", run_dir, "--vllm", fake_vllm, "--", "--port", "81"], env={"READY": str(tmp_path / "ready")}
    )
    assert done.returncode == 7, "the exit code is not the server's"
    copy = shutil.copytree(run_dir / "checkpoint-final", tmp_path / "copy" / "checkpoint-final")
    command = make_vllm_compatible(copy).command.replace(str(copy), str(run_dir / "checkpoint-final"))
    assert done.stdout == f"{command.removeprefix('vllm ')} --port 81\n"
    assert not (run_dir / "checkpoint-final" / "serving.json").exists()


def test_serve_passes_signals_to_the_server(
    run_dir: Path, tmp_path: Path, fork_server: ForkServer, fake_vllm: Path
) -> None:
    environ = {"READY": str(tmp_path / "ready"), "WAITS": "1"}
    process = fork_server.start(["serve", run_dir, "--vllm", fake_vllm], environ)
    assert process.wait_for(lambda: (tmp_path / "ready").exists()), process.output
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 9


def test_without_vllm_the_command_is_printed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", os.defpath)
    assert serve.main([str(run_dir)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("vllm serve ") and f"={run_dir / 'checkpoint-final'}" in captured.out
    assert "vllm is not installed here, so nothing was started" in captured.err
    assert serve.main([str(run_dir), "--dry-run"]) == 0
    assert capsys.readouterr().out == captured.out


def test_an_adapter_that_vllm_does_not_take_is_served_merged(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(run_dir / "checkpoint-final", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_fingerprint.json").unlink(missing_ok=True)
    assert serve.main([str(adapter), "--dry-run"]) == 1
    assert "merge_adapter" in capsys.readouterr().err
    (tmp_path / "adapter-merged").mkdir()
    (tmp_path / "adapter-merged" / "config.json").write_text("{}")
    assert serve.main([str(adapter), "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"vllm serve {tmp_path / 'adapter-merged'}\n"
    assert "Served merged" in captured.err
