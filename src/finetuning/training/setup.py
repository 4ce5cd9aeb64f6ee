"""The parts of a run, in the order that they are built: arguments, tokenizer, rows, model, attention, trainer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import Algorithm, BatchLayout, TrainerInputs, reraise_as_config_error
from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES
from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import Dtype, NewPeft, NoPeft
from finetuning.distributed import ProcessTopology, connecting_processes
from finetuning.errors import ConfigError, Location, ModelError, reading
from finetuning.plan.attention import (
    DEFAULT_ATTENTION,
    TORCH_VARLEN,
    AttentionChoice,
    AttentionContext,
    RowLayout,
    choose_attention,
)
from finetuning.plan.features import RunContext

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

    from finetuning.data.prepared import PreparedData
    from finetuning.model.embeddings import EmbeddingInfo
    from finetuning.model.fingerprint import Fingerprint
    from finetuning.model.peft.adapters import AdaptedModel
    from finetuning.model.stop_tokens import EndOfTurn
    from finetuning.model.tokenizer import LoadedTokenizer
    from finetuning.plan.plan import Plan
    from finetuning.trainer.mixin import TrainerMixin

# Progress, tracking, the upload to the Hub and the check for non-finite losses are ours.
_FIXED = {
    "report_to": "none",
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "no",
    "label_names": ["labels"],
    "push_to_hub": False,
}
_UNCOMPILED = dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"))
# Fields that our trainer has and the config class does not.
_OWN_FIELDS = {"sft": ("activation_offloading",), "dpo": ("max_prompt_length",)}


@dataclass(frozen=True)
class AttentionSetup:
    """Attention implementations to try instead of the one the model was loaded with, best first."""

    candidates: tuple[str, ...]
    reason: str
    autocast: torch.dtype | None = None
    """The dtype that the run computes in by autocast; None without."""


@dataclass(frozen=True)
class LoadedModel:
    """The model to train: quantized, resized and with its adapter."""

    model: PreTrainedModel
    peft_config: PeftConfig | None
    """The config of the adapter that the trainer adds; None when the model has its adapter, or trains without."""
    initial: dict[str, str]
    """Digests of the adapter's tensors before training."""
    fingerprint: Fingerprint | None
    """The fingerprint of the base model; None when it cannot be taken."""
    saved_dtype: torch.dtype | None
    """The dtype of the checkpoint, if the run trains its weights in float32 of its own accord; None otherwise."""
    vocabulary: EmbeddingInfo
    load_reference: Callable[[], PreTrainedModel]
    layout: BatchLayout
    notes: tuple[str, ...]


def build_arguments(experiment: Experiment, plan: Plan) -> TrainingArguments:
    """Return an instance of the experiment's `trainer_config` class.

    Raises:
        ConfigError: the class rejects a value.
    """
    import torch

    (module, _, name), args = experiment.trainer_config.partition(":"), experiment.training_args
    fields: dict[str, object] = {field: getattr(args, field) for field in type(args).model_fields}
    for field in ("logging_dir", *_OWN_FIELDS.get(experiment.method_name, ())):
        del fields[field]
    fields |= (
        (args.model_extra or {})
        | _FIXED
        | {
            **(_UNCOMPILED if args.torch_compile == "layers" else {}),
            "learning_rate": plan.learning_rate,
            "per_device_train_batch_size": plan.batch.per_device,
            "per_device_eval_batch_size": plan.batch.per_device_eval,
            **plan.logging_fields(args),
            "gradient_accumulation_steps": plan.batch.accumulation,
            "deepspeed": _deepspeed_config(args.deepspeed, plan),
            "full_determinism": experiment.run_conf.determinism == "full" or bool(fields.get("full_determinism")),
        }
    )
    if args.gradient_checkpointing == "selective":
        from finetuning.trainer.selective_checkpointing import selective_kwargs

        fields["gradient_checkpointing_kwargs"] = selective_kwargs(args.gradient_checkpointing_kwargs)
    if not torch.accelerator.is_available():
        # Without it transformers rejects bfloat16, and accelerate creates no process group on a machine without GPUs,
        # so that each process would train by itself.
        fields["use_cpu"] = True
    if args.max_steps > 0 and args.num_train_epochs <= 0:
        fields.pop("num_train_epochs")
    # In a distributed run this creates the process group.
    try:
        with connecting_processes() if plan.batch.world_size > 1 else nullcontext():
            arguments = getattr(importlib.import_module(module), name)(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(str(error), location=Location(key="training_args")) from error
    if experiment.data_conf.streaming:
        # With dispatch_batches the main process would read for all, and cannot slice padding-free batches.
        arguments.accelerator_config.dispatch_batches = False
    if plan.batch.world_size == 1:
        # A single process uses a single device: torch.nn.DataParallel would give each visible GPU its own batch.
        arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _deepspeed_config(config: str | dict[str, object] | None, plan: Plan) -> str | dict[str, object] | None:
    """Return DeepSpeed's config; an inline one gets the batch size fields that DeepSpeed requires."""
    if not isinstance(config, dict):
        return config
    return config | {
        "train_batch_size": plan.batch.total,
        "train_micro_batch_size_per_gpu": plan.batch.per_device,
        "gradient_accumulation_steps": plan.batch.accumulation,
    }


def load_tokenizer(experiment: Experiment) -> LoadedTokenizer:
    """Return the tokenizer with the experiment's chat template and padding."""
    from finetuning.data.chat.template import configured_template, default_template
    from finetuning.model import tokenizer

    data, run = experiment.data_conf, experiment.run_conf
    template, default = configured_template(data), default_template(data)
    args, is_models = run.model_args, run.tokenizer is None or run.tokenizer == run.model
    return tokenizer.load_tokenizer(
        run.tokenizer or run.model,
        template_source=template.source if template else None,
        default_template=(str(default.name), default.source) if default else None,
        special_tokens=tuple(dict.fromkeys([*(template.special_tokens if template else ()), *data.special_tokens])),
        # Plain text needs none; a chat without one is rejected when it is prepared.
        needs_template=experiment.method_name != "sft",
        missing_pad_token_strategy=data.missing_pad_token_strategy,
        padding_side=data.padding_side,
        trust_remote_code=args.trust_remote_code,
        key="run_conf.tokenizer" if run.tokenizer else "run_conf.model",
        revision=args.revision if is_models else None,
        subfolder=args.subfolder if is_models else None,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
        token=args.token.get_secret_value() if args.token else None,
    )


def stop_tokens(experiment: Experiment, tokenizer: LoadedTokenizer) -> tuple[str, ...]:
    """Return the stop tokens of the model's generation config; none if it has no generation config."""
    from transformers import GenerationConfig

    run, args = experiment.run_conf, experiment.run_conf.model_args
    token = args.token.get_secret_value() if args.token else None
    try:
        with reading(f"the generation config of {run.model} cannot be read", location=Location(key="run_conf.model")):
            config = GenerationConfig.from_pretrained(
                run.model, revision=args.revision, cache_dir=args.cache_dir, token=token,
                local_files_only=bool(args.local_files_only), subfolder=args.subfolder or "",
            )  # fmt: skip
    except ModelError as error:
        if isinstance(error.__cause__, OSError):
            return ()
        raise
    eos = config.eos_token_id
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    tokens: list[Any] = [tokenizer.tokenizer.convert_ids_to_tokens(token_id) for token_id in ids]
    return tuple(token for token in tokens if token is not None)


def prepare(experiment: Experiment, algorithm: Algorithm, tokenizer: LoadedTokenizer, workers: int) -> PreparedData:
    """Return the rows as the algorithm trains on them."""
    from finetuning.training.preflight import check_alora_invocation, uses_invocation

    data = algorithm.prepare(experiment, tokenizer.tokenizer, workers, stop_tokens(experiment, tokenizer))
    if uses_invocation(experiment):
        check_alora_invocation(experiment, tokenizer.tokenizer, data)
    return data


def end_of_turn(experiment: Experiment, tokenizer: LoadedTokenizer) -> EndOfTurn:
    """Return the texts that end assistant turns in the chat template; None for the end-of-sequence token."""
    from finetuning.data.chat.end_of_turn import EndOfTurnFinder
    from finetuning.data.chat.template import TemplateRenderer, configured_template

    template = configured_template(experiment.data_conf, tokenizer.tokenizer.chat_template)
    if template is not None and template.name is not None:
        return template.end_of_turn
    if not tokenizer.tokenizer.chat_template:
        return None
    fast_tokenizer: Any = tokenizer.tokenizer
    return EndOfTurnFinder(TemplateRenderer(fast_tokenizer)).stops or None


def load_model(
    experiment: Experiment,
    algorithm: Algorithm,
    tokenizer: LoadedTokenizer,
    arguments: TrainingArguments,
    topology: ProcessTopology,
    total_steps: int,
    check_names: bool = True,
    fingerprint: Fingerprint | None = None,
    has_images: bool = False,
) -> LoadedModel:
    """Return the model to train.

    When the vocabulary grows under an adapter, the resized base model is saved first: the adapter belongs to it.
    `fingerprint` is that of the model in `run_conf.model`; `has_images` says whether rows have images.
    """
    from finetuning.model.fingerprint import fingerprint_if_possible
    from finetuning.model.peft import adapters
    from finetuning.model.peft.adapter_files import adapter_digests
    from finetuning.model.varlen_attention import describe_attention
    from finetuning.training import preflight

    if preflight.uses_invocation(experiment):
        experiment = preflight.resolve_invocation(experiment, tokenizer.tokenizer)
    peft_conf = experiment.peft_conf
    dtype, saved_dtype, dtype_notes = preflight.choose_dtype(RunContext(experiment, topology, 1), arguments)
    load_base = partial(_load_base_model, experiment, algorithm, tokenizer, topology, dtype)
    model, vocabulary = load_base()
    load_reference = lambda: load_base()[0]  # noqa: E731
    parts = experiment.run_conf.train_parts
    notes = [*dtype_notes, *_save_resized_base(experiment, model, tokenizer, vocabulary, topology)]
    if topology.is_main and str(model.name_or_path) != experiment.run_conf.model:
        fingerprint = fingerprint_if_possible(Path(str(model.name_or_path)))
    attention = choose_attention_candidates(experiment, algorithm, model, arguments, topology)
    if not isinstance(peft_conf, NoPeft):
        # Before the first forward pass, after which some quantized layers have no gradient.
        model = _prepare_quantized(model, arguments, topology)
    if not algorithm.has_score_head:
        notes.append(preflight.verify_causality(model, topology, arguments, attention.autocast))
    notes += adapters.freeze_other_parts(model, parts)
    if algorithm.trainer_adds_adapter and isinstance(peft_conf, NewPeft):
        config = adapters.make_peft_config(
            model, peft_conf, embeddings=vocabulary, total_steps=total_steps, check_names=check_names, parts=parts
        )
        preflight.check_new_tokens(getattr(config, "trainable_token_indices", None), len(vocabulary.new_ids), algorithm)
        layout = BatchLayout(True, f"{algorithm.name} pads its rows")
        notes.append(describe_attention(model, attention.reason))
        return LoadedModel(model, config, {}, fingerprint, None, vocabulary, load_reference, layout, tuple(notes))
    adapted = adapters.apply_peft(
        model, peft_conf, embeddings=vocabulary, total_steps=total_steps, check_names=check_names, parts=parts,
        autocast_adapter_dtype=topology.sharded_by is None,
    )  # fmt: skip
    adapted_model: Any = adapted.model
    initial = adapter_digests(adapted_model) if adapted.peft_config is not None else {}
    layout, attention = choose_layout(experiment, algorithm, adapted, topology, attention, has_images)
    if layout.padded and algorithm.supports_padding_free:
        _check_padding(experiment, adapted_model, tokenizer, topology, attention)
    notes += [str(adapted), *adapted.notes, describe_attention(adapted.model, attention.reason)]
    rest = (fingerprint, saved_dtype, vocabulary, load_reference, layout, tuple(notes))
    return LoadedModel(adapted_model, None, initial, *rest)


def _check_padding(
    experiment: Experiment,
    model: PreTrainedModel,
    tokenizer: LoadedTokenizer,
    topology: ProcessTopology,
    attention: AttentionSetup,
) -> None:
    """Warn if padding changes the logits of rows; on a GPU, use attention that needs no mask for it if it does not."""
    # Under FSDP only the main process holds the weights, and DeepSpeed has sharded them.
    if topology.sharded_by or experiment.training_args.deepspeed:
        return
    from finetuning.model.padding import warn_of_padding

    warn_of_padding(model, tokenizer)
    if model.device.type == "cuda" and tokenizer.tokenizer.padding_side == "right":
        from finetuning.model.gpu_attention import enable_causal_sdpa

        enable_causal_sdpa(model, attention.autocast)


def _load_base_model(
    experiment: Experiment,
    algorithm: Algorithm,
    tokenizer: LoadedTokenizer,
    topology: ProcessTopology,
    dtype: Dtype,
) -> tuple[PreTrainedModel, EmbeddingInfo]:
    """Return the model without adapter, with embeddings for the new tokens."""
    from finetuning.model import load
    from finetuning.model.embeddings import read_untrained_tokens, resize_embeddings

    new_tokens = [*tokenizer.new_tokens]
    if isinstance(experiment.peft_conf, NewPeft):
        # An existing adapter has its own embeddings for them.
        new_tokens += read_untrained_tokens(Path(experiment.run_conf.model), tokenizer.tokenizer)
    if algorithm.has_score_head:
        load.check_score_head(experiment.run_conf)
    model = load.load_model(
        experiment.run_conf,
        experiment.quant_conf,
        topology=topology,
        sharded_by=topology.sharded_by,
        dtype=dtype,
        head=load.SEQUENCE_CLASSIFICATION if algorithm.has_score_head else load.CAUSAL_LM,
    )
    configured = experiment.run_conf.model_args.dtype
    if isinstance(experiment.peft_conf, NoPeft) and configured == "auto" and str(model.dtype) == "torch.float16":
        # The plan chose float32 if the config of the checkpoint names its dtype. Adam turns float16 weights into NaN.
        model = model.float()
    multiple = experiment.run_conf.embedding_size_multiple_of
    if algorithm.pads_right and topology.sharded_by is None and model.device.type == "cuda":
        from finetuning.model.gpu_attention import enable_causal_sdpa

        enable_causal_sdpa(model)
    return model, resize_embeddings(model, tokenizer.tokenizer, new_tokens, pad_to_multiple_of=multiple)


def find_new_ids(experiment: Experiment) -> list[int]:
    """Return the ids of the tokens that the model's embeddings have no trained rows for. Loads the tokenizer."""
    from finetuning.data.chat.template import configured_template
    from finetuning.model.embeddings import UNTRAINED_TOKENS_FILE, read_untrained_tokens

    data, folder = experiment.data_conf, Path(experiment.run_conf.model)
    template = configured_template(data)
    asks_for_tokens = bool(data.special_tokens or (template and template.special_tokens))
    if not asks_for_tokens and not (folder / UNTRAINED_TOKENS_FILE).is_file():
        return []
    loaded = load_tokenizer(experiment)
    tokens = [*loaded.new_tokens, *read_untrained_tokens(folder, loaded.tokenizer)]
    ids: Any = loaded.tokenizer.convert_tokens_to_ids(tokens)
    return ids


def _save_resized_base(
    experiment: Experiment,
    model: PreTrainedModel,
    tokenizer: LoadedTokenizer,
    vocabulary: EmbeddingInfo,
    topology: ProcessTopology,
) -> list[str]:
    """Save a base model whose vocabulary grew, for the adapter to refer to. Return notes on the vocabulary."""
    from finetuning.model import save

    output_dir = Path(experiment.training_args.output_dir)
    notes = [f"vocabulary: {vocabulary}"]
    if topology.is_main:
        vocabulary.write_added_tokens_info(output_dir)
    if not vocabulary.is_resized or experiment.peft_conf.peft_type == "NO_PEFT":
        return notes
    sft_args = getattr(experiment, "sft_args", None)
    folder = output_dir / (sft_args.save_name_if_new_basemodel if sft_args else "checkpoint-new-basemodel")
    if topology.is_main and not save.has_extended_base(folder, model, tokenizer.tokenizer):
        save.save_extended_base(model, tokenizer.tokenizer, folder, tokenizer.new_tokens)
    model.config.name_or_path = model.name_or_path = str(folder)
    return [*notes, f"the resized base model is {folder}; the adapter belongs to it"]


def _prepare_quantized(
    model: PreTrainedModel, arguments: TrainingArguments, topology: ProcessTopology
) -> PreTrainedModel:
    # The model's own attributes decide, not the config: a checkpoint may already be quantized.
    if getattr(model, "quantization_method", None) is None:
        return model
    from finetuning.model.quantization import needs_kbit_preparation, prepare_quantized_model

    if not needs_kbit_preparation(model):
        return model
    checkpointing: Any = (bool(arguments.gradient_checkpointing), arguments.gradient_checkpointing_kwargs)
    return prepare_quantized_model(model, topology.sharded_by, *checkpointing)


def choose_attention_candidates(
    experiment: Experiment,
    algorithm: Algorithm,
    model: PreTrainedModel,
    arguments: TrainingArguments,
    topology: ProcessTopology,
) -> AttentionSetup:
    """Return the attention implementations to try; none when the config names one."""
    import torch

    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    if experiment.run_conf.model_args.attn_implementation:
        return AttentionSetup((), "as configured", autocast)
    choice = _rank_attention(experiment, algorithm, model, arguments, topology, autocast or model.dtype)
    # The last one is what the model was loaded with.
    return AttentionSetup(choice.ranked[:-1], choice.reason, autocast)


def _rank_attention(
    experiment: Experiment,
    algorithm: Algorithm,
    model: PreTrainedModel,
    arguments: TrainingArguments,
    topology: ProcessTopology,
    dtype: torch.dtype,
) -> AttentionChoice:
    from finetuning.model.hardware import training_device

    installed = tuple(name for name, package in FLASH_ATTENTION_PACKAGES.items() if package.is_installed)
    has_varlen = arguments.device.type == "cuda" and importlib.util.find_spec("torch.nn.attention.varlen")
    installed += (TORCH_VARLEN,) if has_varlen else ()
    fallback = "eager" if model.config._attn_implementation == "eager" else DEFAULT_ATTENTION
    if not installed and fallback == DEFAULT_ATTENTION:
        return choose_attention(AttentionContext())
    device = training_device(arguments.use_cpu)
    config = model.config.get_text_config()
    supports = {"flash_attention": model._supports_flash_attn, "flex_attention": model._supports_flex_attn}
    return choose_attention(
        AttentionContext(
            fallback=fallback,
            supported=tuple(name for name, is_supported in supports.items() if is_supported),
            device=device.kind,
            capability=device.capability,
            installed=installed,
            dtype=str(dtype).removeprefix("torch."),
            layout=_intended_layout(experiment, algorithm),
            method=algorithm.name,
            sharded_by=topology.sharded_by or ("deepspeed" if experiment.training_args.deepspeed else None),
            is_deterministic=experiment.run_conf.determinism != "no" or arguments.full_determinism,
            has_dropout=any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop")),
        )
    )


def _intended_layout(experiment: Any, algorithm: Algorithm) -> RowLayout:
    if not algorithm.supports_padding_free or experiment.sft_args.batching == "padded":
        return "padded"
    return "packed" if experiment.sft_args.packing else "padding-free"


def choose_layout(
    experiment: Any,
    algorithm: Algorithm,
    adapted: AdaptedModel,
    topology: ProcessTopology,
    attention: AttentionSetup,
    has_images: bool = False,
) -> tuple[BatchLayout, AttentionSetup]:
    """Return the batch layout, padding-free where this model isolates rows, and the attention that was chosen.

    Raises:
        ConfigError: the config asks for packing or padding-free batches, and the model does not isolate rows.
    """
    from finetuning.model.varlen_attention import describe_isolation_check

    if has_images or not algorithm.supports_padding_free:
        return BatchLayout(True, f"{algorithm.name} pads rows{' with images' * has_images}"), attention
    batching, packing = experiment.sft_args.batching, experiment.sft_args.packing
    if batching == "padded":
        return BatchLayout(True, "as configured"), attention
    reason: str | None
    if topology.sharded_by == "deepspeed" or experiment.training_args.deepspeed:
        reason = "row isolation cannot be verified before DeepSpeed has initialized the model"
    else:
        reason, attention = enable_padding_free(adapted, attention, topology)
    if reason is None:
        verified = f"verified on this model's logits, with {describe_isolation_check(adapted.model)}"
        takes_mask = _takes_constant_mask(adapted, topology, attention)
        return BatchLayout(False, f"each row attends only to itself, {verified}", takes_mask), attention
    if packing:
        raise ConfigError(
            f"rows cannot be packed: {reason}",
            location=Location(key="sft_args.packing"),
            hint="Set sft_args.packing: false.",
        )
    if batching == "padding-free":
        raise ConfigError(f"batches cannot be padding-free: {reason}", location=Location(key="sft_args.batching"))
    return BatchLayout(True, reason), attention


def enable_padding_free(
    adapted: AdaptedModel, attention: AttentionSetup, topology: ProcessTopology
) -> tuple[str | None, AttentionSetup]:
    """Switch the model to padding-free batches with the first attention implementation that isolates rows.

    Returns:
        None, or the reason why no implementation isolates rows; and the attention that was chosen.
    """
    from finetuning.model.varlen_attention import SDPA_VARLEN, enable_varlen, enable_varlen_kernel, use_varlen
    from finetuning.training.preflight import unavailable_attention

    model, peft_config = adapted.model, adapted.peft_config
    if TORCH_VARLEN in attention.candidates:
        from finetuning.model.gpu_attention import register_torch_varlen

        register_torch_varlen()

    def select() -> tuple[str | None, str, tuple[str, ...]]:
        rejected: list[str] = []
        verified = model
        if topology.sharded_by == "fsdp" and attention.candidates:
            from finetuning.model.gpu_attention import small_copy_on_gpu

            # The kernels do not run on the CPU, where the weights are until they are sharded.
            verified = small_copy_on_gpu(model)
        for name in attention.candidates:
            why_not = unavailable_attention(name) or enable_varlen_kernel(
                verified, name, peft_config, attention.autocast
            )
            if why_not is None:
                return None, name, tuple(rejected)
            rejected.append(f"{name} was not used: {why_not}")
        return enable_varlen(verified, peft_config, attention.autocast), SDPA_VARLEN, tuple(rejected)

    if topology.is_distributed:
        from finetuning.training.process_sync import broadcast_from_main

        # Under FSDP with `cpu_ram_efficient_loading` only the main process holds the weights at this point.
        reason, name, rejected = broadcast_from_main(select)
    else:
        reason, name, rejected = select()
    if reason is None:
        use_varlen(model, name)
    chosen = attention.reason if name != SDPA_VARLEN or not rejected else "the default"
    return reason, replace(attention, reason="; ".join([chosen, *rejected]))


def _takes_constant_mask(adapted: AdaptedModel, topology: ProcessTopology, attention: AttentionSetup) -> bool:
    if topology.sharded_by or adapted.model.device.type != "cuda":
        return False
    from finetuning.model.gpu_attention import accepts_constant_mask

    return accepts_constant_mask(adapted.model, attention.autocast)


def build_trainer(
    experiment: Experiment,
    algorithm: Algorithm,
    plan: Plan,
    arguments: TrainingArguments,
    data: PreparedData,
    tokenizer: LoadedTokenizer,
    loaded: LoadedModel,
    callbacks: Sequence[TrainerCallback],
    checkpoint: Path | None,
) -> TrainerMixin:
    """Return the algorithm's trainer, with what every run adds to it.

    Args:
        checkpoint: what the run resumes from; None for a new run.

    Raises:
        ConfigError: the trainer rejects the combination of model and options, or the micro-batch is to be determined
            automatically for a loss that does not allow it.
    """
    from finetuning.training.memory_check import check_memory_at_start

    turn_ends_with = end_of_turn(experiment, tokenizer)
    inputs = TrainerInputs(
        experiment=experiment,
        arguments=arguments,
        data=data,
        tokenizer=tokenizer,
        model=loaded.model,
        peft_config=loaded.peft_config,
        load_reference=loaded.load_reference,
        layout=loaded.layout,
        callbacks=callbacks,
        end_of_turn=turn_ends_with,
    )
    with reraise_as_config_error(algorithm.name):
        trainer: Any = algorithm.build_trainer(inputs)
    trainer.loraplus_lr_ratio = experiment.overrides.loraplus_lr_ratio
    trainer.part_learning_rates = experiment.overrides.part_learning_rates
    trainer.end_of_turn, trainer.embeddings = turn_ends_with, loaded.vocabulary
    if experiment.peft_conf.peft_type != "NO_PEFT":
        trainer.base_fingerprint = loaded.fingerprint and loaded.fingerprint.loaded_as(loaded.model)
    if experiment.data_conf.streaming:
        from finetuning.training.resume.stream_state import attach_stream_state

        attach_stream_state(trainer, data, plan.batch.total, checkpoint)
    if experiment.training_args.torch_compile == "layers":
        from finetuning.model.compiled_layers import compile_layers

        compile_layers(trainer.model, **(experiment.training_args.model_extra or {}))
    check_memory_at_start(trainer, experiment)
    return trainer
