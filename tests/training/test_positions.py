"""A model has a position for each token of a row, or says so before it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import parse_document
from finetuning.data.pipeline import PreparedData, prepare_dpo, prepare_sft
from finetuning.errors import ConfigError
from finetuning.training.preflight import check_positions

TEXTS = [{"text": "word " * 3}, {"text": "word " * 40}]
PAIRS = [{"prompt": "word " * 10, "chosen": "word " * 10, "rejected": "word " * 30}]


@pytest.fixture(params=["sft", "dpo", "stream"])
def prepared(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path: Path) -> tuple[Any, PreparedData]:
    from transformers import AutoTokenizer

    method = "dpo" if request.param == "dpo" else "sft"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (PAIRS if method == "dpo" else TEXTS)))
    values = {
        "data_conf": {
            "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(file)}]},
            "validation_data": {"type": "NONE"},
            "chat_template_name": "chat-ml",
            "cache": "off",
            "streaming": request.param == "stream",
        },
        "training_args": {"output_dir": str(tmp_path / "out"), "max_steps": 2},
        "batchsize_conf": {"total_train_batch_size": 2, "max_per_device_train_batch_size": 2},
        "peft_conf": {"peft_type": "NO_PEFT"},
        "run_conf": {"model": str(tiny_llama_dir)},
    } | ({"sft_args": {"max_seq_length": 256}} if method == "sft" else {})
    experiment = validate(parse_document(json.dumps(values), "a.yaml"), EXPERIMENTS[method]).experiment
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    if method == "dpo":
        return experiment, prepare_dpo(experiment.data_conf, None, tokenizer)
    return experiment, prepare_sft(experiment.data_conf, experiment.sft_args, tokenizer)


def gpt2(positions: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=positions, n_embd=8, n_layer=1, n_head=1))


def llama(positions: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=positions, **sizes))


def test_rows_beyond_the_positions_are_reported(prepared: tuple[Any, PreparedData]) -> None:
    experiment, data = prepared
    with pytest.raises(ConfigError, match=r"tokens, but the model has 16 learned positions. Set it to 16 or less"):
        check_positions(gpt2(16), experiment, data)
    warnings = check_positions(llama(16), experiment, data)
    if experiment.data_conf.streaming:
        assert warnings == (), "nobody knows how long its rows are"
    else:
        assert "more than the model's context length of 16" in warnings[0]
    for model in (gpt2(512), llama(512)):
        assert check_positions(model, experiment, data) == ()
