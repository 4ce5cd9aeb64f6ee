"""The parts of a run that come before its trainer: tokenizer, rows, model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import Algorithm, BatchLayout
from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import Dtype, NewPeft, NoPeft
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError, Location

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from finetuning.data.prepared import PreparedData
    from finetuning.model.embeddings import EmbeddingInfo
    from finetuning.model.fingerprint import Fingerprint
    from finetuning.model.tokenizer import LoadedTokenizer
    from finetuning.training.attention_setup import AttentionSetup


@dataclass(frozen=True)
class LoadedModel:
    """The model to train: quantised, grown and adapted as the experiment says."""

    model: Any
    peft_config: Any
    """The config of the adapter that the trainer is still to put on; None when the model wears it, or none."""
    initial: dict[str, str]
    """Digests of the adapter's tensors before training."""
    fingerprint: Fingerprint | None
    vocabulary: EmbeddingInfo
    load_reference: Callable[[], Any]
    layout: BatchLayout
    notes: tuple[str, ...]


def load_tokenizer(experiment: Experiment) -> LoadedTokenizer:
    """The tokenizer with the experiment's chat template and padding."""
    from finetuning.data.chat.template import chosen_template
    from finetuning.model import tokenizer

    data, run = experiment.data_conf, experiment.run_conf
    template = chosen_template(data)
    args = run.model_args
    same = run.tokenizer is None or run.tokenizer == run.model
    return tokenizer.load_tokenizer(
        run.tokenizer or run.model,
        template_source=template.source if template else None,
        special_tokens=tuple(dict.fromkeys([*(template.special_tokens if template else ()), *data.special_tokens])),
        # Texts need none; where a chat comes by without one, its preparation says so.
        needs_template=experiment.method_name != "sft",
        missing_pad_token_strategy=data.missing_pad_token_strategy,
        padding_side=data.padding_side,
        trust_remote_code=args.trust_remote_code,
        key="run_conf.tokenizer" if run.tokenizer else "run_conf.model",
        revision=args.revision if same else None,
        subfolder=args.subfolder if same else None,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
        token=args.token.get_secret_value() if args.token else None,
    )


def stop_tokens(experiment: Experiment, tokenizer: LoadedTokenizer) -> tuple[str, ...]:
    """What the model's own generation config stops at, besides its end-of-sequence token; nothing without one."""
    from transformers import GenerationConfig

    run, args = experiment.run_conf, experiment.run_conf.model_args
    token = args.token.get_secret_value() if args.token else None
    try:
        config = GenerationConfig.from_pretrained(
            run.model, revision=args.revision, cache_dir=args.cache_dir, token=token,
            local_files_only=args.local_files_only, subfolder=args.subfolder or "",
        )  # fmt: skip
    except OSError:
        return ()
    ends = config.eos_token_id
    ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    known = (tokenizer.tokenizer.convert_ids_to_tokens(one) for one in ids)
    return tuple(one for one in known if one is not None)


def prepare(experiment: Experiment, method: Algorithm, tokenizer: LoadedTokenizer, workers: int) -> PreparedData:
    """The rows as the method trains on them."""
    from finetuning.training.preflight import check_invoked

    data = method.prepare(experiment, tokenizer.tokenizer, workers, stop_tokens(experiment, tokenizer))
    check_invoked(experiment, tokenizer.tokenizer, data)
    return data


def end_of_turn(experiment: Experiment, tokenizer: LoadedTokenizer) -> str | None:
    """The text that the chat template ends an assistant's turn with; None for the end-of-sequence token."""
    from finetuning.data.chat.end_of_turn import EndOfTurnFinder
    from finetuning.data.chat.template import TemplateRenderer, chosen_template

    template = chosen_template(experiment.data_conf)
    if template is not None and template.name is not None:
        return template.end_of_turn
    if not tokenizer.tokenizer.chat_template:
        return None
    return EndOfTurnFinder(TemplateRenderer(tokenizer.tokenizer)).marker.strip() or None


def load_model(
    experiment: Experiment,
    method: Algorithm,
    tokenizer: LoadedTokenizer,
    arguments: TrainingArguments,
    topology: ProcessTopology,
    output_dir: Path,
    total_steps: int,
) -> LoadedModel:
    """The model to train, and how to load it once more as a reference.

    A vocabulary that grows under an adapter makes a new base model, which is saved first: the adapter goes with it.
    """
    from finetuning.model.peft import adapters
    from finetuning.model.peft.adapter_files import adapter_digests
    from finetuning.model.varlen_attention import describe_attention
    from finetuning.training.attention_setup import setup_attention
    from finetuning.training.preflight import with_invocation

    peft_conf = with_invocation(experiment, tokenizer.tokenizer).peft_conf
    # Loss scaling needs master weights in float32.
    load_bare = partial(_load_bare, experiment, method, tokenizer, topology, "float32" if arguments.fp16 else "auto")
    model, vocabulary = load_bare()
    notes = _keep_vocabulary(experiment, model, tokenizer, vocabulary, output_dir, topology)
    base = _fingerprint(model)
    attention = setup_attention(experiment, method, model, arguments, topology)
    if not isinstance(peft_conf, NoPeft):
        model = _quantised(model, arguments, topology)

    def reference() -> Any:
        return load_bare()[0]

    if method.wraps_model and isinstance(peft_conf, NewPeft):
        config = adapters.make_peft_config(model, peft_conf, embeddings=vocabulary, total_steps=total_steps)
        _refuse_hidden_rows(config, vocabulary, method)
        layout = BatchLayout(True, f"{method.name} pads its rows")
        notes.append(describe_attention(model, attention.reason))
        return LoadedModel(model, config, {}, base, vocabulary, reference, layout, tuple(notes))
    adapted = adapters.apply_peft(
        model,
        peft_conf,
        embeddings=vocabulary,
        total_steps=total_steps,
        autocast_adapter_dtype=topology.sharded_by is None,
    )
    initial = adapter_digests(adapted.model) if adapted.peft_config is not None else {}
    layout, attention = _layout(experiment, method, adapted, topology, attention)
    notes += [str(adapted), *adapted.notes, describe_attention(adapted.model, attention.reason)]
    return LoadedModel(adapted.model, None, initial, base, vocabulary, reference, layout, tuple(notes))


def _load_bare(
    experiment: Experiment,
    method: Algorithm,
    tokenizer: LoadedTokenizer,
    topology: ProcessTopology,
    default_dtype: Dtype,
) -> tuple[Any, EmbeddingInfo]:
    """The model as it is read, with rows for the new tokens, and what became of its vocabulary."""
    from finetuning.model import load
    from finetuning.model.embeddings import read_untrained_tokens, resize_embeddings
    from finetuning.model.load import CAUSAL_LM, SEQUENCE_CLASSIFICATION

    new_tokens = [*tokenizer.new_tokens]
    if isinstance(experiment.peft_conf, NewPeft):
        # An adapter that is there already has its own rows for them.
        new_tokens += read_untrained_tokens(Path(experiment.run_conf.model), tokenizer.tokenizer)
    model = load.load_model(
        experiment.run_conf,
        experiment.quant_conf,
        topology=topology,
        sharded_by=topology.sharded_by,
        default_dtype=default_dtype,
        head=SEQUENCE_CLASSIFICATION if method.gives_scores else CAUSAL_LM,
    )
    return model, resize_embeddings(model, tokenizer.tokenizer, new_tokens)


def _refuse_hidden_rows(config: Any, vocabulary: Any, method: Algorithm) -> None:
    """Nothing, when the rows of new tokens reach the loss: TRL multiplies by the output weights past the adapter's
    wrapper of single rows, which would stay as they are.

    Raises:
        ConfigError: they would not be trained.
    """
    if vocabulary.new_ids and getattr(config, "trainable_token_indices", None):
        raise ConfigError(
            f"the chat template brings {len(vocabulary.new_ids)} new tokens, whose output rows an adapter does not"
            f" train under {method.name}",
            place=Location(key="data_conf.chat_template_name"),
            hint="Teach them to the model by sft first, or add the embeddings to peft_conf.peft_kwargs:"
            f" modules_to_save: [{', '.join(config.trainable_token_indices)}].",
        )


def _keep_vocabulary(
    experiment: Experiment,
    model: Any,
    tokenizer: LoadedTokenizer,
    vocabulary: EmbeddingInfo,
    output_dir: Path,
    topology: ProcessTopology,
) -> list[str]:
    """Notes on the vocabulary; a base model that has grown is saved for the adapter to go with."""
    from finetuning.model import save

    notes = [f"vocabulary: {vocabulary}"]
    if topology.is_main:
        vocabulary.write_added_tokens_info(output_dir)
    if not vocabulary.is_resized or experiment.peft_conf.peft_type == "NO_PEFT":
        return notes
    folder = output_dir / _new_base_name(experiment)
    if topology.is_main and not save.has_extended_base(folder, model, tokenizer.tokenizer):
        save.save_extended_base(model, tokenizer.tokenizer, folder, tokenizer.new_tokens)
    model.config.name_or_path = model.name_or_path = str(folder)
    return [*notes, f"the grown base model is {folder}; the adapter goes with it"]


def _fingerprint(model: Any) -> Fingerprint | None:
    from finetuning.model import fingerprint

    folder = Path(model.name_or_path)
    return fingerprint.compute_fingerprint(folder) if fingerprint.can_fingerprint(folder) else None


def _quantised(model: Any, arguments: TrainingArguments, topology: ProcessTopology) -> Any:
    from finetuning.model.quantization import needs_kbit_preparation, prepare_quantized_model

    # By what the model says, not the config: a checkpoint may come quantised.
    if not needs_kbit_preparation(model):
        return model
    return prepare_quantized_model(
        model,
        sharded_by=topology.sharded_by,
        gradient_checkpointing=arguments.gradient_checkpointing,
        gradient_checkpointing_kwargs=arguments.gradient_checkpointing_kwargs,
    )


def _new_base_name(experiment: Experiment) -> str:
    sft_args = getattr(experiment, "sft_args", None)
    return sft_args.save_name_if_new_basemodel if sft_args else "checkpoint-new-basemodel"


def _layout(
    experiment: Experiment, method: Algorithm, adapted: Any, topology: ProcessTopology, attention: AttentionSetup
) -> tuple[BatchLayout, AttentionSetup]:
    """How rows lie in a batch: end to end where that is proven for this very model; and the attention over them."""
    from finetuning.training.attention_setup import enable_padding_free

    if not method.lays_end_to_end:
        return BatchLayout(True, f"{method.name} pads its rows"), attention
    wanted, packing = experiment.sft_args.batching, experiment.sft_args.packing
    if wanted == "padded":
        return BatchLayout(True, "as configured"), attention
    if topology.sharded_by == "deepspeed" or experiment.training_args.deepspeed:
        reason: str | None = "the proof cannot be made before DeepSpeed has placed the model"
    else:
        reason, attention = enable_padding_free(adapted, attention, topology)
    if reason is None:
        return BatchLayout(False, "each row attends to itself alone, proven on this model's logits"), attention
    if packing:
        raise ConfigError(
            f"rows cannot be packed: {reason}",
            place=Location(key="sft_args.packing"),
            hint="Set sft_args.packing: false.",
        )
    if wanted == "padding-free":
        raise ConfigError(f"rows cannot be laid end to end: {reason}", place=Location(key="sft_args.batching"))
    return BatchLayout(True, reason), attention
