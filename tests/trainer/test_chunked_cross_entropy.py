"""Slices of the logits: the loss and every gradient are those of all logits at once, with less there at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from finetuning.algorithms.sft import CHUNKING_THRESHOLD, LOGITS_PER_CHUNK, chunk_sizes
from finetuning.trainer.chunked_cross_entropy import ChunkedCrossEntropy, FusedLinearCrossEntropy

ROWS = 7
VOCABULARY = 320


def batch() -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Two rows of 24 tokens with labels on half of them: what the model gets, the 24 labels, and where they are."""
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, 24))
    expected = torch.zeros(2, 24, dtype=torch.bool)
    expected[0, 3:20] = expected[1, 10:17] = True
    positions = expected.flatten().nonzero().flatten()
    return {"input_ids": ids, "use_cache": False}, ids.roll(-1, 1)[expected], positions


def gradients(model: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    total.backward()
    result = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return result


class WidestLogits:
    """The most labels whose logits the head made in one call."""

    def __init__(self, model: Any):
        self.labels = 0
        model.get_output_embeddings().register_forward_hook(self._see)

    def _see(self, module: Any, arguments: Any, logits: torch.Tensor) -> None:
        self.labels = max(self.labels, logits.shape[:-1].numel())


def adapted(model: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", lora_dropout=0.1, **changes))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def with_bias(model: Any) -> Any:
    old = model.lm_head
    model.lm_head = torch.nn.Linear(old.in_features, old.out_features, bias=True)
    return model


HEADS = {
    "a head of its own": ("tiny_llama_dir", lambda model: model),
    "a tied head": ("chatml_llama_dir", lambda model: model),
    "a head with a bias": ("tiny_llama_dir", with_bias),
    "LoRA on the head": ("tiny_llama_dir", lambda model: adapted(model, target_modules=["q_proj", "lm_head"])),
    "a frozen head": ("tiny_llama_dir", lambda model: adapted(model, target_modules=["q_proj"])),
    "a copy of the head": (
        "tiny_llama_dir",
        lambda model: adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ),
    "single rows of a tied head": (
        "chatml_llama_dir",
        lambda model: adapted(model, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    ),
}


def both(
    model: Any, autocast: bool = False, *, fused: bool = False
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Loss and gradients from all logits at once, and in chunks."""
    inputs, targets, positions = batch()
    chunked = ChunkedCrossEntropy(model, ROWS, None, fused=fused)
    totals, grads = [], []
    for sliced in (False, True):
        # The dropout before an adapter on the head draws other numbers for other shapes.
        model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if sliced:
                _, total = chunked(model, inputs, targets, positions)
            else:
                logits = model(**inputs).logits.flatten(0, -2)[positions]
                total = cross_entropy(logits.float(), targets, reduction="sum")
        totals.append(total.item())
        grads.append(gradients(model, total))
    return totals, grads


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True], ids=["recomputed", "fused"])
def test_loss_and_gradients_are_the_same(
    request: pytest.FixtureRequest, head: str, dtype: torch.dtype, close: float, fused: bool
) -> None:
    folder, change = HEADS[head]
    model = change(AutoModelForCausalLM.from_pretrained(request.getfixturevalue(folder), dtype=torch.float32)).to(dtype)
    totals, (whole, sliced) = both(model, fused=fused)
    assert totals[1] == pytest.approx(totals[0], rel=close / 10)
    assert whole.keys() == sliced.keys()
    assert whole
    for name, gradient in whole.items():
        error = (sliced[name].float() - gradient.float()).norm() / gradient.float().norm()
        assert error < close, name


@pytest.mark.parametrize("fused", [False, True], ids=["recomputed", "fused"])
def test_it_is_the_same_under_autocast(tiny_llama_dir: Path, fused: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    totals, (whole, sliced) = both(model, True, fused=fused)
    assert totals[1] == pytest.approx(totals[0], rel=1e-3)
    for name, gradient in whole.items():
        assert (sliced[name] - gradient).norm() / gradient.norm() < 2e-2, name


def test_dropout_on_the_head_is_drawn_alike_in_both_passes(tiny_llama_dir: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), target_modules=["lm_head"]).train()
    inner = model.base_model.model
    inputs, targets, positions = batch()

    def by_hand() -> torch.Tensor:
        hidden = inner.model(input_ids=inputs["input_ids"])[0].flatten(0, -2)[positions]
        # The one label that the model's own call of the head is left with draws as well.
        inner.lm_head(hidden[:1])
        parts = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
        return sum(cross_entropy(inner.lm_head(states), labels, reduction="sum") for states, labels in parts)

    result = []
    for compute in (by_hand, lambda: ChunkedCrossEntropy(model, ROWS, None)(model, inputs, targets, positions)[1]):
        torch.manual_seed(3)
        result.append(gradients(model, compute()))
    assert all(torch.allclose(result[0][name], result[1][name], atol=1e-5) for name in result[0])


def test_no_more_logits_are_there_than_asked_for(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    inputs, targets, positions = batch()
    widest = WidestLogits(model)
    outputs, total = ChunkedCrossEntropy(model, ROWS, None)(model, inputs, targets, positions)
    total.backward()
    assert widest.labels == ROWS
    assert outputs.logits is None
    assert not model.lm_head._forward_pre_hooks
    assert len(model.lm_head._forward_hooks) == 1


def test_the_fused_loss_of_bfloat16_is_added_up_in_float32() -> None:
    """torch's own `linear_cross_entropy` adds the losses of chunks up in bfloat16, and is off by percents."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, 16).bfloat16(), torch.randn(64, 16).bfloat16()
    targets = torch.randint(64, (4096,))
    exact = float(cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum"))
    total = float(FusedLinearCrossEntropy.apply(hidden, weight, None, targets, 64))
    assert total == pytest.approx(exact, rel=2e-3)


def test_the_fused_loss_calls_the_head_for_one_label_and_nothing_in_the_backward_pass(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    inputs, targets, positions = batch()
    chunked = ChunkedCrossEntropy(model, ROWS, None, fused=True)
    chunked(model, inputs, targets, positions)
    widest = WidestLogits(model)
    result = chunked(model, inputs, targets, positions)
    assert result is not None
    result[1].backward()
    assert widest.labels == 1
    assert model.lm_head.weight.grad is not None


def test_few_labels_are_computed_at_once() -> None:
    assert chunk_sizes("auto", 32_000) == (CHUNKING_THRESHOLD // 32_000, LOGITS_PER_CHUNK // 32_000)
    assert chunk_sizes(24, 32_000) == (24, 24)
    assert chunk_sizes("all", 32_000)[0] > 1 << 40


def test_a_model_that_scales_its_logits_keeps_them_whole(caplog: pytest.LogCaptureFixture) -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | dict.fromkeys(
        ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1
    )
    model = GraniteForCausalLM(GraniteConfig(vocab_size=VOCABULARY, logits_scaling=8.0, **sizes))
    inputs, targets, positions = batch()
    chunked = ChunkedCrossEntropy(model, ROWS, None)
    with caplog.at_level("WARNING"):
        assert [chunked(model, inputs, targets, positions) for _ in range(2)] == [None, None]
    assert [record.getMessage() for record in caplog.records] == [
        "computing the logits of all labels at once: the model transforms the output of its head"
    ]


def test_a_run_that_cannot_slice_says_so_at_once(train: Any, sft_values: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        train(
            sft_values(
                {
                    "training_args.label_smoothing_factor": 0.1,
                    "sft_args.logits_at_once": 5,
                    "training_args.max_steps": 1,
                }
            )
        )
    assert "computing the logits of all labels at once: the model computes its loss itself" in caplog.text


def test_a_run_with_slices_trains_as_without(train: Any, sft_values: Any, tmp_path: Path) -> None:
    """Losses, validation's too, to float's tolerance."""
    changes = {
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 3,
    }
    histories = []
    for at_once in ("all", 5):
        out = {"sft_args.logits_at_once": at_once, "training_args.output_dir": str(tmp_path / str(at_once))}
        trainer = train(sft_values(changes | out)).trainer
        histories.append(
            [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]
        )
        assert (trainer.max_labels_at_once >= 100) is (at_once == "all")
    assert len(histories[0]) > 3
    assert histories[1] == pytest.approx(histories[0], rel=1e-5)
