"""What the processes of a job share at each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from finetuning.trainer import ddp
from finetuning.trainer.ddp import average_gradients, uses_all_weights


@pytest.fixture
def alone(tmp_path: Any) -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_gradients_are_averaged_and_a_weight_without_one_keeps_none(alone: None) -> None:
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (5,), ())]
    weights[1].data = weights[1].data.bfloat16()
    for number, weight in enumerate(weights):
        weight.grad = None if number == 2 else torch.full_like(weight, number + 1.0)
    average_gradients(weights, world_size=4)
    assert weights[2].grad is None
    assert torch.equal(weights[0].grad, torch.full((2, 3), 0.25))
    assert torch.equal(weights[1].grad, torch.full((4,), 0.5, dtype=torch.bfloat16))
    assert float(weights[3].grad) == 1.0


def test_large_gradients_go_in_chunks_of_one_type() -> None:
    half = ddp._CHUNK_BYTES // 8
    gradients = [torch.empty(size, dtype=kind, device="meta") for size, kind in ((half, torch.float32),) * 3]
    gradients += [torch.empty(3, dtype=torch.bfloat16, device="meta"), torch.empty(10 * half, device="meta")]
    assert [len(chunk) for chunk in ddp._chunks(gradients)] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"num_local_experts": 8}, False), ({"layerdrop": 0.1}, False), ({"decoder_layerdrop": 0.0}, True)],
)
def test_where_every_weight_is_plainly_used(changes: dict[str, Any], expected: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, **changes
    )
    assert uses_all_weights(LlamaForCausalLM(config)) is expected


def test_other_adapters_than_lora_may_leave_weights_out(chatml_llama_dir: Any) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for conf, expected in ((LoraConfig(r=2), True), (PromptTuningConfig(num_virtual_tokens=2), False)):
        model = AutoModelForCausalLM.from_pretrained(chatml_llama_dir)
        conf.task_type = "CAUSAL_LM"
        assert uses_all_weights(get_peft_model(model, conf)) is expected
