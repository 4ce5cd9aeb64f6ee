"""Concatenated rows attend only to themselves, verified per model; models that fail are refused with a reason."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BambaConfig,
    BertConfig,
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

from finetuning.errors import ModelError
from finetuning.model.varlen_attention import (
    SDPA_VARLEN,
    check_causality,
    describe_attention,
    describe_isolation_check,
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
    "gemma2 has no sdpa": (
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


def test_a_bias_on_attention_scores_is_refused_even_while_it_is_0() -> None:
    """Doge's bias is computed from the hidden states by weights that start at 0."""
    from transformers import DogeConfig

    assert "no bias on attention scores" in str(enable_varlen(make(DogeConfig(**GROUPED))))


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


def _capped(*args: Any, softcap: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Row by row with soft-capped scores, as FlashAttention computes them."""
    query, key, value = args[1:4]
    borders, window = kwargs["cu_seq_lens_q"].tolist(), kwargs.get("sliding_window")
    outputs = []
    for start, end in itertools.pairwise(borders):
        queries, keys, values = (states[0, :, start:end] for states in (query, key, value))
        groups = queries.shape[0] // keys.shape[0]
        keys, values = (states.repeat_interleave(groups, dim=0) for states in (keys, values))
        scores = queries @ keys.transpose(1, 2) * kwargs["scaling"]
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        allowed = (distance >= 0) & (distance < (window or end))
        outputs.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ values)
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


def _ignores_the_cap(*args: Any, softcap: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return _capped(*args, **kwargs)


@pytest.mark.parametrize(
    ("attention", "is_right"), [(_capped, True), (_ignores_the_cap, False), (varlen_attention, False)]
)
def test_a_class_without_sdpa_takes_another_implementation_with_its_logits(attention: Any, is_right: bool) -> None:
    name = registered("kernel_for_tests", attention)
    # Scores of random weights are small: a small cap shows.
    model = make(Gemma2Config(**GROUPED, head_dim=8, attn_logit_softcapping=1e-4))
    assert model.config._attn_implementation == "eager"
    reason = enable_varlen_kernel(model, name)
    assert (reason is None) is is_right
    assert model.config._attn_implementation == (name if is_right else "eager")
    assert "attention eager has no efficient padding-free form" in str(enable_varlen(model)) or is_right


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


def leak_back(distance: int, weight: float, only_above: int = 0) -> Any:
    """Attention that adds the value of the token `distance` back, where that token is in another row.

    Rows of up to `only_above` tokens are computed correctly.
    """

    def attention(*args: Any, cu_seq_lens_q: Any = None, sliding_window: Any = None, **kwargs: Any) -> Any:
        query, value = args[1], args[3]
        output, _ = varlen_attention(*args, cu_seq_lens_q=cu_seq_lens_q, sliding_window=sliding_window, **kwargs)
        if cu_seq_lens_q is None or int(cu_seq_lens_q.diff().max()) <= (sliding_window or only_above):
            return output, None
        row = torch.bucketize(torch.arange(value.shape[2]), cu_seq_lens_q[1:], right=True)
        is_other = row != row.roll(distance)
        is_other[:distance] = False
        earlier = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).roll(distance, dims=2)
        return output + weight * (earlier * is_other[:, None]).transpose(1, 2), None

    return attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [1.0, 0.002])
@pytest.mark.parametrize("distance", [1, 17, 64, 80])
def test_a_leak_into_another_row_is_caught(distance: int, weight: float, dtype: torch.dtype) -> None:
    name = registered("leaks_back", leak_back(distance, weight))
    reason = enable_varlen_kernel(make(VERIFIED["llama"]).to(dtype), name)
    assert re.search("it (changes the logits|lets a row depend on other rows)", str(reason))


def test_a_leak_below_the_rounding_of_logits_is_caught_by_its_gradient() -> None:
    name = registered("leaks_back", leak_back(64, 0.002))
    model = make(VERIFIED["llama"]).to(torch.bfloat16)
    reason = enable_varlen_kernel(model, name)
    assert "lets a row depend on other rows or on later tokens (gradient" in str(reason)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("window", [50, 128, 4096, 100_000])
def test_a_leak_of_rows_longer_than_the_window_is_caught(window: int) -> None:
    config = MistralConfig(**GROUPED, sliding_window=window, max_position_embeddings=200_000)
    name = registered("leaks_beyond_window", leak_back(1, 1.0))
    assert "it " in str(enable_varlen_kernel(make(config), name))
    right = registered("keeps_rows_apart", varlen_attention)
    model = make(config)
    assert enable_varlen_kernel(model, right) is None
    assert model.config.sliding_window == window
    assert ("reduced to" in describe_isolation_check(model)) == (window > 64)


def test_a_window_that_cannot_be_reduced_gets_rows_that_are_longer() -> None:
    """Of a model whose attention does not read the window from its config."""
    model = make(VERIFIED["llama"])
    model.config.sliding_window = 300
    name = registered("leaks_beyond_300", leak_back(1, 1.0, only_above=300))
    assert "it " in str(enable_varlen_kernel(model, name))
    assert enable_varlen(model) is None
    unused = make(VERIFIED["llama"])
    unused.config.sliding_window = 1_000_000
    assert enable_varlen(unused) is None


def test_the_cost_is_bounded_and_what_was_not_verified_is_described() -> None:
    model = make(VERIFIED["llama"])
    model.config.window_size = 300
    assert describe_isolation_check(model) == "rows of up to 335 tokens"
    model.config.window_size = 5000
    assert describe_isolation_check(model) == "rows of up to 99 tokens, shorter than window_size 5000"


def test_isolation_is_verified_in_the_dtype_of_autocast() -> None:
    def leaks_in_half(*args: Any, **kwargs: Any) -> Any:
        attention = leak_back(1, 1.0) if torch.is_autocast_enabled("cpu") else varlen_attention
        return attention(*args, **kwargs)

    name = registered("leaks_in_half", leaks_in_half)
    assert enable_varlen_kernel(make(VERIFIED["llama"]), name) is None
    assert "it " in str(enable_varlen_kernel(make(VERIFIED["llama"]), name, autocast=torch.bfloat16))


def test_a_convolution_over_rows_is_caught() -> None:
    """A depthwise causal convolution of kernel 80, of which only the oldest tap is not 0."""

    class Convolution(torch.nn.Module):
        def __init__(self, mlp: torch.nn.Module) -> None:
            super().__init__()
            self.mlp = mlp
            self.conv = torch.nn.Conv1d(32, 32, kernel_size=80, groups=32, bias=False)
            torch.nn.init.zeros_(self.conv.weight)
            torch.nn.init.constant_(self.conv.weight[:, :, 0], 1e-3)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            padded = torch.nn.functional.pad(hidden.transpose(1, 2), (79, 0))
            return self.mlp(hidden) + self.conv(padded).transpose(1, 2)

    model = make(VERIFIED["llama"])
    model.model.layers[0].mlp = Convolution(model.model.layers[0].mlp).eval()
    assert "rows of up to 115 tokens" in describe_isolation_check(model)
    assert "concatenating rows" in str(enable_varlen(model.to(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*VERIFIED, *REFUSED])
def test_causal_models_are_recognized(name: str, dtype: torch.dtype) -> None:
    model = make(VERIFIED[name] if name in VERIFIED else REFUSED[name][0]).to(dtype).train()
    assert check_causality(model) is None
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


BERT = {**SIZES, "max_position_embeddings": 512}


def test_bidirectional_models_are_refused() -> None:
    with pytest.raises(ModelError, match=r"BertLMHeadModel is not a causal language model.*is_decoder: true"):
        check_causality(make(BertConfig(**BERT)))
    assert check_causality(make(BertConfig(**BERT, is_decoder=True))) is None


def look_ahead(distance: int, weight: float, *, detached: bool = False) -> Any:
    """A hook that adds to each token the hidden state of one that comes later."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        later = output.roll(-distance, dims=1)
        later[:, -distance:] = 0
        return output + weight * (later.detach() if detached else later)

    return hook


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("distance", "weight"), [(1, 1.0), (1, 1e-3), (20, 1e-3)])
def test_a_look_ahead_is_refused(distance: int, weight: float, dtype: torch.dtype) -> None:
    model = make(VERIFIED["llama"]).to(dtype)
    model.model.layers[0].mlp.register_forward_hook(look_ahead(distance, weight))
    with pytest.raises(ModelError, match="later tokens change the logits of earlier ones"):
        check_causality(model)


def test_a_model_that_computes_nothing_here_is_reported() -> None:
    model = make(VERIFIED["llama"])
    model.model.layers[1].mlp.double()
    assert "dtype" in str(check_causality(model))


def test_a_look_ahead_without_gradient_is_refused() -> None:
    """Such as experts that choose the tokens of a row."""
    model = make(VERIFIED["llama"])
    model.model.layers[0].mlp.register_forward_hook(look_ahead(1, 1.0, detached=True))
    with pytest.raises(ModelError, match="later tokens change the logits of earlier ones"):
        check_causality(model)


def test_a_gradient_of_nan_is_a_leak() -> None:
    def depends_on_the_end(module: Any, args: Any) -> Any:
        hidden = args[0]
        zero = (hidden[:, -20:] * 0).square().sum().sqrt()
        return torch.cat([hidden[:, :-20] + zero, hidden[:, -20:]], dim=1), *args[1:]

    model = make(VERIFIED["llama"])
    model.model.layers[0].register_forward_pre_hook(depends_on_the_end)
    with pytest.raises(ModelError, match="gradient nan of the largest"):
        check_causality(model)


def test_logits_of_nan_do_not_show_causality() -> None:
    model = make(VERIFIED["llama"])
    model.model.norm.weight.data[0] = torch.nan
    assert check_causality(model) == "its logits are not finite"


def test_a_run_refuses_a_bidirectional_model(train: Any, sft_values: Any, tmp_path: Any, chatml_llama_dir: Any) -> None:
    from transformers import AutoTokenizer

    make(BertConfig(**{**BERT, "vocab_size": 504})).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(chatml_llama_dir).save_pretrained(tmp_path / "bert")
    bert = {"run_conf.model": str(tmp_path / "bert"), "training_args.max_steps": 1}
    with pytest.raises(ModelError, match=r"run_conf\.model: BertLMHeadModel is not a causal language model") as refused:
        train(sft_values(bert))
    assert refused.value.exit_code == 1
    run = train(sft_values({**bert, "run_conf.model_args": {"is_decoder": True}}))
    assert run.result.steps == 1


def test_no_implementation_is_tried_on_what_cannot_lie_end_to_end() -> None:
    name = registered("kernel_for_tests", varlen_attention)
    asked = make(VERIFIED["llama"], attn_implementation="eager")
    assert enable_varlen_kernel(asked, name) == "the model uses eager attention"
    capped = make(VERIFIED["llama"])
    capped.config.attn_logit_softcapping = 50.0
    assert "soft-caps its attention scores" in str(enable_varlen_kernel(capped, name))


def test_the_attention_implementation_is_described() -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(VERIFIED["llama"]), attn_implementation="eager")
    assert describe_attention(model, "as configured") == "attention: eager  (as configured)"
    model = AutoModelForCausalLM.from_config(copy.deepcopy(VERIFIED["llama"]))
    use_varlen(model)
    assert describe_attention(model, "the default") == "attention: sdpa, row by row  (the default)"
