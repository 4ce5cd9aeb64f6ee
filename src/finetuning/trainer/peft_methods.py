"""PEFT methods that need more than an adapter: EVA, AdaLoRA, LoRA+, and adapter state that PEFT does not save."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuning.data.collators import UNTRAINED
from finetuning.errors import Location, ModelError
from finetuning.model.safetensors_io import read_header
from finetuning.model.saved_weights import compare_tensors

if TYPE_CHECKING:
    from torch import nn

Row: TypeAlias = dict[str, Sequence[int]]
Collate: TypeAlias = Callable[[list[Row]], Mapping[str, object]]


_MAX_EPOCHS = 20


@contextmanager
def without_input_casts(model: nn.Module) -> Iterator[None]:
    """Leave the input of LoRA layers in its dtype in the block, which has to run under autocast.

    PEFT casts it to that of the adapter, float32, and autocast casts the result back: the product is the same, and two
    copies of the input are saved. Layers with dropout and variants, such as DoRA, compute more than a product with it.
    """
    layers = [module for module in model.modules() if _is_plain_lora(module)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True  # pyright: ignore[reportArgumentType]


def _is_plain_lora(module: nn.Module) -> bool:
    dropouts: Mapping[str, object] = getattr(module, "lora_dropout", {})
    return (
        getattr(module, "cast_input_dtype_enabled", False)
        and bool(getattr(module, "lora_A", None))
        and not getattr(module, "lora_variant", None)
        and all(type(dropout) is torch.nn.Identity for dropout in dropouts.values())
    )


def restore_adapter_dtype(model: nn.Module) -> None:
    """Hold the adapter of a quantized model in float32, as without TRL, whose trainers round it to bfloat16.

    Its 8 significant bits lose changes below 1/512 of a weight, which those of preference optimization are.
    """
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype == torch.bfloat16:
            weight.data = weight.data.float()


def init_eva(model: nn.Module, rows: Iterable[Row], collate: Collate, batch_size: int) -> None:
    """Set the A matrices of LoRA with `init_lora_weights: eva`; do nothing for other models.

    Reads rows in order until the directions converge (`eva_config.tau`), so a resumed run starts with the same ranks.
    B stays zero: the model equals the base model until the first step. Source: arXiv 2410.07170.

    Raises:
        ModelError: there are too few rows, or the directions do not converge.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or getattr(config, "init_lora_weights", None) != "eva":
        return
    from peft import initialize_lora_eva_weights

    device = next(model.parameters()).device
    was_training = model.training
    ranks = (config.r, *config.rank_pattern.values())

    def collate_on_device(batch: list[Row]) -> dict[str, object]:
        return {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in collate(batch).items()
        }

    try:
        initialize_lora_eva_weights(
            model.eval(),
            _EvaBatches(rows, collate_on_device, batch_size, math.ceil(max(ranks) * config.eva_config.rho)),
            forward_fn=_forward,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    except (ValueError, RuntimeError) as error:
        text = f"EVA initialization failed: {str(error).partition(chr(10))[0]}"
        raise ModelError(text, location=Location(key="peft_conf.peft_kwargs.init_lora_weights")) from error
    finally:
        model.train(was_training)


class _EvaBatches:
    """Batches with enough trained tokens for the number of directions, over a limited number of epochs.

    PEFT would loop forever where a batch is too small or the directions do not converge.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        collate: Collate,
        batch_size: int,
        num_directions: int,
    ):
        self._rows, self._collate, self._batch_size, self._num_directions = rows, collate, batch_size, num_directions

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Mapping[str, object]]:
        for _ in range(_MAX_EPOCHS):
            num_batches = 0
            for batch in self._epoch():
                num_batches += 1
                yield batch
            if not num_batches:
                raise ValueError(f"the rows have fewer trained tokens than directions ({self._num_directions})")
        raise ValueError(
            f"the {self._num_directions} directions did not converge in {_MAX_EPOCHS} epochs; lower r or rho"
        )

    def _epoch(self) -> Iterator[Mapping[str, object]]:
        batch: list[Row] = []
        num_tokens = 0
        for row in self._rows:
            batch.append(row)
            # The first token of a row is not predicted.
            num_tokens += sum(label != UNTRAINED for label in row["labels"][1:])
            if len(batch) >= self._batch_size and num_tokens >= self._num_directions:
                yield self._collate(batch)
                batch, num_tokens = [], 0


def _forward(model: nn.Module, inputs: Mapping[str, object]) -> object:
    return model(**{name: value for name, value in inputs.items() if "labels" not in name}, use_cache=False)


ADALORA_STATE_NAME = "adalora_importance.safetensors"
_IMPORTANCE_KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_RANK_PATTERN = "rank_pattern"


class RankAllocationCallback(TrainerCallback):
    """Let PEFT update rank importance and mask ranks while the gradients of the step still exist."""

    def __init__(self, model: Any) -> None:
        self._model = model.base_model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._model.update_and_allocate(state.global_step)


def is_adalora(model: nn.Module) -> bool:
    """Return whether the model has an AdaLoRA adapter."""
    return hasattr(getattr(model, "base_model", None), "rankallocator")


@contextmanager
def keep_all_ranks(model: Any) -> Iterator[None]:
    """Save an AdaLoRA adapter with all its ranks in the block, masked ones as zeros.

    PEFT would cut masked ranks off, and the optimizer states of the checkpoint would no longer fit.
    """
    if not is_adalora(model):
        yield
        return
    config = model.active_peft_config
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def _importance(model: Any) -> dict[str, torch.Tensor]:
    allocator = model.base_model.rankallocator
    return {
        f"{kind}:{name}": tensor.detach().cpu().contiguous()
        for kind in _IMPORTANCE_KINDS
        for name, tensor in getattr(allocator, kind).items()
    }


def _read_importance(model: Any, folder: Path) -> None:
    file = folder / ADALORA_STATE_NAME
    if not file.is_file():
        return
    allocator = model.base_model.rankallocator
    weights = dict(model.base_model.model.named_parameters())
    allocator.reset_ipt()
    with safe_open(file, framework="pt") as stream:
        for key in stream.keys():  # noqa: SIM118  safe_open is not a mapping
            kind, _, name = key.partition(":")
            device = weights[name].device if name in weights else None
            getattr(allocator, kind)[name] = stream.get_tensor(key).to(device)
        model.active_peft_config.rank_pattern = json.loads(stream.metadata()[_RANK_PATTERN])


PROMPT_ENCODER_NAME = "prompt_encoder.safetensors"


def _prompt_encoder_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if "prompt_encoder." in name}


def _adapter_state(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Return the state of AdaLoRA and of prompt encoders that PEFT does not save, by file name."""
    encoder = {name: weight.detach().cpu().clone() for name, weight in _prompt_encoder_weights(model).items()}
    state = {PROMPT_ENCODER_NAME: encoder} if encoder else {}
    return state | ({ADALORA_STATE_NAME: _importance(model)} if is_adalora(model) else {})


def _adapter_state_metadata(model: Any, name: str) -> dict[str, str] | None:
    if name != ADALORA_STATE_NAME:
        return None
    return {_RANK_PATTERN: json.dumps(model.active_peft_config.rank_pattern)}


def write_adapter_state(model: nn.Module, folder: Path) -> None:
    """Write the state of AdaLoRA and of prompt encoders that a resumed run needs, next to the adapter."""
    for name, tensors in _adapter_state(model).items():
        save_file(tensors, folder / name, metadata=_adapter_state_metadata(model, name))


def compare_adapter_state(model: nn.Module, folder: Path) -> list[str]:
    """Return how what `write_adapter_state` wrote differs from what is in memory; [] if it does not."""
    differences: list[str] = []
    for name, tensors in _adapter_state(model).items():
        try:
            differences += compare_tensors(tensors, read_header(folder / name))
        except ModelError as error:
            differences.append(str(error))
            continue
        with safe_open(folder / name, framework="pt") as stream:
            meant = _adapter_state_metadata(model, name)
            if meant is not None and stream.metadata() != meant:
                differences.append(f"{name}: its metadata is {stream.metadata()} instead of {meant}")
    return differences


def read_adapter_state(model: nn.Module, folder: Path) -> None:
    """Restore what `write_adapter_state` wrote into a checkpoint, if anything."""
    file = folder / PROMPT_ENCODER_NAME
    if file.is_file():
        weights = _prompt_encoder_weights(model)
        with torch.no_grad():
            for name, tensor in load_file(file).items():
                weights[name].copy_(tensor)
    if is_adalora(model):
        _read_importance(model, folder)


_B_MATRICES = (".lora_B.", ".lora_embedding_B.")


def set_loraplus_lr(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> None:
    """Give the LoRA B matrices `ratio` times the learning rate of their parameter group.

    PEFT's `create_loraplus_optimizer` is not used: it raises the rate of biases and norms as well, and sets a fixed
    rate for embeddings. Source: Hayou et al., "LoRA+", arXiv 2402.12354.
    """
    fast = {id(weight) for name, weight in model.named_parameters() if any(part in name for part in _B_MATRICES)}
    for group in list(optimizer.param_groups):
        weights: Sequence[nn.Parameter] = [weight for weight in group["params"] if id(weight) in fast]
        if not weights:
            continue
        settings = {key: value for key, value in group.items() if key != "params"}
        group["params"] = [weight for weight in group["params"] if id(weight) not in fast]
        optimizer.add_param_group({**settings, "params": weights, "lr": settings["lr"] * ratio})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
