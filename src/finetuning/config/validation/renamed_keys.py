"""Keys that transformers, TRL or PEFT renamed or removed, and how to translate them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial

from finetuning.config.yaml.document import ConfigDocument, KeyPath, ValidationIssue, YamlValue, dotted, to_problems
from finetuning.errors import Problem

Convert = Callable[[YamlValue], YamlValue]

_GONE = "no longer has an effect and is ignored"


@dataclass(frozen=True)
class RenamedKey:
    """A renamed key. Its value is converted; the key is dropped if the conversion returns None."""

    to: tuple[str, ...]
    convert: Convert = lambda value: value
    unset: YamlValue = None
    """Value of the new key that counts as not set, so that the old key takes effect."""


@dataclass(frozen=True)
class RemovedKey:
    """A key that no longer has an effect."""

    reason: str = ""
    always: bool = False
    """Drop the key even if the trainer's config still has it."""


@dataclass(frozen=True)
class RejectedKey:
    """A key that would change the result and is no longer supported."""

    instead: str


Change = RenamedKey | RemovedKey | RejectedKey


def _if_true(new: YamlValue, old: YamlValue) -> YamlValue:
    """Return the new value if the old one was true, else None."""
    return new if old is True or str(old).lower() in ("true", "yes", "on", "1") else None


def _share(value: YamlValue) -> YamlValue:
    """Return a fraction of all steps; None for the default 0."""
    return None if value == 0 else value


TRAINING_ARGS: dict[str, Change] = {
    "evaluation_strategy": RenamedKey(("eval_strategy",)),
    "warmup_ratio": RenamedKey(("warmup_steps",), _share, unset=0),
    "group_by_length": RenamedKey(("train_sampling_strategy",), partial(_if_true, "group_by_length")),
    "no_cuda": RenamedKey(("use_cpu",)),
    "adafactor": RenamedKey(("optim",), partial(_if_true, "adafactor")),
    "include_inputs_for_metrics": RenamedKey(("include_for_metrics",), partial(_if_true, ["inputs"])),
    "xpu_backend": RenamedKey(("ddp_backend",)),
    "push_to_hub_token": RenamedKey(("hub_token",)),
    "push_to_hub_model_id": RenamedKey(("hub_model_id",)),
    "dispatch_batches": RenamedKey(("accelerator_config", "dispatch_batches")),
    "split_batches": RenamedKey(("accelerator_config", "split_batches")),
    "fsdp_min_num_params": RenamedKey(("fsdp_config", "min_num_params"), lambda value: value or None),
    "fsdp_transformer_layer_cls_to_wrap": RenamedKey(("fsdp_config", "transformer_layer_cls_to_wrap")),
    "overwrite_output_dir": RemovedKey("a run never overwrites another one"),
    "save_safetensors": RemovedKey("weights are always saved as safetensors"),
    "include_tokens_per_second": RemovedKey("tokens per second are always logged"),
    "max_prompt_length": RemovedKey(
        "prompts are not shortened by themselves; max_length limits prompt and answer together"
    ),
    "max_completion_length": RemovedKey("max_length limits prompt and answer together"),
    "max_target_length": RemovedKey("max_length limits prompt and answer together"),
    "label_pad_token_id": RemovedKey("padding is never trained on"),
    "padding_value": RemovedKey("data_conf.missing_pad_token_strategy decides how rows are padded"),
    "is_encoder_decoder": RemovedKey("models are causal language models"),
    "generate_during_eval": RemovedKey(),
    "use_num_logits_to_keep": RemovedKey(),
    "use_logits_to_keep": RemovedKey(),
    "base_model_attribute_name": RemovedKey(),
    "model_adapter_name": RemovedKey(),
    "ref_adapter_name": RemovedKey(),
    "ref_model_init_kwargs": RemovedKey("the reference is loaded as run_conf.model_args say"),
    "force_use_ref_model": RemovedKey("the reference is always the model before training"),
    "resume_from_checkpoint": RemovedKey("run_conf.resume_from_checkpoint decides", always=True),
    "do_train": RemovedKey(always=True),
    "do_eval": RemovedKey("eval_strategy decides", always=True),
    "do_predict": RemovedKey(always=True),
    "half_precision_backend": RemovedKey(),
    "fp16_backend": RemovedKey(),
    "fp16_opt_level": RemovedKey(),
    "past_index": RemovedKey(),
    "use_mps_device": RemovedKey("the device is detected"),
    "use_ipex": RemovedKey(),
    "jit_mode_eval": RemovedKey(),
    "tpu_num_cores": RemovedKey(),
    "tpu_metrics_debug": RemovedKey(),
    "mp_parameters": RemovedKey(),
    "ray_scope": RemovedKey(),
    "torchdynamo": RemovedKey("torch_compile_backend names a compiler"),
    "use_legacy_prediction_loop": RemovedKey(),
    "push_to_hub_organization": RemovedKey("hub_model_id names the organization"),
    "per_gpu_train_batch_size": RejectedKey("Use batchsize_conf instead."),
    "per_gpu_eval_batch_size": RejectedKey("Use batchsize_conf.per_device_eval_batch_size instead."),
    # Translated for DPO by `_translate_preference_loss`, except with loss_weights.
    "rpo_alpha": RejectedKey("Use loss_type: [sigmoid, sft] with loss_weights: [1.0, alpha] instead."),
    "reference_free": RejectedKey("Every loss of the installed release has a reference."),
}
MODEL_ARGS: dict[str, Change] = {
    "torch_dtype": RenamedKey(("dtype",)),
    "use_auth_token": RenamedKey(("token",)),
    "use_flash_attention_2": RenamedKey(("attn_implementation",), partial(_if_true, "flash_attention_2")),
    "from_tf": RemovedKey(),
    "from_flax": RemovedKey(),
    "mirror": RemovedKey(),
}
TABLES: dict[KeyPath, dict[str, Change]] = {
    ("training_args",): TRAINING_ARGS,
    ("run_conf", "model_args"): MODEL_ARGS,
    ("model_conf", "model_args"): MODEL_ARGS,
}
"""Old keys by section."""
OLD_VALUES: dict[KeyPath, dict[str, str]] = {
    ("training_args", "optim"): {"adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"},
}
"""Old values by key, with their replacements."""


@dataclass(frozen=True)
class RenamedResult:
    """A document with current names, warnings about what was renamed, and issues that could not be resolved."""

    document: ConfigDocument
    warnings: list[Problem]
    findings: list[ValidationIssue]


_TEMPLATE = ("data_conf", "chat_template_name")
_SILOGEN_TEMPLATE = "mistral-with-system"
SILOGEN_KEYS: tuple[KeyPath, ...] = (
    ("data_conf", "training_data", "data_type"),
    ("data_conf", "validation_data", "data_type"),
    ("run_conf", "use_fast_tokenizer"),
    ("sft_args", "save_name_if_new_basemodel"),
)
"""Keys of Silogen's engine that nobody writes for this one."""


def _set_silogen_template(document: ConfigDocument) -> tuple[ConfigDocument, list[ValidationIssue]]:
    """Set the chat template that Silogen's engine uses where its config names none, with a warning."""
    section = document.get(("data_conf",))
    if not isinstance(section, dict) or {"chat_template_name", "chat_template"} & section.keys():
        return document, []
    if all(document.get(path) is None for path in SILOGEN_KEYS):
        return document, []
    issue = ValidationIssue(
        ("data_conf",),
        f"names no chat template: {_SILOGEN_TEMPLATE} is used, the default of Silogen's engine, whose keys this file"
        " has.",
        f'Write "chat_template_name: {_SILOGEN_TEMPLATE}", or keep-original for the template of the tokenizer.',
        kind="warning",
    )
    return document.with_value(_TEMPLATE, _SILOGEN_TEMPLATE), [issue]


def apply_renames(document: ConfigDocument, trainer_fields: Callable[[], Container[str]] = frozenset) -> RenamedResult:
    """Replace old keys by current ones, with a warning for each.

    Args:
        trainer_fields: returns the fields of this algorithm's trainer. A name that is old for one may be current for
            another.
    """
    written = document
    document, findings = _set_silogen_template(document)
    if "loss_weights" in trainer_fields():
        document, more = _translate_preference_loss(document)
        findings += more
    for section, table in TABLES.items():
        values = document.get(section)
        for key in [key for key in table if key in values] if isinstance(values, dict) else []:
            change = table[key]
            is_dropped = isinstance(change, RemovedKey) and change.always
            if section == ("training_args",) and not is_dropped and key in trainer_fields():
                continue
            for result in _change(document, section, key, change):
                if isinstance(result, ConfigDocument):
                    document = result
                else:
                    findings.append(result)
    for path, names in OLD_VALUES.items():
        value = document.get(path)
        if isinstance(value, str) and value in names:
            hint = f'Write "{path[-1]}: {names[value]}".'
            findings.append(
                ValidationIssue(path, f'"{value}" was removed; "{names[value]}" is used instead.', hint, kind="warning")
            )
            document = document.with_value(path, names[value])
    warnings = [finding for finding in findings if finding.kind == "warning"]
    return RenamedResult(
        document, to_problems(warnings, written), [item for item in findings if item.kind != "warning"]
    )


def _translate_preference_loss(document: ConfigDocument) -> tuple[ConfigDocument, list[ValidationIssue]]:
    """Replace losses of earlier releases of TRL's DPO trainer by their equivalents, with a warning for each.

    Source: TRL 0.13, `DPOTrainer.dpo_loss` and `get_batch_loss_metrics`: `aot_pair` sorted chosen and rejected
    log-ratios separately, `exo_pair` replaced a label smoothing of 0 by 0.001, and `rpo_alpha` added the cross-entropy
    of the chosen answers with that weight.
    """
    issues: list[ValidationIssue] = []
    section = ("training_args",)
    loss, smoothing, alpha = ((*section, key) for key in ("loss_type", "label_smoothing", "rpo_alpha"))

    def warn(path: KeyPath, message: str, hint: str) -> None:
        issues.append(ValidationIssue(path, message, hint, kind="warning"))

    value = document.get(loss)
    names = value if isinstance(value, list) else [value]
    if "aot_pair" in names:
        names = ["aot_unpaired" if name == "aot_pair" else name for name in names]
        document = document.with_value(loss, names if isinstance(value, list) else names[0])
        warn(loss, '"aot_pair" was renamed to "aot_unpaired".', 'Write "aot_unpaired".')
    if "exo_pair" in names and document.get(smoothing) in (None, 0):
        document = document.with_value(smoothing, 0.001)
        warn(
            loss, '"exo_pair" needs label smoothing; label_smoothing: 0.001 is used.', 'Write "label_smoothing: 0.001".'
        )
    weight = document.get(alpha)
    if isinstance(weight, bool):
        return document, issues
    if isinstance(weight, int | float) and document.get((*section, "loss_weights")) is None and "sft" not in names:
        mixed: list[YamlValue] = [*("sigmoid" if name is None else name for name in names), "sft"]
        weights: list[YamlValue] = [1.0 for _ in names]
        weights.append(float(weight))
        mark = document.mark_of(alpha)
        document = document.without(alpha)
        document = document.with_value(loss, mixed).with_value((*section, "loss_weights"), weights)
        if mark is not None:
            document = document.with_marks({(*section, "loss_weights"): mark})
        written = f"loss_type: [{', '.join(map(str, mixed))}] with loss_weights: {weights}"
        warn(alpha, "was replaced by a weighted sft loss.", f"Write {written}.")
    elif weight is None:
        document = document.without(alpha)
    return document, issues


def _change(
    document: ConfigDocument, section: KeyPath, key: str, change: Change
) -> Iterator[ValidationIssue | ConfigDocument]:
    old = (*section, key)
    if isinstance(change, RejectedKey):
        yield ValidationIssue(old, "is no longer supported.", change.instead)
        yield document.without(old)
    elif isinstance(change, RemovedKey):
        reason = f": {change.reason}" if change.reason else ""
        yield ValidationIssue(old, f"{_GONE}{reason}.", "Remove it.", kind="warning")
        yield document.without(old)
    else:
        yield from _rename(document, section, old, change)


def _rename(
    document: ConfigDocument, section: KeyPath, old: KeyPath, change: RenamedKey
) -> Iterator[ValidationIssue | ConfigDocument]:
    new_name = ".".join(change.to)
    new = (*section, *change.to)
    old_value = document.get(old)
    value = change.convert(old_value)
    mark = document.mark_of(old)
    outer, without = document.get(new[:-1]), document.without(old)
    if change.to == ("warmup_steps",) and isinstance(old_value, int | float) and old_value >= 1:
        yield ValidationIssue(
            old, f"must be a fraction of the steps, below 1 (got {old_value})", f'It was renamed to "{new_name}".'
        )
        yield without
    elif document.get(new) not in (None, change.unset):
        yield ValidationIssue(
            old, f'was renamed to "{new_name}", which is also set and takes precedence.', "Remove it.", kind="warning"
        )
        yield without
    elif outer is not None and not isinstance(outer, dict):
        yield ValidationIssue(old, f'was renamed to "{new_name}", but "{dotted(new[:-1])}" is not a section.')
        yield without
    else:
        yield ValidationIssue(old, f'was renamed to "{new_name}".', f"Write {_example(change, value)}.", kind="warning")
        if value is not None:
            if outer is None:
                without = without.with_value(new[:-1], {})
            without = without.with_value(new, value)
            if mark is not None:
                without = without.with_marks({new: mark})
        yield without


def _example(change: RenamedKey, value: YamlValue) -> str:
    name = ".".join(change.to)
    plain = isinstance(value, str | int | float) and name not in ("hub_token", "token")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f'"{name}: {text}"' if plain else f'"{name}" instead'
