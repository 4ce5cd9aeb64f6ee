"""A real vLLM serves what the engine made, and answers like transformers: prompt, tokens and where it stops.

Run by `make test-serving`, which builds an environment for vLLM. The variable VLLM names its program; without it these
tests are skipped.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from conftest import CHATML_TEMPLATE, _train_tokenizer
from serving.vllm_server import CPU_FLAGS, ENVIRONMENT, Answer, ask, run, serve

from finetuning.export.vllm.checks import MAX_LORA_RANKS
from finetuning.model.peft.lora_support import (
    INITS,
    INPUT_EMBEDDINGS,
    OPTIONS,
    VLLM_VERSION,
    WITH_EMBEDDINGS,
    WITHOUT_EMBEDDINGS,
    WITHOUT_LORA,
    servable_embeddings,
)

VLLM = os.environ.get("VLLM", "")
needs_vllm = pytest.mark.skipif(not VLLM, reason="VLLM names no vLLM program; see make test-serving")

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
QUESTIONS = (QUESTION, "What is two plus two?", "Name three colors, please.")
BASE_EOS, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
MAX_TOKENS = 32
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """What is trained and how it is served."""

    label: str
    lora: dict[str, Any] | None
    """Arguments of LoRA; None for full fine-tuning."""
    served: Literal["adapter", "merged", "model"]
    checkpoint: str = "checkpoint-final"
    has_new_tokens: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


STEPS = 40
CASES = (
    Case("LoRA on all linear layers", {}, "adapter"),
    Case("LoRA, an intermediate checkpoint", {}, "adapter", f"checkpoint-{STEPS - 1}"),
    Case(
        "rank-stabilized LoRA with ranks and factors per module",
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 5}},
        "adapter",
    ),
    Case("PiSSA, converted", {"init_lora_weights": "pissa"}, "adapter"),
    Case(
        "LoRA on embeddings and output head",
        {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
        "adapter",
    ),
    Case("DoRA, merged", {"use_dora": True}, "merged"),
    Case("new tokens, merged", {}, "merged", has_new_tokens=True, changes={"training_args.max_steps": 120}),
    Case("full fine-tuning", None, "model"),
    Case("full fine-tuning, an intermediate checkpoint", None, "model", f"checkpoint-{STEPS - 1}"),
)


@pytest.fixture(scope="module")
def base_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Base models with heads of 32, which vLLM supports, and the end token <|endoftext|>; without the tokens of ChatML
    under True."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folders = {}
    for lacks_tokens in (False, True):
        special = [BASE_EOS] if lacks_tokens else [BASE_EOS, "<|im_start|>", END_OF_TURN]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_train_tokenizer(special), eos_token=BASE_EOS, pad_token=BASE_EOS, model_max_length=256
        )
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = LlamaForCausalLM(config)
        model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
        folders[lacks_tokens] = tmp_path_factory.mktemp("bases") / "base"
        model.save_pretrained(folders[lacks_tokens])
        tokenizer.save_pretrained(folders[lacks_tokens])
    return folders


@pytest.fixture
def train_case(
    sft_values: Any, write_config: Any, write_jsonl: Any, run_cli: Any, base_dirs: dict[bool, Path], tmp_path: Path
) -> Callable[[Case], tuple[Path, Path | None]]:
    """A function that trains a case, and returns its checkpoint, and the base model of an adapter."""

    def run(case: Case) -> tuple[Path, Path | None]:
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        rows = write_jsonl(tmp_path / "row.jsonl", [{"messages": messages}] * 4)
        kwargs = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, **(case.lora or {})}
        peft = {"peft_type": "NO_PEFT"} if case.lora is None else {"peft_type": "LORA", "peft_kwargs": kwargs}
        base = base_dirs[case.has_new_tokens]
        changes = {
            "run_conf.model": str(base),
            "data_conf.training_data.datasets": [{"path": str(rows)}],
            "peft_conf": peft,
            "training_args.max_steps": STEPS,
            "training_args.save_strategy": "steps",
            "training_args.save_steps": STEPS - 1,
            **case.changes,
        }
        done = run_cli(["sft", write_config(sft_values(changes))])
        assert done.returncode == 0, done.stderr
        output = tmp_path / "out"
        extended = output / "checkpoint-new-basemodel"
        adapter_base = extended if extended.is_dir() else base
        return output / case.checkpoint, None if case.lora is None else adapter_base

    return run


def expected_answers(folder: Path, base: Path | None) -> list[Answer]:
    """The answers of transformers and PEFT with the files of the checkpoint as the engine saved them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML_TEMPLATE or "im_start" in tokenizer.chat_template
    model: Any = AutoModelForCausalLM.from_pretrained(base or folder, dtype=torch.float32)
    if base is not None:
        model = PeftModel.from_pretrained(model, folder)
        model.generation_config = GenerationConfig.from_pretrained(folder)
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    answers = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        prompt = inputs["input_ids"][0].tolist()
        ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        has_stopped = ids[-1] in ends
        answers.append(Answer(prompt, ids[:-1] if has_stopped else ids, has_stopped))
    memorized = tokenizer.decode(answers[0].ids)
    assert (memorized, answers[0].has_stopped) == (ANSWER, True), "the model has not learned its row"
    return answers


@needs_vllm
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_vllm_answers_like_transformers(
    case: Case, train_case: Callable[[Case], tuple[Path, Path | None]], run_cli: Any, tmp_path: Path
) -> None:
    checkpoint, base = train_case(case)
    expected = expected_answers(checkpoint, base)
    if case.served == "adapter":
        target = tmp_path / "served"
        done = run_cli([checkpoint, "--output", target], program="create_vllm_compatible_adapter")
        assert done.returncode == 0, done.stderr
        serving = json.loads((target / "serving.json").read_text())
        command, name = shlex.split(serving["command"]), serving["adapter"]["name"]
    else:
        target = checkpoint
        if case.served == "merged":
            assert base is not None
            target = tmp_path / "merged"
            done = run_cli([base, checkpoint, target], program="merge_adapter")
            assert done.returncode == 0, done.stderr
        command, name = ["vllm", "serve", str(target)], str(target)
    with serve(VLLM, command, tmp_path / "vllm.log") as address:
        answers = [ask(address, name, [{"role": "user", "content": question}], MAX_TOKENS) for question in QUESTIONS]
    assert answers == expected


@dataclass(frozen=True)
class Started:
    """A run that `finetuning serve` is given, and how it ends the server."""

    label: str
    case: Case
    is_merged: bool = False
    """Whether the adapter was merged into the folder next to it, as the run's summary proposes."""
    interrupt: Literal["SIGINT", "SIGTERM"] = "SIGTERM"


STARTED = (
    Started("an adapter", CASES[0], interrupt="SIGINT"),
    Started("PiSSA, converted at the start", CASES[3]),
    Started("DoRA, merged next to the adapter", CASES[5], is_merged=True, interrupt="SIGINT"),
    Started("a full fine-tuning", CASES[7]),
)


@needs_vllm
@pytest.mark.parametrize("started", STARTED, ids=lambda started: started.label)
def test_finetuning_serve_starts_vllm_and_leaves_no_process(
    started: Started, train_case: Callable[[Case], tuple[Path, Path | None]], run_cli: Any, tmp_path: Path
) -> None:
    checkpoint, base = train_case(started.case)
    expected = expected_answers(checkpoint, base)
    if started.is_merged:
        assert base is not None
        done = run_cli([base, checkpoint, f"{checkpoint}-merged"], program="merge_adapter")
        assert done.returncode == 0, done.stderr
    program, log = Path(sys.executable).with_name("finetuning"), tmp_path / "serve.log"
    with run([str(program), "serve", str(checkpoint.parent), "--vllm", VLLM, "--"], log) as server:
        with urllib.request.urlopen(f"{server.address}/v1/models", timeout=30) as response:
            *_, name = [model["id"] for model in json.load(response)["data"]]
        answers = [
            ask(server.address, name, [{"role": "user", "content": question}], MAX_TOKENS) for question in QUESTIONS
        ]
        assert len(server.processes()) > 1
        if started.interrupt == "SIGINT":
            # Ctrl-C reaches every process that belongs to the terminal.
            os.killpg(server.process.pid, signal.SIGINT)
        else:
            server.process.terminate()
        code = server.process.wait(60)
        deadline = time.monotonic() + 10
        while server.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not server.processes(), log.read_text()[-2000:]
    assert answers == expected
    assert code in (0, 130, 143, -signal.SIGINT, -signal.SIGTERM), log.read_text()[-2000:]


@needs_vllm
@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=lambda case: case.label)
def test_generate_answers_with_vllm_as_with_transformers(
    case: Case,
    train_case: Callable[[Case], tuple[Path, Path | None]],
    run_cli: Any,
    write_jsonl: Any,
    tmp_path: Path,
) -> None:
    checkpoint, base = train_case(case)
    rows = [{"messages": [{"role": "user", "content": f"{question}{' Please.' * more}"}]}
            for question in QUESTIONS for more in range(4)]  # fmt: skip
    values = {
        "prompt_conf": {"type": "eval-data", "data": {"path": str(write_jsonl(tmp_path / "questions.jsonl", rows))}},
        "model_conf": {"model": str(base or checkpoint), "adapter": str(checkpoint) if base else None},
        "hf_gen_params": {"max_new_tokens": MAX_TOKENS},
        "vllm_conf": {"program": VLLM, "flags": [*CPU_FLAGS[2:]]},
    }
    config = tmp_path / "generate.yaml"
    config.write_text(yaml.safe_dump(values))
    records = {}
    for backend in ("transformers", "vllm"):
        output = tmp_path / f"{backend}.jsonl"
        done = run_cli(
            [config, output, f"backend={backend}"], program="generate", env={"PYTHONPATH": None, **ENVIRONMENT}
        )
        assert done.returncode == 0, done.stderr
        records[backend] = [json.loads(line) for line in output.read_text().splitlines()]
    assert records["vllm"] == records["transformers"]
    assert records["vllm"][0]["answer"] == ANSWER


@needs_vllm
def test_the_table_agrees_with_vllm() -> None:
    program = (
        "import json, sys, typing, vllm\n"
        "from vllm.config.lora import LoRAConfig, MaxLoRARanks\n"
        "from vllm.lora.peft_helper import PEFTHelper\n"
        "def accepts(config):\n"
        "    config = {'r': 8, 'lora_alpha': 8, 'target_modules': ['q_proj']} | config\n"
        "    try:\n"
        "        PEFTHelper.from_dict(config).validate_legal(LoRAConfig(max_lora_rank=64))\n"
        "    except ValueError:\n"
        "        return False\n"
        "    return True\n"
        "configs = json.loads(sys.argv[1])\n"
        "values = [accepts(config) for config in configs], typing.get_args(MaxLoRARanks), vllm.__version__\n"
        "print('\\n' + json.dumps(values))\n"
    )
    inits: list[Any] = [{"true": True, "false": False}.get(init.name, init.name) for init in INITS]
    values: dict[str, Any] = {
        "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 2}, "use_dora": True,
        "lora_bias": True, "bias": "all", "modules_to_save": ["lm_head"], "alora_invocation_tokens": [1],
        "layer_replication": [[0, 2]], "use_bdlora": {"nblocks": 2}, "use_qalora": True,
    }  # fmt: skip
    configs = [*({"init_lora_weights": init} for init in inits), *({name: value} for name, value in values.items())]
    python = Path(VLLM).with_name("python")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", program, json.dumps(configs)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    accepted, ranks, version = json.loads(done.stdout.strip().splitlines()[-1])
    assert version.startswith(f"{VLLM_VERSION}.") and tuple(ranks) == MAX_LORA_RANKS
    # vLLM serves LoRA-GA as if the base had not been changed.
    expected = [not init.changes_base or init.name == "lora_ga" for init in INITS]
    by_field = {option.field: option.vllm == "yes" for option in OPTIONS}
    assert accepted == [*expected, *(by_field[name] for name in values)]


@needs_vllm
def test_the_embeddings_of_each_architecture_agree_with_vllm() -> None:
    """The table of architectures is what vLLM's classes declare."""
    program = (
        "import json, sys\n"
        "from vllm.model_executor.models.interfaces import supports_lora\n"
        "from vllm.model_executor.models.registry import ModelRegistry\n"
        "from vllm.model_executor.models.transformers import TransformersForCausalLM\n"
        "declared = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    model = ModelRegistry._try_load_model_cls(name)\n"
        "    if model is None:\n"
        "        declared[name] = 'not importable'\n"
        "    else:\n"
        "        declared[name] = sorted(model.embedding_modules) if supports_lora(model) else None\n"
        "declared['Transformers'] = sorted(TransformersForCausalLM.embedding_modules)\n"
        "print('\\n' + json.dumps(declared))\n"
    )
    declared_here = sorted(WITH_EMBEDDINGS | WITHOUT_EMBEDDINGS | WITHOUT_LORA | {"Cohere", "Cohere2"})
    names = [name if name.endswith("Model") else f"{name}ForCausalLM" for name in declared_here]
    python = Path(VLLM).with_name("python")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", program, json.dumps(names)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    declared = json.loads(done.stdout.strip().splitlines()[-1])
    assert declared.pop("Transformers") == list(INPUT_EMBEDDINGS)
    # Their module imports torchvision, of which there is no build for this torch.
    assert {name for name, served in declared.items() if served == "not importable"} <= {
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
    }
    names = [name for name in names if declared[name] != "not importable"]
    declared = {name: declared[name] for name in names}
    here = {name: servable_embeddings(name) for name in names}
    assert declared == {name: None if served is None else sorted(served) for name, served in here.items()}


def test_the_documentation_lists_what_is_served() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "vllm.md").read_text(encoding="utf-8")
    served = {"adapter": "as an adapter", "merged": "merged", "model": "as it is"}
    for case in CASES:
        assert f"| {case.label} | {served[case.served]} |" in page
    for started in STARTED:
        ended_by = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM"}[started.interrupt]
        assert f"| {started.label} | {ended_by} |" in page
