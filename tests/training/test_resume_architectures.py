"""A checkpoint is loaded as it was saved, for models whose tensors transformers renames or fuses on loading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import sample
from zoo.test_methods import LETTERS, rows_of

from finetuning.algorithms import ALGORITHMS
from finetuning.atomic_io import MANIFEST
from finetuning.errors import CheckpointError, FinetuningError

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
SPECIFIC: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"moe_intermediate_size": 32, "head_dim": 8},
    "deepseek_v3": {
        "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_next": {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
PLAIN = {"llama": {}}
SAVED = {
    "training_args.max_steps": 4,
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 2,
    "training_args.learning_rate": 0.003,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path) -> Callable[[str], Path]:
    """A function that makes a model of two layers of an architecture, with the tokenizer of `chatml_llama_dir`."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        if model_type in made:
            return made[model_type]
        tokenizer = AutoTokenizer.from_pretrained(chatml_llama_dir)
        settings = {
            "vocab_size": -(-len(tokenizer) // 8) * 8,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        }
        config = AutoConfig.for_model(model_type, **(SMALL | EXPERTS | settings | (SPECIFIC | PLAIN)[model_type]))
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(config)
        folder = tmp_path_factory.mktemp("architectures") / model_type
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return made.setdefault(model_type, folder)

    return make


@pytest.mark.parametrize("model_type", SPECIFIC)
def test_full_fine_tuning_resumes_from_the_trained_weights(
    train: Any, sft_values: Any, read_tensors: Any, tiny_model: Callable[[str], Path], model_type: str
) -> None:
    values = {**SAVED, "run_conf.model": str(tiny_model(model_type))}
    uninterrupted = train(sft_values(values))
    resumed_values = sft_values({**values, "run_conf.resume_from_checkpoint": "auto"})
    resumed_values["training_args"]["output_dir"] += "-resumed"
    folder = Path(resumed_values["training_args"]["output_dir"])
    folder.mkdir()
    shutil.move(uninterrupted.output_dir / "checkpoint-2", folder / "checkpoint-2")

    resumed = train(resumed_values)

    assert resumed.losses == uninterrupted.losses
    expected, tensors = read_tensors(uninterrupted.final), read_tensors(resumed.final)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_next"])
def test_the_best_model_is_the_one_of_its_checkpoint(
    train: Any, sft_values: Any, read_tensors: Any, tiny_model: Callable[[str], Path], model_type: str
) -> None:
    rows = sft_values()["data_conf"]["training_data"]["datasets"][0]["path"]
    changes = {
        **SAVED,
        "run_conf.model": str(tiny_model(model_type)),
        "data_conf.validation_data": {"type": "CONCATENATION", "datasets": [{"path": rows}]},
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 1,
        "training_args.save_steps": 1,
        "training_args.metric_for_best_model": "eval_loss",
        # The loss falls, so that the "best" checkpoint is the first.
        "training_args.greater_is_better": True,
        "training_args.load_best_model_at_end": True,
    }
    run = train(sft_values(changes))
    best = Path(run.trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    expected, published = read_tensors(best), read_tensors(run.final)
    assert published.keys() == expected.keys()
    assert all(torch.equal(published[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "peft", [{"peft_type": "NO_PEFT"}, {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj"]}}]
)
def test_weights_that_differ_from_the_file_after_loading_stop_the_run(
    train: Any, sft_values: Any, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, peft: Any
) -> None:
    from finetuning.trainer import checkpointing

    run = train(sft_values({**SAVED, "run_conf.model": str(tiny_model("mixtral")), "peft_conf": peft}))
    folder = run.output_dir / "checkpoint-2"
    trainer = run.trainer
    trainer._load_from_checkpoint(str(folder))
    weight = next(weight for weight in trainer.model.parameters() if weight.requires_grad)
    load = checkpointing.CheckpointMixin._load_adapter
    load_model = checkpointing.load_saved_weights

    def change_one_value() -> None:
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3

    monkeypatch.setattr(
        checkpointing, "load_saved_weights", lambda *arguments: (load_model(*arguments), change_one_value())
    )
    monkeypatch.setattr(
        checkpointing.CheckpointMixin, "_load_adapter", lambda *arguments: (load(*arguments), change_one_value())
    )
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors differ from those in memory"):
        trainer._load_from_checkpoint(str(folder))


def test_weights_of_a_stock_trainer_that_are_not_safetensors_load_with_a_warning(
    train: Any, sft_values: Any, read_tensors: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = train(sft_values(SAVED))
    values = sft_values({**SAVED, "run_conf.resume_from_checkpoint": "auto"})
    values["training_args"]["output_dir"] += "-resumed"
    checkpoint = Path(values["training_args"]["output_dir"]) / "checkpoint-2"
    checkpoint.parent.mkdir()
    shutil.move(uninterrupted.output_dir / "checkpoint-2", checkpoint)
    torch.save(read_tensors(checkpoint), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "training_args.bin").write_bytes(b"")

    assert train(values).losses == uninterrupted.losses
    assert "not compared after loading" in caplog.text + capsys.readouterr().err


METHODS = ("sft", "dpo", "kto", "reward", "grpo")
ARCHITECTURES = ("llama", "mixtral", "gemma3_text")
"""Plain, with fused experts, and with sliding windows, tied embeddings and tensors that transformers renames."""
QV = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
NEW_TOKENS = [f"<|tool{number}|>" for number in range(8)]
KINDS: dict[str, dict[str, Any]] = {
    "full": {"peft_conf": {"peft_type": "NO_PEFT"}},
    "LoRA": {"peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}},
    "DoRA": {"peft_conf": {"peft_type": "LORA", "peft_kwargs": {**QV, "use_dora": True, "lora_dropout": 0.1}}},
    "new tokens": {
        "peft_conf": {"peft_type": "LORA", "peft_kwargs": {**QV, "modules_to_save": ["embed_tokens"]}},
        "data_conf.special_tokens": NEW_TOKENS,
    },
    "prompt tuning": {"peft_conf": {"peft_type": "PROMPT_TUNING", "peft_kwargs": {"num_virtual_tokens": 4}}},
    "8-bit optimizer": {"peft_conf": {"peft_type": "NO_PEFT"}, "training_args.optim": "adamw_torch_8bit"},
}
REFUSED: dict[tuple[str, str], str] = {}
"""What a run refuses, with the words of the error."""
RUNS = tuple(f"{method}, {kind}, {model}" for method in METHODS for kind in KINDS for model in ARCHITECTURES)
SAMPLE = ("dpo, new tokens, gemma3_text", "kto, DoRA, mixtral", "reward, 8-bit optimizer, llama", "grpo, LoRA, mixtral")


@pytest.fixture
def values_of(
    sft_values: Any, dpo_values: Any, grpo_values: Any, write_jsonl: Any, tmp_path: Path, tiny_model: Any
) -> Callable[[str, str, str], dict[str, Any]]:
    """A function that makes the values of a run of three steps with checkpoint 2."""

    def make(method: str, kind: str, model_type: str) -> dict[str, Any]:
        rows = write_jsonl(tmp_path / f"{method}.jsonl", rows_of(method)) if method != "sft" else None
        (tmp_path / "letters.py").write_text(LETTERS)
        changes = {
            **KINDS[kind],
            "run_conf.model": str(tiny_model(model_type)),
            "training_args.max_steps": 3,
            "training_args.save_strategy": "steps",
            "training_args.save_steps": 2,
            **({"data_conf.training_data.datasets": [{"path": str(rows)}]} if rows else {}),
        }
        if kind == "new tokens" and model_type != "gemma3_text" and method not in ("sft", "reward"):
            # The output rows, which are not the input rows here, are multiplied by TRL itself.
            kwargs = {**QV, "modules_to_save": ["embed_tokens", "lm_head"]}
            changes["peft_conf"] = {"peft_type": "LORA", "peft_kwargs": kwargs}
        if method == "reward" and "peft_kwargs" in changes["peft_conf"]:
            changes["peft_conf"] = {**changes["peft_conf"], "task_type": "SEQ_CLS"}
        if method == "grpo":
            changes |= {"training_args.num_generations": 2}
        base = {"sft": sft_values, "grpo": grpo_values}.get(method, dpo_values)
        return base(changes)

    return make


@pytest.mark.parametrize("run", sample(RUNS, SAMPLE))
def test_a_resumed_run_equals_the_uninterrupted_one(train: Any, values_of: Any, read_tensors: Any, run: str) -> None:
    method, kind, model_type = run.split(", ")
    values = values_of(method, kind, model_type)
    if (method, kind) in REFUSED:
        with pytest.raises(FinetuningError, match=REFUSED[method, kind]):
            train(values, ALGORITHMS[method])
        return
    whole = train(values, ALGORITHMS[method])
    assert len(whole.losses) == 3
    folder = Path(values["training_args"]["output_dir"] + "-resumed")
    folder.mkdir()
    shutil.move(whole.output_dir / "checkpoint-2", folder / "checkpoint-2")
    values["training_args"]["output_dir"] = str(folder)
    values["run_conf"]["resume_from_checkpoint"] = "auto"
    resumed = train(values, ALGORITHMS[method])
    assert resumed.losses == whole.losses
    expected, tensors = read_tensors(whole.final), read_tensors(resumed.final)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def table_of_runs() -> list[str]:
    """The table of `docs/concepts/resume.md`."""
    lines = [f"| | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for method in METHODS:
        cells = ("refused" if (method, kind) in REFUSED else "equal" for kind in KINDS)
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return lines


def test_the_page_lists_which_runs_resume_equal() -> None:
    page = (Path(__file__).parents[2] / "docs" / "concepts" / "resume.md").read_text(encoding="utf-8")
    assert "\n".join(table_of_runs()) in page
