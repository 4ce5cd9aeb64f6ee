"""Attention for GPUs, by a kernel for the CPU under torch's varlen operation: the same as rows alone, or refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhimoeConfig,
    Qwen3Config,
)

from finetuning.model.compiled_layers import compile_layers
from finetuning.model.gpu_attention import (
    CAUSAL_SDPA,
    accepts_constant_mask,
    enable_causal_sdpa,
    register_torch_varlen,
    small_copy,
    torch_varlen_attention,
)
from finetuning.model.varlen_attention import (
    enable_varlen,
    enable_varlen_kernel,
    sliding_window_mask,
    use_varlen,
    varlen_inputs,
)
from finetuning.plan.attention import TORCH_VARLEN

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}
IGNORES_WINDOW = False
"""A planted fault of the kernel."""


def _rows(query: Any, key: Any, value: Any, borders: torch.Tensor, scale: Any, window: list[int]) -> torch.Tensor:
    lengths, size = borders.diff().tolist(), None if window[0] < 0 or IGNORES_WINDOW else window[0] + 1
    outputs = []
    for states in zip(*(tensor.transpose(0, 1).split(lengths, 1) for tensor in (query, key, value)), strict=True):
        mask = sliding_window_mask(states[0].shape[1], size, query.device)
        outputs.append(
            scaled_dot_product_attention(
                *(tensor[None] for tensor in states),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs).contiguous()


@pytest.fixture(scope="module", autouse=True)
def cpu_kernel() -> Iterator[None]:
    """Kernels for the CPU under the operations that torch has for GPUs only."""

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(query: Any, key: Any, value: Any, borders: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        _, _, _, _, scale, window, *_ = args
        output = _rows(query, key, value, borders, scale, window)
        return output, torch.zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        _, _, borders, *_, scale, window = args

        def compute() -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                inputs = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
                return torch.autograd.grad(_rows(*inputs, borders, scale, window), inputs, gradient)

        # A kernel runs below autograd, which a new thread enters.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(compute).result()

    register_torch_varlen()
    yield


def make(config: Any) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def rows() -> list[torch.Tensor]:
    return [torch.arange(3, 14), torch.arange(50, 52), torch.arange(70, 77)]


def gradients(model: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(logits.square().sum(), [w for w in model.parameters()], allow_unused=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_varlen_rows_one_by_one_and_padded_rows_agree(name: str) -> None:
    config = CONFIGS[name]
    padded_ids = torch.zeros(3, 11, dtype=torch.int64)
    mask = torch.zeros_like(padded_ids)
    for index, row in enumerate(rows()):
        padded_ids[index, : len(row)], mask[index, : len(row)] = row, 1
    alone, kernel, loop, padded = (make(config) for _ in range(4))
    assert enable_varlen_kernel(kernel, TORCH_VARLEN) is None
    assert enable_varlen(loop) is None
    assert enable_causal_sdpa(padded) is None
    assert padded.config._attn_implementation == CAUSAL_SDPA
    expected = torch.cat([alone(row[None], use_cache=False).logits[0] for row in rows()])
    inputs = varlen_inputs(rows())
    results = {
        kernel: kernel(use_cache=False, **inputs).logits[0],
        loop: loop(use_cache=False, **inputs).logits[0],
        padded: padded(padded_ids, attention_mask=mask, use_cache=False).logits[mask.bool()],
    }
    exact = gradients(alone, expected)
    for model, logits in results.items():
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
        for gradient, reference in zip(gradients(model, logits), exact, strict=True):
            if reference is not None:
                torch.testing.assert_close(gradient, reference, atol=1e-4, rtol=1e-3)


def test_a_kernel_that_ignores_the_window_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.IGNORES_WINDOW", True)
    model = make(CONFIGS["mistral with a window"])
    assert "changes the logits" in str(enable_varlen_kernel(model, TORCH_VARLEN))
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_layers_pass_no_window_is_refused() -> None:
    """Phi-MoE's masks have the window of its config, which its layers do not pass to attention."""
    config = PhimoeConfig(**SIZES, num_local_experts=4, sliding_window=2047, max_position_embeddings=4096)
    assert enable_varlen_kernel(make(config), TORCH_VARLEN) is not None
    assert enable_causal_sdpa(make(config)) is not None


def test_nan_in_a_single_row_is_a_difference() -> None:
    def break_the_last_row(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if len(output) > 1:
            output[-1, 0] = torch.nan
        return output

    model = make(CONFIGS["llama"])
    model.model.norm.register_forward_hook(break_the_last_row)
    assert "it changes the logits by nan" in str(enable_causal_sdpa(model))


def test_a_bidirectional_model_is_not_made_causal() -> None:
    model = make(BertConfig(**{**SIZES, "num_key_value_heads": None}))
    assert enable_causal_sdpa(model) is not None
    assert model.config._attn_implementation == "sdpa"


def test_queries_and_keys_get_the_type_of_the_values() -> None:
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    borders = torch.tensor([0, 2, 5], dtype=torch.int32)
    output, _ = torch_varlen_attention(
        torch.nn.Module(), query, key, value.bfloat16(), None, cu_seq_lens_q=borders, max_length_q=3
    )
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("more", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}])
def test_what_the_kernel_does_not_compute_is_an_error(more: dict[str, Any]) -> None:
    states = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    borders = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="varlen attention"):
        torch_varlen_attention(torch.nn.Module(), *states, None, cu_seq_lens_q=borders, max_length_q=5, **more)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_constant_mask_changes_nothing(name: str) -> None:
    model = make(CONFIGS[name])
    assert not accepts_constant_mask(model)
    use_varlen(model)
    assert accepts_constant_mask(model)


def test_a_small_copy_has_every_kind_of_layer() -> None:
    config = Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 12, "vocab_size": 5000}, head_dim=8, sliding_window=4)
    model = make(config)
    small = small_copy(model, torch.device("cpu"), torch.bfloat16)
    assert set(small.config.layer_types) == set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert small.config.num_hidden_layers == len(small.model.layers) == 3
    assert small.dtype == torch.bfloat16
    assert small.config.vocab_size == 1024
    assert model.config.num_hidden_layers == 12
    assert enable_varlen_kernel(small, TORCH_VARLEN) is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_share_a_few_graphs_for_all_lengths(checkpointing: bool) -> None:
    torch.compiler.reset()
    plain, compiled = make(CONFIGS["llama"]), make(CONFIGS["llama"])
    graphs = CompileCounter()
    for model in (plain, compiled):
        use_varlen(model.train(), TORCH_VARLEN)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    names = list(compiled.state_dict())
    assert compile_layers(compiled, graphs) == 2
    assert list(compiled.state_dict()) == names
    for lengths in ((5, 9), (3,), (7, 2, 30), (1, 4, 8, 16), (64, 33), (12, 13, 14, 15, 16)):
        inputs: Any = varlen_inputs([torch.arange(length) % 97 for length in lengths])
        for model in (plain, compiled):
            model(**inputs, use_cache=False).logits.float().square().mean().backward()
    for expected, weight in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, expected.grad)
    assert 1 <= graphs.frame_count <= 2
