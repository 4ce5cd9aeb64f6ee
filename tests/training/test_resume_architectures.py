"""A checkpoint is loaded as it was saved, for models whose tensors transformers renames or fuses on loading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.atomic_io import MANIFEST
from finetuning.errors import CheckpointError

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
        config = AutoConfig.for_model(model_type, **(SMALL | EXPERTS | settings | SPECIFIC[model_type]))
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
