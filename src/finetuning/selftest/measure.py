"""What the self-test does inside a run: measurements on its loaded model, and a simulated out-of-memory error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuning.selftest.checks import largest

if TYPE_CHECKING:
    from finetuning.model.tokenizer import LoadedTokenizer
    from finetuning.training.setup import LoadedModel

_ROWS = 8
_NEW_TOKENS = 32


@dataclass(frozen=True)
class Setup:
    """The parts of a run that a measurement uses."""

    loaded: LoadedModel
    rows: Sequence[dict[str, Any]]
    """The first rows of the training data, or the first packs."""
    tokenizer: LoadedTokenizer
    experiment: Any
    autocast: Callable[[], AbstractContextManager[object]]

    @property
    def device(self) -> torch.device:
        return next(self.loaded.model.parameters()).device


def set_up(method: str, config: str, overrides: Sequence[str]) -> Setup:
    """Load what a run of the config would load, up to its trainer."""
    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.distributed import ProcessTopology
    from finetuning.plan.attention import replace_unavailable_attention
    from finetuning.plan.plan import make_plan
    from finetuning.training import setup
    from finetuning.training.run import set_seed

    algorithm = ALGORITHMS[method]
    validated = validate(apply_overrides(read_document(config), overrides), algorithm.experiment)
    experiment, _ = replace_unavailable_attention(validated.experiment)
    # The plan of one process: the trials around this measurement checked the real one.
    topology = ProcessTopology()
    tokenizer = setup.load_tokenizer(experiment)
    data = setup.prepare(experiment, algorithm, tokenizer, workers=1)
    plan = make_plan(experiment, topology).with_steps(experiment, data.rows)
    arguments = setup.build_arguments(experiment, plan)
    set_seed(arguments.seed, experiment.run_conf.determinism)
    loaded = setup.load_model(experiment, algorithm, tokenizer, arguments, topology, plan.num_steps)
    model: Any = loaded.model
    model.to(arguments.device).eval()
    rows = [dict(row) for row in islice(cast("Iterable[Mapping[str, Any]]", data.train), _ROWS)]
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(arguments.device.type, dtype) if dtype else nullcontext()

    return Setup(loaded, rows, tokenizer, experiment, autocast)


def measure_layouts(setup: Setup) -> tuple[float | None, str]:
    """Return the largest difference of a row's mean loss alone from that in a padded batch and in a pack.

    The rows are the first of the training data, of different lengths.
    """
    from finetuning.data.collators import FlatteningCollator, PaddingCollator

    rows = _unpacked(setup.rows) if setup.experiment.sft_args.packing else setup.rows[:_ROWS]
    padding = PaddingCollator.for_tokenizer(setup.tokenizer.tokenizer, setup.tokenizer.pad_input_id)
    alone = [_row_losses(setup, padding([row]), [len(row["input_ids"])])[0] for row in rows]
    lengths = [len(row["input_ids"]) for row in rows]
    results = {"padded": _row_losses(setup, padding(rows), lengths)}
    if not setup.loaded.layout.padded:
        packed = {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            "labels": [label for row in rows for label in row["labels"]],
            "lengths": lengths,
        }
        results["padding-free"] = _row_losses(setup, FlatteningCollator()(rows), lengths)
        results["packed"] = _row_losses(setup, FlatteningCollator()([packed]), lengths)
    differences = {
        name: largest(abs(a - b) / max(1.0, a, b) for a, b in zip(alone, losses, strict=True))
        for name, losses in results.items()
    }
    reason = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    return largest(differences.values()), reason if len(results) > 1 else f"{reason}; this run only pads"


def _unpacked(packs: Iterable[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
    """Return the rows of the first packs."""
    rows: list[dict[str, list[int]]] = []
    for pack in packs:
        start = 0
        for length in pack["lengths"]:
            part = slice(start, start + length)
            rows.append({"input_ids": list(pack["input_ids"][part]), "labels": list(pack["labels"][part])})
            start += length
        if len(rows) >= _ROWS:
            break
    return rows[:_ROWS]


def _row_losses(setup: Setup, batch: Mapping[str, Any], lengths: Sequence[int]) -> list[float]:
    """Return the mean loss of each row of a batch; 0 for a row without labels."""
    targets = batch["shift_labels"].to(setup.device)
    inputs = {
        name: value.to(setup.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in ("labels", "shift_labels", "pack_borders", "label_positions", "num_labels")
    }
    with torch.no_grad(), setup.autocast():
        logits = setup.loaded.model(**inputs, use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    if len(losses) == len(lengths):
        rows = [(losses[row], targets[row]) for row in range(len(lengths))]
    else:
        rows = list(zip(losses[0].split(list(lengths)), targets[0].split(list(lengths)), strict=True))
    return [(loss.sum() / target.ne(-100).sum().clamp(min=1)).item() for loss, target in rows]


def measure_sampling(setup: Setup) -> tuple[float | None, str]:
    """Return the largest difference of the log probability of a token when it is sampled and in a training forward.

    Sampling uses the key-value cache and one token at a time, training a whole sequence.
    """
    if setup.experiment.training_args.model_extra and setup.experiment.training_args.model_extra.get("use_vllm"):
        return None, "vLLM samples in a server of its own"
    model: Any = setup.loaded.model
    ids = torch.tensor([setup.rows[0]["prompt_ids"]], device=setup.device)
    with torch.no_grad(), setup.autocast():
        output: Any = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=_NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=setup.tokenizer.tokenizer.pad_token_id,
        )
        logits = model(input_ids=output.sequences, use_cache=False).logits[0, ids.shape[1] - 1 : -1].float()
    sampled = torch.stack(output.logits)[:, 0].float()
    tokens = output.sequences[0, ids.shape[1] :, None]
    difference = sampled.log_softmax(-1).gather(1, tokens) - logits.log_softmax(-1).gather(1, tokens)
    return difference.abs().max().item(), f"{len(tokens)} tokens"


MEASUREMENTS = {"layouts": measure_layouts, "sampling": measure_sampling}


class OutOfMemoryOnce(TrainerCallback):
    """Raise the out-of-memory error of torch in the first forward pass of a step, by a hook on the model."""

    def __init__(self, step: int = 2):
        self._step = step
        self._armed = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        assert model is not None
        model.register_forward_pre_hook(self._raise_if_armed)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._armed = state.global_step + 1 == self._step

    def _raise_if_armed(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        if self._armed:
            self._armed = False
            raise torch.OutOfMemoryError("out of memory, simulated by the self-test")
