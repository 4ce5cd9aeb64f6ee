"""Adapters for the tiny models: made by PEFT, with random weights that change the model much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONTEXT = {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **CONTEXT}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def load_for(task: str, base: Path, rows: int | None = None) -> Any:
    """The base as an adapter of that task wants it, in the dtype of its files."""
    import transformers

    if task == "SEQ_CLS":
        return transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.fixture(scope="session")
def base_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, chatml_llama_dir: Path
) -> Callable[[str], Path]:
    """A function that gives the folder of a tiny model: `llama`, `tied`, `biased`, `gpt2` or `mixtral`."""
    made = {"llama": tiny_llama_dir, "tied": chatml_llama_dir}

    def make(name: str) -> Path:
        if name not in made:
            import torch
            from transformers import AutoTokenizer, GPT2Config, LlamaConfig, MixtralConfig, models

            tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
            rows = -(-len(tokenizer) // 8) * 8
            configs = {
                "biased": LlamaConfig(vocab_size=rows, attention_bias=True, **NARROW, **HEADS),
                "gpt2": GPT2Config(vocab_size=rows, n_embd=64, n_layer=2, n_head=2, n_positions=128, bos_token_id=0),
                "mixtral": MixtralConfig(vocab_size=rows, num_local_experts=2, **NARROW, **HEADS),
            }
            kinds = {
                "biased": models.llama.LlamaForCausalLM,
                "gpt2": models.gpt2.GPT2LMHeadModel,
                "mixtral": models.mixtral.MixtralForCausalLM,
            }
            folder = tmp_path_factory.mktemp("bases") / name
            with torch.random.fork_rng():
                torch.manual_seed(4)
                kinds[name](configs[name]).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="session")
def copy_in_dtype(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """A function that saves a model with its tokenizer in another dtype, in shards of 100 KB; once per pair."""
    made: dict[tuple[Path, str], Path] = {}

    def copy(source: Path, dtype: str) -> Path:
        if (source, dtype) not in made:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            folder = tmp_path_factory.mktemp("base") / f"{source.name}-{dtype}"
            model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
            model.save_pretrained(folder, max_shard_size="100KB")
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            made[source, dtype] = folder
        return made[source, dtype]

    return copy


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    """A function that puts a PEFT config on a base, moves all its weights at random, and saves the adapter.

    `rows`: rows that the embeddings grow to before.
    """

    def make(
        base: Path,
        config: Any,
        folder: Path,
        *,
        dtype: str | None = None,
        seed: int = 0,
        scale: float = 0.05,
        rows: int | None = None,
    ) -> Path:
        import torch
        from peft import get_peft_model

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(load_for(config.task_type, base, rows), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += torch.randn_like(parameter) * scale
        if dtype is not None:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(getattr(torch, dtype))
        model.save_pretrained(folder)
        return folder

    return make
