"""EVA: a LoRA that begins in the directions in which the rows' activations vary most.

AdaLoRA: rank moves to where it matters, after each optimizer step and the same way in a run that goes on.

LoRA+: the B matrices of LoRA learn at a rate of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from finetuning.data.collators import UNTRAINED
from finetuning.errors import Location, ModelError

_INIT = "eva"
_MOST_PASSES = 20


def init_eva(model: Any, rows: Iterable[dict[str, Any]], collate: Any, rows_at_once: int) -> None:
    """Sets the A matrices of a LoRA that asks for it; nothing for other models.

    Rows are read in their order until the directions stay what they are (`eva_config.tau`), so that a run that goes on
    begins from the same ranks. B stays zero: the model is the base until the first step. Source: arXiv 2410.07170.

    Raises:
        ModelError: the rows are too few to tell, or the directions never settle.
    """
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "init_lora_weights", None) != _INIT:
        return
    from peft import initialize_lora_eva_weights

    device = next(model.parameters()).device
    was_training = model.training
    ranks = (config.r, *config.rank_pattern.values())

    def placed(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: value.to(device) if hasattr(value, "to") else value for name, value in collate(batch).items()}

    try:
        initialize_lora_eva_weights(
            model.eval(),
            _Batches(rows, placed, rows_at_once, math.ceil(max(ranks) * config.eva_config.rho)),
            forward_fn=_forward,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    except (ValueError, RuntimeError) as error:
        text = f"EVA finds no beginning in these rows: {str(error).partition(chr(10))[0]}"
        raise ModelError(text, place=Location(key="peft_conf.peft_kwargs.init_lora_weights")) from error
    finally:
        model.train(was_training)


class _Batches:
    """Batches with enough trained tokens to tell so many directions, over a limited number of passes: PEFT would go on
    for ever where a batch is too small, or the directions do not settle."""

    def __init__(self, rows: Iterable[dict[str, Any]], collate: Callable[..., Any], at_once: int, directions: int):
        self._rows, self._collate, self._at_once, self._directions = rows, collate, at_once, directions

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(_MOST_PASSES):
            found = 0
            for batch in self._one_pass():
                found += 1
                yield batch
            if not found:
                raise ValueError(f"they have fewer than {self._directions} trained tokens, as many as directions")
        raise ValueError(f"in {_MOST_PASSES} passes the {self._directions} directions did not settle; lower r or rho")

    def _one_pass(self) -> Iterator[dict[str, Any]]:
        waiting: list[dict[str, Any]] = []
        tokens = 0
        for row in self._rows:
            waiting.append(row)
            # The first token of a row is no target.
            tokens += sum(label != UNTRAINED for label in row["labels"][1:])
            if len(waiting) >= self._at_once and tokens >= self._directions:
                yield self._collate(waiting)
                waiting, tokens = [], 0


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**{name: value for name, value in inputs.items() if "labels" not in name}, use_cache=False)


FILE_NAME = "adalora_importance.safetensors"
_KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_PATTERN = "rank_pattern"


class RankAllocationCallback(TrainerCallback):
    """Lets PEFT weigh and mask the ranks, while the gradients of the step are still there."""

    def __init__(self, model: Any) -> None:
        self._model = model.base_model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._model.update_and_allocate(state.global_step)


def is_adalora(model: Any) -> bool:
    """Whether the model wears an AdaLoRA adapter."""
    return hasattr(getattr(model, "base_model", None), "rankallocator")


@contextmanager
def ranks_kept_whole(model: Any) -> Iterator[None]:
    """Within it, the adapter is saved with all its ranks, the masked ones zero: cut to shape, as PEFT saves it, it
    could not be trained on by the optimizer's states."""
    if not is_adalora(model):
        yield
        return
    config = model.active_peft_config
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def write_importance(model: Any, folder: Path) -> None:
    """What has been learned of the ranks, beside the adapter; nothing for other models."""
    if not is_adalora(model):
        return
    allocator = model.base_model.rankallocator
    tensors = {
        f"{kind}:{name}": tensor.detach().cpu().contiguous()
        for kind in _KINDS
        for name, tensor in getattr(allocator, kind).items()
    }
    pattern = model.active_peft_config.rank_pattern
    save_file(tensors, folder / FILE_NAME, metadata={_PATTERN: json.dumps(pattern)})


def read_importance(model: Any, folder: Path) -> None:
    """Puts back what `write_importance` wrote; nothing where it wrote nothing."""
    file = folder / FILE_NAME
    if not file.is_file() or not is_adalora(model):
        return
    allocator = model.base_model.rankallocator
    weights = dict(model.base_model.model.named_parameters())
    allocator.reset_ipt()
    with safe_open(file, framework="pt") as stream:
        for key in stream.keys():  # noqa: SIM118  safe_open is no dict
            kind, _, name = key.partition(":")
            device = weights[name].device if name in weights else None
            getattr(allocator, kind)[name] = stream.get_tensor(key).to(device)
        model.active_peft_config.rank_pattern = json.loads(stream.metadata()[_PATTERN])


_B = (".lora_B.", ".lora_embedding_B.")


class LoraPlusMixin:
    """Stands left of a transformers Trainer. Without a ratio the optimizer is the Trainer's own.

    PEFT's `create_loraplus_optimizer` is not used: it gives the higher rate to biases and norms as well, and a fixed
    one to embeddings. Source: Hayou et al., LoRA+, 2024.
    """

    loraplus_lr_ratio: float | None = None
    """The learning rate of the B matrices over that of all else."""

    def create_optimizer(self, model: Any = None) -> Any:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.loraplus_lr_ratio is not None:
            named = (self.model if model is None else model).named_parameters()
            chosen = {id(weight) for name, weight in named if any(part in name for part in _B)}
            _set_apart(optimizer, chosen, self.loraplus_lr_ratio)
        return optimizer


def _set_apart(optimizer: Any, chosen: set[int], ratio: float) -> None:
    """Moves the chosen weights of each group into a group of their own, with its settings and a higher rate."""
    for group in list(optimizer.param_groups):
        fast = [weight for weight in group["params"] if id(weight) in chosen]
        if not fast:
            continue
        settings = {key: value for key, value in group.items() if key != "params"}
        group["params"] = [weight for weight in group["params"] if id(weight) not in chosen]
        optimizer.add_param_group({**settings, "params": fast, "lr": settings["lr"] * ratio})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
