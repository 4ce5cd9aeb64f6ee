"""Concatenated rows attend only to themselves, verified per model; models that fail are refused with a reason."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from finetuning.model.varlen_attention import (
    SDPA_VARLEN,
    describe_attention,
    enable_varlen,
    enable_varlen_kernel,
    use_varlen,
    varlen_attention,
    varlen_inputs,
)

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
VERIFIED = {
    "llama": LlamaConfig(**GROUPED),
    "mistral with a window": MistralConfig(**GROUPED, sliding_window=4),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4),
    "phi": PhiConfig(**SIZES),
    "opt": OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
}
REFUSED = {
    "gemma2 asks for eager": (
        Gemma2Config(**GROUPED, head_dim=8),
        "attention eager has no efficient padding-free form",
    ),
    "gpt-oss has sinks": (GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4), "sdpa"),
    "bloom has alibi": (BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4), "sdpa|changes the logits"),
    "falcon has alibi": (
        FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        "sdpa|changes the logits",
    ),
    "mamba carries a state": (MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2), "."),
    "bamba carries a state": (
        BambaConfig(**GROUPED, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8),
        "carry a state|changes the logits",
    ),
}


def make(config: Any, **arguments: Any) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **arguments).eval()


def rows() -> list[torch.Tensor]:
    return [torch.arange(3, 14), torch.arange(50, 52), torch.arange(70, 77)]


@torch.no_grad()
def leak(model: Any) -> float:
    """How much the logits of a row change when the row before it does."""
    first, middle, last = rows()
    before = model(use_cache=False, **varlen_inputs([first, middle, last])).logits[0, -len(last) :]
    after = model(use_cache=False, **varlen_inputs([first.flip(0), middle, last])).logits[0, -len(last) :]
    return float((before - after).abs().max())


@pytest.mark.parametrize("name", VERIFIED)
def test_verified_models_keep_rows_apart(name: str) -> None:
    model = make(VERIFIED[name])
    with torch.no_grad():
        alone = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows()])
        padded_ids = torch.zeros(3, 11, dtype=torch.int64)
        mask = torch.zeros_like(padded_ids)
        for index, row in enumerate(rows()):
            padded_ids[index, : len(row)], mask[index, : len(row)] = row, 1
        assert enable_varlen(model) is None
        assert model.config._attn_implementation == SDPA_VARLEN
        together = model(use_cache=False, **varlen_inputs(rows())).logits[0]
        padded = model(padded_ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)
    assert leak(model) == 0.0


def test_gradients_are_those_of_the_rows_alone() -> None:
    alone, together = make(VERIFIED["llama"]).train(), make(VERIFIED["llama"]).train()
    torch.cat([alone(row[None], use_cache=False).logits[0] for row in rows()]).square().sum().backward()
    assert enable_varlen(together) is None
    assert together.training
    together(use_cache=False, **varlen_inputs(rows())).logits.square().sum().backward()
    for expected, actual in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_are_left_as_they_were(name: str) -> None:
    config, reason = REFUSED[name]
    model = make(config)
    before = model.config._attn_implementation
    refusal = enable_varlen(model)
    assert refusal is not None
    assert re.search(reason, refusal)
    assert model.config._attn_implementation == before


def test_capped_scores_are_refused_under_sdpa() -> None:
    model = make(VERIFIED["llama"])
    model.config.attn_logit_softcapping = 50.0
    assert "soft-caps its attention scores" in str(enable_varlen(model))


def test_eager_attention_and_prompt_adapters_are_refused() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = make(VERIFIED["llama"])
    adapted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert "PROMPT_TUNING" in str(enable_varlen(adapted, adapted.active_peft_config))
    eager = make(VERIFIED["llama"])
    eager.set_attn_implementation("eager")
    assert "attention eager" in str(enable_varlen(eager))


def test_a_model_that_cannot_compute_here_is_refused_and_left_as_it_was() -> None:
    model = make(VERIFIED["llama"]).train()
    model.model.layers[1].mlp.double()
    assert "isolation cannot be verified on cpu: " in str(enable_varlen(model))
    assert model.config._attn_implementation == "sdpa"
    assert model.training


def test_flash_attention_is_refused_where_the_weights_lie_on_the_cpu() -> None:
    model = make(VERIFIED["llama"])
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2 runs on GPUs only" in str(enable_varlen(model))


def test_another_process_uses_the_result_without_weights() -> None:
    verified, empty = make(VERIFIED["llama"]), make(VERIFIED["llama"]).to("meta")
    assert enable_varlen(verified) is None
    use_varlen(empty)
    assert empty.config._attn_implementation == verified.config._attn_implementation == SDPA_VARLEN


def test_an_adapter_on_the_model_is_part_of_the_check() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(make(VERIFIED["llama"]), config)
    assert enable_varlen(adapted, adapted.active_peft_config) is None
    assert leak(adapted) == 0.0


class _BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def _without_gradient(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    output, _ = varlen_attention(*args, **kwargs)
    return _BrokenBackward.apply(output), None


def _without_borders(*args: Any, cu_seq_lens_q: Any = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return sdpa_attention_forward(*args, **kwargs)


def registered(name: str, attention: Any) -> str:
    """An implementation as transformers knows a package's, under a name of its own."""
    use_varlen(make(VERIFIED["llama"]))
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[SDPA_VARLEN])
    return name


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_another_implementation_is_taken_where_its_logits_are_those_of_sdpa(autocast: torch.dtype | None) -> None:
    name = registered("kernel_for_tests", varlen_attention)
    model, empty = make(VERIFIED["llama"]), make(VERIFIED["llama"]).to("meta")
    assert enable_varlen_kernel(model, name, autocast=autocast) is None
    assert model.config._attn_implementation == name
    assert all(weight.grad is None for weight in model.parameters())
    use_varlen(empty, name=name)
    assert empty.config._attn_implementation == name


@pytest.mark.parametrize(
    ("name", "attention", "reason"),
    [
        ("leaks", _without_borders, "it changes the logits by"),
        ("cannot_learn", _without_gradient, "its gradient is not finite"),
        ("flash_attention_2", None, "Flash"),
        ("not_there", None, "not_there"),
    ],
)
def test_an_implementation_that_fails_leaves_the_model_to_sdpa(name: str, attention: Any, reason: str) -> None:
    if attention is not None:
        registered(name, attention)
    model = make(VERIFIED["llama"]).train()
    assert reason in str(enable_varlen_kernel(model, name))
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert enable_varlen(model) is None


def test_no_implementation_is_tried_on_what_cannot_lie_end_to_end() -> None:
    name = registered("kernel_for_tests", varlen_attention)
    assert enable_varlen_kernel(make(REFUSED["gemma2 asks for eager"][0]), name) == "the model uses eager attention"
    capped = make(VERIFIED["llama"])
    capped.config.attn_logit_softcapping = 50.0
    assert "soft-caps its attention scores" in str(enable_varlen_kernel(capped, name))


def test_the_attention_implementation_is_described() -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(VERIFIED["llama"]), attn_implementation="eager")
    assert describe_attention(model, "as configured") == "attention: eager  (as configured)"
    model = AutoModelForCausalLM.from_config(copy.deepcopy(VERIFIED["llama"]))
    use_varlen(model)
    assert describe_attention(model, "the default") == "attention: sdpa, row by row  (the default)"
