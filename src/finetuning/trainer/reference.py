"""The reference of a preference trainer: complete, and equal to the policy before the first update."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from finetuning.errors import GuardStopped, InternalError
from finetuning.model.peft.adapter_files import is_peft_model
from finetuning.trainer import TrainerBase
from finetuning.trainer.initial_loss import ExpectedLoss, check_initial_loss
from finetuning.trainer.oom_retry import preserve_random_state

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger("finetuning")

_TRAINED_ADAPTER, _REFERENCE_ADAPTER = "default", "ref"
_MIN_TOLERANCE = 1e-4
_EPSILONS = 16
"""Units of the compute dtype's machine epsilon by which log-probabilities of equal models may differ."""
_EPS_TF32 = 2.0**-10


@dataclass(frozen=True)
class Difference:
    """The largest difference between log-probabilities of two models on the rows of a batch."""

    per_token: float
    """Relative to the log-probability of the token where that is above 1. NaN if any value is."""
    row: int
    num_rows: int

    def exceeds(self, tolerance: float) -> bool:
        return not self.per_token <= tolerance

    def __str__(self) -> str:
        return f"{self.per_token:.2g} per token in sequence {self.row + 1} of {self.num_rows}"


@dataclass(frozen=True)
class ModelCall:
    """What a model returned to the loss in one call."""

    log_probs: torch.Tensor
    """Log-probabilities per token, float32, (rows, tokens)."""
    router_loss: float | None
    """The load balancing loss of a mixture of experts, without its coefficient."""


def largest_difference(policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> Difference:
    """Return the largest difference over all rows.

    Args:
        policy: log-probabilities per token, (rows, tokens) each, 0 where a token is not part of the answer.
        reference: the same, or their sums, (rows,) each. Rounding errors of a sum grow with the square root of its
            number of terms.
    """
    differences: list[torch.Tensor] = []
    for ours, theirs in zip(policy, reference, strict=True):
        if theirs.dim() == 1:
            num_tokens = ours.ne(0).sum(-1).clamp(min=1)
            ours, scale = ours.sum(-1), (theirs.abs() / num_tokens).clamp(min=1) * num_tokens.sqrt()
            differences.append((ours - theirs).abs() / scale)
        else:
            # Prompt tuning puts virtual tokens before those of the row.
            length = min(ours.shape[-1], theirs.shape[-1])
            ours, theirs = ours[:, -length:], theirs[:, -length:]
            differences.append(((ours - theirs).abs() / theirs.abs().clamp(min=1)).amax(-1))
    rows = torch.cat(differences)
    worst = int(rows.nan_to_num(nan=torch.inf).argmax())
    return Difference(float(rows[worst]), worst, len(rows))


def tolerance_of(models: Sequence[nn.Module], mixed_precision: str | None = None) -> float:
    """Return the difference per token that rounding explains, for the coarsest dtype that the models compute in.

    Args:
        mixed_precision: the dtype of autocast, by accelerate's name.
    """
    weights = [weight for model in models for weight in model.parameters()]
    dtypes = {weight.dtype for weight in weights if weight.is_floating_point()}
    # Quantized weights are stored as integers, and dequantized to a smaller dtype.
    is_quantized = any(not weight.is_floating_point() for weight in weights)
    dtypes |= {torch.bfloat16} if mixed_precision == "bf16" or is_quantized else set()
    dtypes |= {torch.float16} if mixed_precision == "fp16" else set()
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    if any(weight.is_cuda for weight in weights) and torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, _EPS_TF32)
    return max(_MIN_TOLERANCE, _EPSILONS * eps)


class ReferenceMixin(TrainerBase):
    """Compare the log-probabilities of policy and reference before the first update.

    The comparison is made in evaluation mode, as dropout in the policy would make it differ from any reference.
    """

    ref_model: nn.Module | None
    """None when the model without its adapter, or with the adapter named `ref`, is the reference."""
    load_reference: Callable[[], PreTrainedModel] | None = None
    """Loads the model from its files, as it was before training."""
    reference_summary: str | None = None
    """What was compared, for the record of the run."""
    _metrics: Mapping[str, dict[str, list[float]]]
    _precompute_engine: nn.Module | None
    _num_compared = 0
    _largest_difference = 0.0
    _is_independence_checked = False

    if TYPE_CHECKING:

        def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset: ...

        def compute_ref_log_probs(
            self, model: nn.Module, inputs: Mapping[str, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    @contextmanager
    def evaluation_pass(self, model: nn.Module) -> Iterator[None]:
        """Compute in evaluation mode without gradients, and leave random state and metrics as they were."""
        metrics = {name: list(values) for name, values in self._metrics["eval"].items()}
        # Hooks are not called in graphs that were compiled before.
        eager = torch.compiler.set_stance("force_eager") if self.args.torch_compile else nullcontext()
        model.eval()
        try:
            with torch.no_grad(), preserve_random_state(self.args.device), eager:
                yield
        finally:
            model.train()
            self._metrics["eval"].clear()
            self._metrics["eval"].update(metrics)

    def compare_with_reference(
        self,
        policy: Sequence[torch.Tensor],
        reference: Sequence[torch.Tensor],
        recompute: Callable[[nn.Module], Sequence[torch.Tensor]],
    ) -> bool:
        """Return whether policy and reference agree, after a warning if they differ although the reference is right.

        Collective. A new adapter may change the outputs before it was trained, such as prompt tuning. The reference is
        then compared with the model in its files instead.

        Args:
            policy: log-probabilities per token, (rows, tokens) each.
            reference: the same, or their sums, (rows,) each.
            recompute: returns the log-probabilities that a model gives the same rows.

        Raises:
            GuardStopped: the reference is another model, or other tokens were compared.
        """
        models = [self.model, *([self.ref_model] if self.ref_model is not None else [])]
        tolerance = tolerance_of(models, self.accelerator.mixed_precision)
        difference = largest_difference(policy, reference)
        if not self._any_process(difference.exceeds(tolerance)):
            self._num_compared += difference.num_rows
            self._largest_difference = max(self._largest_difference, difference.per_token)
            self.reference_summary = (
                f"equals the policy before the first update: {self._num_compared} sequences, largest difference per"
                f" token {self._largest_difference:.2g} (tolerance {tolerance:.2g})"
            )
            return True
        text = f"before the first update the log-probabilities of policy and reference differ by {difference}"
        text += f" (tolerance {tolerance:.2g})"
        if not self._has_new_adapter() or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise GuardStopped(f"{text}: the reference is not the model that is trained.", hint=self._hint())
        assert self.load_reference is not None
        from_files = largest_difference(list(recompute(self.load_reference())), reference)
        if self._any_process(from_files.exceeds(tolerance)):
            raise GuardStopped(
                f"{text}: the reference is not the model that is trained. It differs from the model in its files by"
                f" {from_files}.",
                hint=self._hint(),
            )
        if self.reference_summary is None:
            logger.warning(
                "%s. The reference equals the model in its files; the new adapter changes the outputs before it is"
                " trained, so the initial loss is not checked.",
                text,
            )
        self.reference_summary = f"equals the model in its files; the new adapter changes the outputs by {difference}"
        return False

    def check_independence(
        self, reference: Sequence[torch.Tensor], recompute: Callable[[], tuple[Sequence[torch.Tensor], ...]]
    ) -> None:
        """Check that the reference stays as it is when the policy changes: once, with one trained tensor changed.

        A reference that is the policy itself, or an adapter that cannot be switched off, equals the policy before the
        first update and ever after, so that nothing holds the policy back. Collective.

        Args:
            reference: its log-probabilities per token, (rows, tokens) each.
            recompute: returns the log-probabilities of the policy and of the reference as they are now.

        Raises:
            GuardStopped: the reference depends on what is trained.
        """
        if self._is_independence_checked or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        self._is_independence_checked = True
        shared = _shared_memory(self.model, self.ref_model)
        with _changed(_most_effective(self.model)):
            now = recompute()[1]
        tolerance = tolerance_of([self.model], self.accelerator.mixed_precision)
        difference = largest_difference(now, reference)
        if self._any_process(bool(shared) or difference.exceeds(tolerance)):
            how = f"{shared} is shared by both" if shared else f"a changed policy moves it by {difference}"
            raise GuardStopped(
                f"the reference depends on the weights that are trained ({how}), so it would follow the policy.",
                hint="Report this as a bug.",
            )

    def _has_new_adapter(self) -> bool:
        """Return whether the reference is the model without the adapter that is trained."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return is_peft_model(model) and self.ref_model is None and _REFERENCE_ADAPTER not in model.peft_config

    def _hint(self) -> str:
        if self._has_new_adapter():
            return (
                "An adapter whose initialization changes the base model (such as PiSSA) needs NO_PEFT or another init."
            )
        if getattr(self, "precompute_ref_logps", False):
            return "Set training_args.precompute_ref_log_probs: false, and report this as a bug."
        return "Report this as a bug."

    def _any_process(self, condition: bool) -> bool:
        if self.args.world_size == 1:
            return condition
        return float(self.accelerator.reduce(torch.tensor(float(condition), device=self.args.device), "sum")) > 0


class ReferenceCheckMixin(ReferenceMixin):
    """Check the reference of TRL's DPO and KTO trainers. Its place is to the right of `TrainerMixin`.

    Every micro-batch before the first update is computed once more, by the trainer's own code. Hooks record the
    log-probabilities that it computes, so what is compared is what the loss is made of.
    """

    precompute_ref_logps: bool
    aux_loss_enabled: bool
    """Whether the loss contains the load balancing loss of the router of a mixture of experts."""
    router_aux_loss_coef: float
    _has_dropout_warning = False

    precomputed_columns: tuple[str, str]
    """The columns of the log-probabilities that `compute_ref_log_probs` returns, in its order."""

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Return the rows with the log-probabilities of the reference. Collective.

        TRL's first process writes them to a file next to that of the rows, which the others read. Where they may not
        see it, on other machines or for rows that are in no file, they keep what was gathered.
        """
        is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(self.args.world_size)
        if self.args.world_size == 1 or (is_one_machine and dataset.cache_files):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        import datasets
        from trl.models.utils import prepare_deepspeed

        if self.ref_model is None and self.is_deepspeed_enabled and self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        model = self.ref_model or self._precompute_engine or self.model
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)  # pyright: ignore[reportArgumentType]
        computed: list[list[torch.Tensor]] = []
        for batch in self.accelerator.prepare(loader):
            log_probs = self.compute_ref_log_probs(model, batch)
            gathered: Any = self.accelerator.gather_for_metrics([item for item in log_probs if item is not None])
            computed.append([item.cpu() for item in gathered])
        columns = zip(self.precomputed_columns, zip(*computed, strict=True), strict=False)
        values = {column: torch.cat(parts).numpy() for column, parts in columns}
        return datasets.concatenate_datasets([dataset, datasets.Dataset.from_dict(values)], axis=1)

    def expected_first_loss(self, inputs: Mapping[str, torch.Tensor]) -> ExpectedLoss | None:
        """Return the loss of a batch while the policy equals the reference; None where it is unknown."""
        raise NotImplementedError

    def precomputed_log_probs(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the sums of log-probabilities, (rows,) each, that were computed before training."""
        raise NotImplementedError

    def weigh_log_probs(self, log_probs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return log-probabilities, (rows, tokens), as they are summed."""
        return log_probs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        if self.state.global_step == 0 and self.model.training:
            self._check_before_update(model, inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _check_before_update(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        loss, calls = self._compute_and_record(model, inputs)
        if self.precompute_ref_logps:
            policy = [self.weigh_log_probs(call.log_probs, inputs) for call in calls]
            reference = self.precomputed_log_probs(inputs)
        else:
            calls, of_reference = _halves(calls)
            policy, reference = ([call.log_probs for call in half] for half in (calls, of_reference))
        are_equal = self.compare_with_reference(
            policy, reference, lambda fresh: self._log_probs_of(fresh, model, inputs)
        )
        if not self.precompute_ref_logps:

            def recompute() -> tuple[list[torch.Tensor], ...]:
                halves = _halves(self._compute_and_record(model, inputs)[1])
                return tuple([call.log_probs for call in half] for half in halves)

            self.check_independence(reference, recompute)
        expected = self.expected_first_loss(inputs)
        if are_equal and expected is not None:
            # KTO computes the divergence first. Its loss, like DPO's, is made of the last call of the policy.
            self._check_initial_loss(loss, expected, calls[-1].router_loss)
        if not self._has_dropout_warning and has_dropout(self.model):
            self._has_dropout_warning = True
            logger.warning(
                "dropout is active: while training, the policy differs from the reference by it. They were compared"
                " without. Set training_args.disable_dropout: true to train without."
            )

    def _check_initial_loss(self, loss: float, expected: ExpectedLoss, router_loss: float | None) -> None:
        """Compare the loss with its known value. TRL adds the router's loss, which is known for this batch as well.

        Raises:
            GuardStopped: they differ.
        """
        if self.aux_loss_enabled and router_loss is not None:
            router_loss *= self.router_aux_loss_coef
            term = f"without the router's load balancing loss ({router_loss:.3g})"
            loss, expected = loss - router_loss, replace(expected, name=f"{expected.name} {term}")
            self.reference_summary = f"{self.reference_summary}; the first loss was checked {term}"
        check_initial_loss(loss, expected)

    def _compute_and_record(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[float, list[ModelCall]]:
        """Return the loss and the calls of models that it is computed from: the policy's, then the reference's."""
        with self.evaluation_pass(model), record_calls(self.model, self.ref_model) as recorded:
            output = super().compute_loss(model, dict(inputs))
        return float(output[0] if isinstance(output, tuple) else output), recorded

    def _log_probs_of(
        self, fresh: nn.Module, model: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Return the log-probabilities that a fresh model gives the batch in the place of the reference."""
        from trl.trainer.utils import add_fused_lm_head

        reference: Any = fresh
        add_fused_lm_head(reference)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, False
        self.ref_model = reference.to(self.args.device).eval()
        try:
            log_probs = [call.log_probs for call in _halves(self._compute_and_record(model, inputs)[1])[1]]
        finally:
            self.ref_model, self.precompute_ref_logps = None, precomputed
        return [self.weigh_log_probs(tensor, inputs) for tensor in log_probs] if precomputed else log_probs


@contextmanager
def record_calls(*models: nn.Module | None) -> Iterator[list[ModelCall]]:
    """Record the calls of models in the block that return log-probabilities, in their order."""
    recorded: list[ModelCall] = []

    def record(module: nn.Module, arguments: object, output: object) -> None:
        log_probs = getattr(output, "log_probs", None)
        router_loss = getattr(output, "aux_loss", None)
        if log_probs is not None:
            value = None if router_loss is None else float(router_loss)
            recorded.append(ModelCall(log_probs.detach().float(), value))

    handles = [model.register_forward_hook(record) for model in models if model is not None]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _shared_memory(model: nn.Module, reference: nn.Module | None) -> str:
    """Return the name of a trained parameter that a reference model shares; empty if there is none."""
    if reference is None:
        return ""
    addresses = {weight.data_ptr() for weight in reference.parameters()} - {0}
    trained = (item for item in model.named_parameters() if item[1].requires_grad)
    return next((name for name, weight in trained if weight.data_ptr() in addresses), "")


def _most_effective(model: nn.Module) -> torch.Tensor | None:
    """Return a small trained tensor that changes the outputs: of LoRA a B, as its A has no effect while B is 0."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    chosen = {name: weight for name, weight in trained.items() if ".lora_B." in name} or trained
    return min(chosen.values(), key=torch.Tensor.numel, default=None)


@contextmanager
def _changed(weight: torch.Tensor | None) -> Iterator[None]:
    """Add 1 to a tensor in the block."""
    if weight is None:
        yield
        return
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def _halves(recorded: list[ModelCall]) -> tuple[list[ModelCall], list[ModelCall]]:
    half, odd = divmod(len(recorded), 2)
    if not half or odd:
        raise InternalError(f"the loss called policy and reference {len(recorded)} times, not equally often")
    return recorded[:half], recorded[half:]


def has_dropout(model: nn.Module) -> bool:
    """Return whether a model in training mode applies dropout by modules."""
    return any(getattr(module, "p", 0) > 0 for module in model.modules() if "Dropout" in type(module).__name__)


class CompleteReferenceMixin(TrainerBase):
    """Complete TRL's frozen copy of an adapter, which is the reference of a run that continues with that adapter.

    TRL 1.16 copies the tensors below a module with the adapter's name. It misses tensors that have that name
    themselves: the rows of trainable tokens, and the vectors of IA3.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        complete_reference(self.model)


def complete_reference(model: nn.Module) -> None:
    """Copy every tensor named after the trained adapter to its namesake in the reference adapter, if there is one."""
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parent, _, last = name.rpartition(".")
        reference = tensors.get(f"{parent}.{_REFERENCE_ADAPTER}") if last == _TRAINED_ADAPTER else None
        if reference is not None:
            reference.data.copy_(tensor.data)
