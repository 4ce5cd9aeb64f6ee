"""The proof of a merge: the merged model against base and adapter, on the same prompts, in the dtype that was saved.

The tolerance. Rounding a merged weight to a dtype of unit roundoff u moves it by up to u of itself, at random, and the
unmerged model rounds its activations as much; both grow like the square root of the number of layers. So the logits may
differ by `tolerance = SAFETY * u * sqrt(layers)` of their own spread (root mean square around each position's mean):
root mean square of the difference at most that, its largest value at most PEAK times that (or that share of twice the
largest logit, whose error grows with it), and the mean KL divergence at most the square of it in logits, which is twice
what such a random difference costs. SAFETY is larger for float32 and float64, whose sums round in the type itself, so
that the width of the model counts as well as its depth; the halves sum in float32. Top-1 agreement is told, not judged:
near ties flip. What the adapter itself changes is measured too, so that a merge which loses it is seen.

Sample prompts, and what a model says to each of their tokens: what two models are compared by."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.errors import GuardStopped, ModelError
from finetuning.export.inputs import Adapter, BaseModel
from finetuning.export.merge.with_peft import DeviceMap, load_adapter, load_base, merge_in_memory, task_head_for_merge

if TYPE_CHECKING:
    import torch

# B prompts, T tokens, V vocabulary, L labels of a model that scores

_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Write one sentence about the sea.",
    "def add(a, b):\n    return a +",
    '{"name": "Ada", "born": 1815, "field": "',
    "1, 1, 2, 3, 5, 8, 13,",
    "Translate to German: Good morning, how are you?",
)
_MAX_TOKENS = 64


def sample_prompts(folder: Path, rows: int) -> list[list[int]]:
    """Texts as the tokenizer in `folder` encodes them, in ids below `rows`, and ids at random, which reach rows that
    no text of ours does."""
    draw = random.Random(0)
    prompts: list[list[int]] = []
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(text)["input_ids"][:_MAX_TOKENS] for text in _TEXTS]
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": _TEXTS[1]}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"][:_MAX_TOKENS])
        prompts = [[token for token in ids if token < rows] for ids in prompts]
    prompts += [[draw.randrange(rows) for _ in range(_MAX_TOKENS)] for _ in range(2)]
    return [ids for ids in prompts if len(ids) > 1]


def compute_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits_TV in float32 of each prompt, in order."""
    import torch

    device = model.get_input_embeddings().weight.device
    found: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        for batch in _of_like_length(prompts):
            width = max(len(prompts[index]) for index in batch)
            # Padding stands on the right, where no token before it looks.
            ids = torch.tensor([[*prompts[index], *[0] * (width - len(prompts[index]))] for index in batch])
            mask = torch.tensor([[int(at < len(prompts[index])) for at in range(width)] for index in batch])
            logits_BTV = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            for row, index in enumerate(batch):
                found[index] = logits_BTV[row, : len(prompts[index])].float().cpu()
    return [found[index] for index in range(len(prompts))]


def compute_scores(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """One tensor scores_LB in float32: the prompts take the place of the vocabulary, as a score ranks them."""
    import torch

    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]
    return [torch.stack(rows, dim=1)]


def _of_like_length(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indexes of prompts that go through the model together: none is more than twice as long as another."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        if batch and len(prompts[index]) > 2 * len(prompts[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


# T tokens, V vocabulary

VERIFICATION_FILE = "merge_certificate.json"
SAFETY = {"float64": 64.0, "float32": 64.0, "float16": 8.0, "bfloat16": 8.0}
PEAK = 8.0
_UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class LogitDifference:
    """How far one set of logits is from a reference. Logits in nats; `relative` is of the reference's spread."""

    max_logit_difference: float
    rms_relative: float
    mean_kl: float
    top1_agreement: float


@dataclass(frozen=True)
class MergeVerification:
    """What was compared, what came out, and what was allowed."""

    passed: bool
    dtype: str
    num_prompts: int
    num_positions: int
    """Tokens whose logits were compared; of a model that scores, the prompts' scores."""
    merged_against_adapter: LogitDifference
    base_against_adapter: LogitDifference
    """What the adapter changes: the measure of the difference above."""
    logit_spread: float
    tolerance: float
    max_allowed: dict[str, float]
    problems: tuple[str, ...]
    base_fingerprint: str

    @property
    def lost_share(self) -> float:
        """The difference as a share of what the adapter changes: near 1 where rounding swallowed the adapter."""
        return self.merged_against_adapter.rms_relative / max(self.base_against_adapter.rms_relative, 1e-12)

    def __str__(self) -> str:
        found = self.merged_against_adapter
        return (
            f"max logit difference {found.max_logit_difference:.2g}, KL {found.mean_kl:.2g},"
            f" top-1 agreement {found.top1_agreement:.1%} over {self.num_positions} positions in {self.dtype}"
        )


def verify_merge(
    base: BaseModel,
    adapters: Sequence[Adapter],
    merged: Path,
    *,
    device_map: DeviceMap = None,
    base_fingerprint: str = "not recorded at training",
    num_rows: int | None = None,
) -> MergeVerification:
    """The certificate of the model in `merged`, also written there as merge_certificate.json.

    `num_rows`: rows of the merged input embeddings, which an adapter may have grown.

    Raises:
        GuardStopped: the merged model differs from base and adapter beyond the tolerance of its dtype.
    """
    import torch

    prompts = sample_prompts(merged, num_rows or int(base.text_config.get("vocab_size") or 256))
    head = task_head_for_merge(base, adapters)
    outputs = compute_scores if "num_labels" in head.config_fields else compute_logits
    model = load_base(base, adapters, device_map=device_map)
    dtype = str(next(p for p in model.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    layers = max(int(base.text_config.get("num_hidden_layers") or base.text_config.get("n_layer") or 1), 1)
    tuned = load_adapter(merge_in_memory(model, adapters[:-1]), adapters[-1])
    reference = outputs(tuned, prompts)
    with tuned.disable_adapter():
        untuned = outputs(tuned, prompts)
    del tuned, model
    again = head.auto_class.from_pretrained(merged, dtype="auto", device_map=device_map).eval()
    found = outputs(again, prompts)
    spread = (
        torch.cat([(ref - ref.mean(-1, keepdim=True)).flatten() for ref in reference]).square().mean().sqrt().item()
    )
    certificate = _judge(
        compare(found, reference, spread),
        compare(untuned, reference, spread),
        dtype,
        layers,
        spread,
        reference,
        base_fingerprint,
    )
    (merged / VERIFICATION_FILE).write_text(json.dumps(asdict(certificate), indent=2) + "\n", encoding="utf-8")
    if not certificate.passed:
        raise GuardStopped(
            f"the merged model is not the model that was trained: {'; '.join(certificate.problems)} ({certificate}).",
            hint="Nothing was published. Check that this base is the one the adapter was trained on, merge into a base"
            " of float32, or say --no-verify.",
        )
    return certificate


def compare(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], spread: float) -> LogitDifference:
    """The difference of logits_TV from reference logits_TV, over all positions of all prompts."""
    import torch

    squares = [(mine - ref).square() for mine, ref in zip(found, reference, strict=True)]
    kl = [_kl(mine, ref) for mine, ref in zip(found, reference, strict=True)]
    same = [mine.argmax(-1) == ref.argmax(-1) for mine, ref in zip(found, reference, strict=True)]
    return LogitDifference(
        max_logit_difference=max(square.max().item() for square in squares) ** 0.5,
        rms_relative=torch.cat([s.flatten() for s in squares]).mean().item() ** 0.5 / max(spread, 1e-12),
        mean_kl=max(torch.cat(kl).mean().item(), 0.0),
        top1_agreement=torch.cat(same).float().mean().item(),
    )


def _kl(found: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL divergence of the found distribution from the reference at each position, in float64: it is tiny."""
    log_reference, log_found = reference.double().log_softmax(-1), found.double().log_softmax(-1)
    return (log_reference.exp() * (log_reference - log_found)).sum(-1)


def logit_tolerance(dtype: str, layers: int) -> float:
    """The relative logit difference that rounding to a dtype may cause in a model of so many layers."""
    dtype = dtype if dtype in SAFETY else "bfloat16"
    return SAFETY[dtype] * _UNIT_ROUNDOFF[dtype] * math.sqrt(layers)


def check_free_memory(base: BaseModel) -> None:
    """Nothing, or a ModelError when the comparison would not fit into this machine's memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return
    # The model, its largest layers once more while it is loaded, and the libraries.
    needed = int(base.num_bytes * 1.2) + (1 << 30)
    if needed > available:
        raise ModelError(
            f"to verify the merge the model must run once, which needs about {needed / 1e9:.0f} GB of memory;"
            f" {available / 1e9:.0f} GB are free.",
            hint="The merge itself needs far less: say --no-verify to do without.",
        )


def _judge(
    found: LogitDifference,
    effect: LogitDifference,
    dtype: str,
    layers: int,
    spread: float,
    reference: Sequence[torch.Tensor],
    base_fingerprint: str,
) -> MergeVerification:
    tolerance = logit_tolerance(dtype, layers)
    largest = max((logits - logits.mean(-1, keepdim=True)).abs().max().item() for logits in reference)
    allowed = {
        "max_logit_difference": tolerance * max(PEAK * spread, 2 * largest),
        "rms_relative": tolerance,
        "mean_kl": (tolerance * spread) ** 2,
    }
    values = asdict(found)
    problems = [
        f"{name} is {values[name]:.3g} and may be {limit:.3g} in {dtype}"
        for name, limit in allowed.items()
        if not values[name] <= limit
    ]
    return MergeVerification(
        passed=not problems,
        dtype=dtype,
        num_prompts=len(reference),
        num_positions=sum(len(logits) for logits in reference),
        merged_against_adapter=found,
        base_against_adapter=effect,
        logit_spread=spread,
        tolerance=tolerance,
        max_allowed=allowed,
        problems=tuple(problems),
        base_fingerprint=base_fingerprint,
    )
