"""Verify a merge: compare the logits of the merged model with those of base and adapter, in the saved dtype.

Both models see the same prompts. The tolerance follows from the dtype. Let u be its unit roundoff. Rounding a merged
weight changes it by up to u of its value, in a random direction, and the unmerged model rounds its activations by as
much. Random errors add up in quadrature over the layers, so the logits may differ by

    tolerance = SAFETY * u * sqrt(layers)

relative to the spread of the logits, their root mean square around the mean of each position. Three statistics are
checked against it:

- the root mean square of the difference: at most the tolerance;
- the largest difference: at most PEAK times the tolerance, or the tolerance relative to twice the largest logit if that
  is more, since rounding errors grow with the logit;
- the mean KL divergence: at most (tolerance * spread)^2. To second order the KL divergence of a logit difference d is
  half the variance of d, so this leaves a factor of two.

A mixture of experts is not smooth: where two experts are nearly as good, rounding may exchange them at a token, which
changes its logits by much more. A merge above the tolerance is therefore compared with what rounding does to this very
model: the weights under the adapter are moved by random errors of the dtype, about twice as large as those of a merge,
three times in a row. The statistics may be NOISE times the largest that this gives, and the KL divergence, which is
quadratic, NOISE squared times. A merge that leaves something out differs by more.

SAFETY is larger for float32 and float64. Their sums are rounded in the dtype itself, so the width of the model counts
as well as its depth, while bfloat16 and float16 matrix products accumulate in float32. Top-1 agreement is reported but
not checked, because near-ties flip. The effect of the adapter itself is measured as well: if rounding loses a large
share of it, the merge passes the test above but is useless.
"""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.errors import GuardStopped, ModelError, first_line, reading
from finetuning.export.inputs import Adapter, BaseModel
from finetuning.export.merge.image_probe import ImageProbe, image_probe
from finetuning.export.merge.with_peft import DeviceMap, load_adapter, load_base, merge_in_memory, task_head_for_merge

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from finetuning.model.load import TaskHead

# Suffixes of tensor names: B prompts, T tokens, V vocabulary, L labels of a sequence classification model.

_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Write one sentence about the sea.",
    "def add(a, b):\n    return a +",
    '{"name": "Ada", "born": 1815, "field": "',
    "1, 1, 2, 3, 5, 8, 13,",
    "Translate to German: Good morning, how are you?",
)
_MAX_TOKENS = 64


VERIFICATION_FILE = "merge_verification.json"
SAFETY = {"float64": 64.0, "float32": 64.0, "float16": 8.0, "bfloat16": 8.0}
PEAK = 8.0
NOISE = 2.0
_NUM_PERTURBATIONS = 3
_CHUNK = 1 << 22
EXACT_DTYPES = ("float32", "float64")
"""Dtypes in which the weights of an adapter are stored as well: a merge rounds nothing away."""
_UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class LogitDifference:
    """The difference between logits and reference logits. `rms_relative` is relative to the reference's spread."""

    max_logit_difference: float
    rms_relative: float
    mean_kl: float
    """In nats."""
    top1_agreement: float
    """Share of positions with the same most likely token."""

    def __str__(self) -> str:
        return (
            f"max logit difference {self.max_logit_difference:.2g}, KL {self.mean_kl:.2g},"
            f" top-1 agreement {self.top1_agreement:.1%}"
        )


@dataclass(frozen=True)
class MergeVerification:
    """The comparison of a merged model with its base and adapter: results and tolerances."""

    passed: bool
    dtype: str
    num_prompts: int
    num_positions: int
    """Number of tokens whose logits were compared; for sequence classification, the number of prompts."""
    merged_against_adapter: LogitDifference
    base_against_adapter: LogitDifference
    """The effect of the adapter: the scale for `merged_against_adapter`."""
    logit_spread: float
    tolerance: float
    max_allowed: dict[str, float]
    problems: tuple[str, ...]
    base_fingerprint: str
    surviving_share: float | None = None
    """The share of the elements changed by the adapter that survive rounding; None where they were not counted."""
    image: str | None = None
    """The image in one of the prompts, or why there is none; None for a model that takes text only."""
    rounding_noise: LogitDifference | None = None
    """What random rounding of the weights changes; None where it was not needed for the result."""
    trained_quantization: str | None = None
    """The method with which training quantized the base; None if it did not."""
    merged_against_trained: LogitDifference | None = None
    """Against the quantized base with its adapter, which is what was trained; None where that was not measured."""
    not_measured: str | None = None
    """Why that was not measured."""

    @property
    def rounding_loss(self) -> float:
        """The error of the merge as a share of the adapter's effect: near 1 if rounding cancels the adapter."""
        return self.merged_against_adapter.rms_relative / max(self.base_against_adapter.rms_relative, 1e-12)

    @property
    def differs_from_trained(self) -> bool:
        """Whether the merged model differs from the quantized one that was trained by more than the tolerance."""
        trained = self.merged_against_trained
        return trained is not None and not trained.rms_relative <= self.max_allowed["rms_relative"]

    def __str__(self) -> str:
        text = f"{self.merged_against_adapter} over {self.num_positions} positions in {self.dtype}"
        text += f", with {self.image}" if self.image else ""
        if self.merged_against_trained is not None:
            text += f"; against the base quantized by {self.trained_quantization}, as trained:"
            text += f" {self.merged_against_trained}"
        return text


def verify_merge(
    base: BaseModel,
    adapters: Sequence[Adapter],
    merged: Path,
    *,
    device_map: DeviceMap = None,
    base_fingerprint: str = "not recorded at training",
    surviving_share: float | None = None,
    num_rows: int | None = None,
    quantization: Mapping[str, object] | None = None,
    is_dequantized: bool = False,
) -> MergeVerification:
    """Compare the model in `merged` with base and adapters, and write the result there as merge_verification.json.

    The tolerance applies to the base that was merged into. A base that training quantized is compared as well: what
    was trained is the quantized base with its adapter.

    Args:
        quantization: how training quantized the base; None if it did not.
        is_dequantized: whether the model was merged into the dequantized base.
        surviving_share: the share of the elements changed by the adapters that survive rounding, to record.
        num_rows: rows of the merged input embeddings, if they are known; an adapter may have resized them.

    Raises:
        GuardStopped: the merged model differs from base and adapters by more than the tolerance of its dtype.
    """
    prompts = sample_prompts(merged, num_rows or int(base.text_config.get("vocab_size") or 256))
    head = task_head_for_merge(base, adapters)
    probe = None if "num_labels" in head.config_fields else image_probe(merged)
    outputs = compute_scores if "num_labels" in head.config_fields else _with_image(probe)
    load = partial(load_base, base, adapters, device_map=device_map)
    merged_into = partial(load, quantization=quantization if is_dequantized else None)
    model = merged_into()
    dtype = str(next(p for p in model.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    layers = max(int(base.text_config.get("num_hidden_layers") or base.text_config.get("n_layer") or 1), 1)
    adapted = _put_on(model, adapters)
    reference = outputs(adapted, prompts)
    with adapted.disable_adapter():
        without_adapter = outputs(adapted, prompts)
    # Frees the memory of the first model before the second is loaded.
    del adapted, model
    actual = outputs(_load_merged(merged, head, device_map), prompts)
    spread = _spread(reference)
    differences = compare(actual, reference, spread), compare(without_adapter, reference, spread)
    check = partial(
        _check_tolerances, *differences, dtype, layers, spread, reference, base_fingerprint, surviving_share
    )
    verification = replace(check(), image=probe.note if probe else None)
    if not verification.passed:
        adapted = _put_on(merged_into(), adapters)
        noise = _rounding_noise(adapted, lambda: outputs(adapted, prompts), reference, spread)
        verification = replace(check(rounding_noise=noise), image=verification.image)
    if quantization is not None:
        verification = replace(verification, trained_quantization=str(quantization.get("quant_method", "its method")))
        load_trained = partial(load, quantization=quantization, dequantize=False)
        trained = _compare_with_trained(load_trained, adapters, lambda peft: outputs(peft, prompts), actual, spread)
        verification = replace(verification, **trained)
    _publish(verification, merged)
    return verification


def _with_image(
    probe: ImageProbe | None,
) -> Callable[[PreTrainedModel | PeftModel, Sequence[Sequence[int]]], list[torch.Tensor]]:
    """Return `compute_logits`, with the logits of a prompt with an image after the others."""
    if probe is None:
        return compute_logits
    return lambda model, prompts: compute_logits(model, prompts) + probe.logits(model)


def _load_merged(folder: Path, head: TaskHead, device_map: DeviceMap) -> PreTrainedModel:
    from finetuning.model.saved_weights import restore_padding_rows

    model = head.auto_class.from_pretrained(folder, dtype="auto", device_map=device_map).eval()
    restore_padding_rows(model, folder)
    return model


def _spread(logits: Sequence[torch.Tensor]) -> float:
    """Return the root mean square of the logits of all positions, each position centered at 0."""
    import torch

    return torch.cat([(part - part.mean(-1, keepdim=True)).flatten() for part in logits]).square().mean().sqrt().item()


def _compare_with_trained(
    load: Callable[[], PreTrainedModel],
    adapters: Sequence[Adapter],
    compute: Callable[[PeftModel], list[torch.Tensor]],
    actual: Sequence[torch.Tensor],
    spread: float,
) -> dict[str, LogitDifference | str]:
    """Return fields of `MergeVerification`: the difference to the quantized base of training, or why it is unknown."""
    try:
        return {"merged_against_trained": compare(actual, compute(_put_on(load(), adapters)), spread)}
    except (ModelError, ImportError, RuntimeError, ValueError) as error:
        return {"not_measured": first_line(error)}


def _publish(verification: MergeVerification, merged: Path) -> None:
    """Write the result to merge_verification.json, and raise if the merge did not pass."""
    (merged / VERIFICATION_FILE).write_text(json.dumps(asdict(verification), indent=2) + "\n", encoding="utf-8")
    if not verification.passed:
        into_float32 = "" if verification.dtype in EXACT_DTYPES else " merge into a float32 base,"
        raise GuardStopped(
            f"the merged model differs from the trained model: {'; '.join(verification.problems)} ({verification}).",
            hint="Nothing was published. Check that the adapter was trained on this base,"
            f"{into_float32} or skip the check with --no-verify.",
        )


def _put_on(model: PreTrainedModel, adapters: Sequence[Adapter]) -> PeftModel:
    """Merge all adapters but the last one in memory, by PEFT. The last one stays unmerged as the reference."""
    return load_adapter(merge_in_memory(model, adapters[:-1]), adapters[-1])


def _rounding_noise(
    adapted: PeftModel, compute: Callable[[], list[torch.Tensor]], reference: Sequence[torch.Tensor], spread: float
) -> LogitDifference:
    """Return the largest statistics of what random rounding errors in the weights under an adapter change.

    Moves the weights: the model is of no other use afterwards.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    differences: list[LogitDifference] = []
    for _ in range(_NUM_PERTURBATIONS):
        for name, weight in adapted.named_parameters():
            if weight.is_floating_point() and "lora_" not in name:
                unit = torch.finfo(weight.dtype).eps / 2
                data = torch.atleast_1d(weight.data)
                for rows in data.split(max(_CHUNK * len(data) // max(data.numel(), 1), 1)):
                    errors = torch.rand(rows.shape, generator=generator).to(rows.device) * 2 - 1
                    # In float64, so that the product is rounded once.
                    rows.copy_(rows.double() * (1 + unit * errors))
        differences.append(compare(compute(), reference, spread))
    return LogitDifference(
        max_logit_difference=max(difference.max_logit_difference for difference in differences),
        rms_relative=max(difference.rms_relative for difference in differences),
        mean_kl=max(difference.mean_kl for difference in differences),
        top1_agreement=min(difference.top1_agreement for difference in differences),
    )


def sample_prompts(folder: Path, rows: int) -> list[list[int]]:
    """Return prompts as token ids below `rows`: texts encoded by the tokenizer in `folder`, and random ids.

    Random ids reach embedding rows that the texts do not.
    """
    generator = random.Random(0)
    prompts: list[list[int]] = []
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        from finetuning.templates import ChatRenderer

        with reading(f"the tokenizer of {folder} cannot be read"):
            tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(text)["input_ids"][:_MAX_TOKENS] for text in _TEXTS]
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": _TEXTS[1]}]
            with reading(f"the chat template of {folder} fails"):
                text = ChatRenderer(tokenizer).text(chat, prompt=True)
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"][:_MAX_TOKENS])
        prompts = [[token for token in ids if token < rows] for ids in prompts]
    prompts += [[generator.randrange(rows) for _ in range(_MAX_TOKENS)] for _ in range(2)]
    return [ids for ids in prompts if len(ids) > 1]


def compute_logits(model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return logits_TV of each prompt, in float32 on the CPU."""
    import torch

    from finetuning.model.embeddings import input_weight
    from finetuning.model.peft.adapters import base_model_of

    device = input_weight(model).device
    takes_cache = "use_cache" in inspect.signature(base_model_of(model).forward).parameters
    options = {"use_cache": False} if takes_cache else {}
    logits: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        for batch in _batches_by_length(prompts):
            width = max(len(prompts[index]) for index in batch)
            # Right padding is safe: with causal attention no token sees what follows it.
            ids = torch.tensor([[*prompts[index], *[0] * (width - len(prompts[index]))] for index in batch])
            mask = torch.tensor([[int(position < len(prompts[index])) for position in range(width)] for index in batch])
            logits_BTV = model(input_ids=ids.to(device), attention_mask=mask.to(device), **options).logits
            for row, index in enumerate(batch):
                logits[index] = logits_BTV[row, : len(prompts[index])].float().cpu()
    return [logits[index] for index in range(len(prompts))]


def compute_scores(model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return one tensor scores_LB in float32 on the CPU.

    The prompts take the place of the vocabulary: a reward model ranks texts, so what matters is how scores differ
    between them.
    """
    import torch

    from finetuning.model.embeddings import input_weight

    device = input_weight(model).device
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]
    return [torch.stack(rows, dim=1)]


def _batches_by_length(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield batches of prompt indices, in which no prompt is more than twice as long as another."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        if batch and len(prompts[index]) > 2 * len(prompts[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def compare(actual: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], spread: float) -> LogitDifference:
    """Return the difference of logits_TV from reference logits_TV, over all positions of all prompts."""
    import torch

    squares = [(logits - ref).square() for logits, ref in zip(actual, reference, strict=True)]
    kl = [_kl(logits, ref) for logits, ref in zip(actual, reference, strict=True)]
    same = [logits.argmax(-1) == ref.argmax(-1) for logits, ref in zip(actual, reference, strict=True)]
    return LogitDifference(
        max_logit_difference=max(square.max().item() for square in squares) ** 0.5,
        rms_relative=torch.cat([s.flatten() for s in squares]).mean().item() ** 0.5 / max(spread, 1e-12),
        mean_kl=max(torch.cat(kl).mean().item(), 0.0),
        top1_agreement=torch.cat(same).float().mean().item(),
    )


def _kl(actual_TV: torch.Tensor, reference_TV: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || actual) at each position, in nats.

    In float64: between nearly equal distributions the terms cancel to about 1e-7 in float32, more than the result.
    """
    log_reference, log_actual = reference_TV.double().log_softmax(-1), actual_TV.double().log_softmax(-1)
    return (log_reference.exp() * (log_reference - log_actual)).sum(-1)


def logit_tolerance(dtype: str, layers: int) -> float:
    """Return the relative logit difference that rounding to `dtype` may cause; see the module docstring."""
    dtype = dtype if dtype in SAFETY else "bfloat16"
    return SAFETY[dtype] * _UNIT_ROUNDOFF[dtype] * math.sqrt(layers)


def check_free_memory(base: BaseModel) -> None:
    """Raise ModelError if verification needs more main memory than is available. Linux only."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return
    # The model, a second copy of its largest layers while it is loaded, and the libraries.
    needed = int(base.num_bytes * 1.2) + (1 << 30)
    if needed > available:
        raise ModelError(
            f"verifying the merge runs the model, which needs about {needed / 1e9:.0f} GB of memory;"
            f" {available / 1e9:.0f} GB are available.",
            hint="The merge itself needs far less memory: skip the check with --no-verify.",
        )


def _check_tolerances(
    difference: LogitDifference,
    effect: LogitDifference,
    dtype: str,
    layers: int,
    spread: float,
    reference: Sequence[torch.Tensor],
    base_fingerprint: str,
    surviving_share: float | None,
    rounding_noise: LogitDifference | None = None,
) -> MergeVerification:
    tolerance = logit_tolerance(dtype, layers)
    largest = max((logits - logits.mean(-1, keepdim=True)).abs().max().item() for logits in reference)
    allowed = {
        "max_logit_difference": tolerance * max(PEAK * spread, 2 * largest),
        "rms_relative": tolerance,
        "mean_kl": (tolerance * spread) ** 2,
    }
    source = f"the tolerance {{:.3g}} for {dtype}"
    if rounding_noise is not None:
        measured = asdict(rounding_noise)
        factors = {name: NOISE**2 if name == "mean_kl" else NOISE for name in allowed}
        allowed = {name: max(limit, factors[name] * measured[name]) for name, limit in allowed.items()}
        source += ", rounding noise measured on this model included"
    values = asdict(difference)
    problems = [
        f"{name} is {values[name]:.3g}, above {source.format(limit)}"
        for name, limit in allowed.items()
        if not values[name] <= limit
    ]
    return MergeVerification(
        passed=not problems,
        dtype=dtype,
        num_prompts=len(reference),
        num_positions=sum(len(logits) for logits in reference),
        merged_against_adapter=difference,
        base_against_adapter=effect,
        logit_spread=spread,
        tolerance=tolerance,
        max_allowed=allowed,
        problems=tuple(problems),
        base_fingerprint=base_fingerprint,
        surviving_share=surviving_share,
        rounding_noise=rounding_noise,
    )
