"""Load a pretrained model with its task head from a folder or the Hugging Face hub.

`load_model` is the entry point. Anything that would leave a model with random or unexpected weights is an error here:
transformers itself only warns about missing and mismatched keys.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto

from finetuning.config.pretrained_config import (
    FLASH_ATTENTION_PACKAGES,
    find_excessive_size,
    find_pretrained_config,
    missing_attention_package,
    read_pretrained_config,
)
from finetuning.config.sections.model import Dtype, ModelArgs, NoQuantization, Quantized, RunConfig
from finetuning.distributed import ProcessTopology, announce_wait
from finetuning.errors import ConfigError, Location, ModelError, reading
from finetuning.model.resolve import ModelLocation, resolve_model
from finetuning.model.safetensors_io import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, read_model_headers
from finetuning.model.saved_weights import has_safetensors, restore_padding_rows
from finetuning.model.stop_tokens import fix_sampling_config

if TYPE_CHECKING:
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    from finetuning.model.quantization import Sharding

logger = logging.getLogger(__name__)

_KEY = "run_conf.model"
_CAUSAL_TYPES = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_CAUSAL_CLASSES = frozenset(_CAUSAL_TYPES.values())
_IMAGE_CLASSES = frozenset(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
_SOUND_CLASSES = frozenset(
    [
        *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES.values(),
    ]
).difference(_IMAGE_CLASSES)
_CLASSIFIERS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Fields of ModelArgs that `resolve_model` takes; the others go to `from_pretrained`.
_HUB_ARGUMENTS = ("revision", "subfolder", "cache_dir", "force_download", "local_files_only", "token")
_FORWARDED_ARGUMENTS = (
    "max_memory",
    "attn_implementation",
    "offload_folder",
    "offload_buffers",
    "variant",
    "code_revision",
)
# Arguments of `from_pretrained` that ModelArgs does not declare. Any other extra key is a field of the model's config.
_LOADER_ARGUMENTS = (
    "adapter_kwargs",
    "disable_mmap",
    "distributed_config",
    "experts_implementation",
    "fusion_config",
    "gguf_file",
    "ignore_mismatched_sizes",
    "kernel_config",
    "key_mapping",
    "tp_plan",
    "tp_size",
    "use_kernels",
)


@dataclass(frozen=True)
class TaskHead:
    """A task head: the auto class that loads it, and how its weights may differ from the checkpoint's."""

    auto_class_name: str
    """Name of the transformers auto class, such as `AutoModelForCausalLM`."""
    config_fields: Mapping[str, object] = field(default_factory=dict)
    """Fields that the model's config must have."""
    zero_initialized: str | None = None
    """Pattern of the weight names that are set to zero when the checkpoint does not have them."""
    ignored: str | None = None
    """Pattern of the checkpoint's weight names that belong to another task head and are silently dropped."""

    @property
    def auto_class(self) -> type[_BaseAutoModelClass]:
        return getattr(transformers, self.auto_class_name)

    def for_config(self, config: PreTrainedConfig) -> TaskHead:
        """Return the head for a model: one that takes images keeps the class that its checkpoint names."""
        if self is not CAUSAL_LM:
            return self
        named = task_head_for(config.architectures or ())
        return IMAGE_TEXT_TO_TEXT if named is IMAGE_TEXT_TO_TEXT else self

    def required_missing(self, missing_keys: Sequence[str]) -> list[str]:
        """Return the missing keys that cannot be initialized here: the checkpoint is unusable without them."""
        return [name for name in missing_keys if not self._is_zero_initialized(name)]

    def unexpected(self, unexpected_keys: Sequence[str]) -> list[str]:
        """Return the unexpected keys that do not belong to another task head."""
        return [name for name in unexpected_keys if self.ignored is None or not re.match(self.ignored, name)]

    def is_head_weight(self, name: str) -> bool:
        """Whether a parameter belongs to the head, in the plain model or under PEFT's `modules_to_save` wrapper."""
        unwrapped = re.sub(r"\.(modules_to_save\.\w+|original_module)(?=\.)", "", name)
        return (
            self.zero_initialized is not None and re.search(rf"(^|\.){self.zero_initialized}$", unwrapped) is not None
        )

    def zero_initialize(self, model: PreTrainedModel, missing_keys: Sequence[str]) -> bool:
        """Set the head weights that the checkpoint lacks to zero; return whether there were any.

        With a zero head every score starts at 0 whatever the seed, so the initial loss of a reward model is known
        (log 2) and can be checked.
        """
        names = [name for name in missing_keys if self._is_zero_initialized(name)]
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).zero_()
        return bool(names)

    def _is_zero_initialized(self, name: str) -> bool:
        return self.zero_initialized is not None and re.fullmatch(self.zero_initialized, name) is not None


CAUSAL_LM = TaskHead("AutoModelForCausalLM")
IMAGE_TEXT_TO_TEXT = TaskHead("AutoModelForImageTextToText")
SEQUENCE_CLASSIFICATION = TaskHead(
    "AutoModelForSequenceClassification",
    config_fields={"num_labels": 1},
    zero_initialized=r"(score|classifier)\.(weight|bias)",
    ignored=r"(lm_head|output)\.",
)


def task_head_for(architectures: Sequence[str]) -> TaskHead:
    """Return the task head of a saved model, given the `architectures` of its config."""
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return SEQUENCE_CLASSIFICATION
    takes_images = not _IMAGE_CLASSES.isdisjoint(architectures)
    return IMAGE_TEXT_TO_TEXT if takes_images and _CAUSAL_CLASSES.isdisjoint(architectures) else CAUSAL_LM


def check_class(config: PreTrainedConfig, source: ModelLocation, key: str = _KEY) -> None:
    """Check that a checkpoint's class writes text from left to right, so that loading it as such drops no weights.

    Raises:
        ModelError: it does not; says what it is, and what to use.
    """
    name = next(iter(config.architectures or ()), None)
    is_known = name in _CAUSAL_CLASSES or (name in _IMAGE_CLASSES and not config.is_encoder_decoder)
    if name is None or is_known or getattr(config, "auto_map", None):
        return
    hint = "Choose a model that writes text from left to right, such as one of the Llama, Qwen or Gemma families."
    if name.endswith("ForSequenceClassification"):
        what, hint = "a classifier", "Train it with `finetuning reward`, or name the model that it was made from."
    elif name.endswith(_CLASSIFIERS):
        what = "a classifier"
    elif name.endswith("ForMaskedLM"):
        what = "a masked language model, which fills gaps in a text"
    elif name in _SOUND_CLASSES:
        what = "a model that takes sound"
    elif config.is_encoder_decoder:
        what = "an encoder-decoder"
    elif config.model_type not in _CAUSAL_TYPES and config.model_type in CONFIG_MAPPING:
        what = "not a language model"
    else:
        return
    raise ModelError(
        f"{source} is {what} ({name}), which the engine does not train", location=Location(key=key), hint=hint
    )


def check_score_head(run_conf: RunConfig) -> None:
    """Check that transformers has a class with a score for the model, if its config is on this machine.

    Raises:
        ModelError: it has none, or one with an encoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    config = find_pretrained_config(run_conf.model) or {}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or run_conf.model_args.trust_remote_code:
        return
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"the score of a {model_type} model needs its encoder, and the engine trains decoders alone: it cannot be a"
            " reward model",
            location=Location(key=_KEY),
            hint="Choose another model, such as one of the Llama or Qwen families.",
        )
    if model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ModelError(
            f"transformers has no decoder with a score for the model type {model_type}, so that it cannot be a reward"
            " model",
            location=Location(key=_KEY),
            hint="Choose another model, such as one of the Llama or Qwen families.",
        )


def load_model(
    run_conf: RunConfig,
    quant_conf: NoQuantization | Quantized | None = None,
    *,
    topology: ProcessTopology | None = None,
    sharded_by: Sharding | None = None,
    dtype: Dtype | None = None,
    head: TaskHead = CAUSAL_LM,
    key: str = _KEY,
) -> PreTrainedModel:
    """Load the model that `run_conf` names onto this process's device, in evaluation mode.

    Args:
        dtype: dtype to load in, instead of model_args.dtype. Training passes the one that trained weights are held in.
        sharded_by: set when FSDP or DeepSpeed places the weights; no device is chosen here then.
        head: the task head. Head weights that the checkpoint lacks are set to zero.
        key: config key of the model, for error messages.

    Raises:
        ModelError: the model does not exist, is damaged or pickled, lacks weights that its config requires, or does
            not take one of the arguments.
        ConfigError: the device map conflicts with the launcher.
        MissingPackageError: the quantization backend is not installed.
    """
    source, arguments = loading_arguments(
        run_conf,
        quant_conf,
        topology=topology,
        sharded_by=sharded_by,
        dtype=dtype,
        head=head,
        key=key,
    )
    model = _load_pretrained(source, head, key, arguments)
    if model.can_generate():
        # Every checkpoint saves the generation config, and transformers refuses to save contradictory sampling flags.
        for change in fix_sampling_config(model.generation_config):
            logger.info("%s: %s", source, change)
    return model


def loading_arguments(
    run_conf: RunConfig,
    quant_conf: NoQuantization | Quantized | None = None,
    *,
    topology: ProcessTopology | None = None,
    sharded_by: Sharding | None = None,
    dtype: Dtype | None = None,
    head: TaskHead = CAUSAL_LM,
    key: str = _KEY,
) -> tuple[ModelLocation, dict[str, object]]:
    """Return where the model is, and the arguments of `from_pretrained`, with its config. Reads no weights.

    The arguments and errors are those of `load_model`, as far as the files show them without their tensors.
    """
    args = run_conf.model_args
    attention = usable_attn_implementation(args.attn_implementation, key)
    if attention != args.attn_implementation:
        args = args.model_copy(update={"attn_implementation": attention})
    hub_arguments = {name: getattr(args, name) for name in _HUB_ARGUMENTS if name != "token"}
    token = args.token.get_secret_value() if args.token else None
    source = resolve_model(run_conf.model, "model", key=key, token=token, **hub_arguments)
    arguments: dict[str, object] = {
        "dtype": dtype or args.dtype,
        "device_map": _device_map(args, topology or ProcessTopology(), sharded_by, key),
        "use_safetensors": _safetensors_only(source, args, key),
        "trust_remote_code": args.trust_remote_code,
    }
    arguments |= {name: value for name in _FORWARDED_ARGUMENTS if (value := getattr(args, name)) is not None}
    if isinstance(quant_conf, Quantized):
        from finetuning.model.quantization import to_quantization_config

        arguments["quantization_config"] = to_quantization_config(quant_conf, sharded_by=sharded_by)
    config, loader_arguments = load_pretrained_config(source, args, key)
    if head is CAUSAL_LM:
        check_class(config, source, key)
    config.update(dict(head.config_fields))
    if getattr(config, "quantization_config", None) is not None:
        from finetuning.model.quantization import select_trainable_gptq_kernel

        select_trainable_gptq_kernel(config)
    return source, {"config": config, **arguments, **loader_arguments}


def _load_pretrained(
    source: ModelLocation, head: TaskHead, key: str, arguments: Mapping[str, object]
) -> PreTrainedModel:
    """Call `from_pretrained` and check which weights it loaded.

    Raises:
        ModelError: the checkpoint cannot be loaded, or weights are missing.
    """
    config = arguments["config"]
    assert isinstance(config, PreTrainedConfig)
    head = head.for_config(config)
    with _loading(source, key):
        model, loading_info = head.auto_class.from_pretrained(
            source.name, output_loading_info=True, **arguments, **source.hub_kwargs
        )
    _check_loading_info(loading_info, source, Location(key=key), head)
    if source.folder is not None and has_safetensors(source.folder):
        for name in restore_padding_rows(model, source.folder):
            logger.warning(
                "transformers sets the padding token's row of %s to zero when it loads %s: restored from the file."
                " Other programs that load it with transformers compute with zeros",
                name,
                type(model).__name__,
            )
    if head.zero_initialize(model, sorted(loading_info["missing_keys"])):
        logger.info("%s has no score head: a new one is initialized to zero", source)
    return model


def usable_attn_implementation(implementation: str | None, key: str = _KEY) -> str | None:
    """Return the attention implementation, or None with a warning if it cannot run here: transformers then chooses.

    Raises:
        ModelError: it is unknown.
    """
    if implementation is None:
        return None
    setting = f"{_model_args_key(key)}.attn_implementation"
    supported = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if "/" not in implementation and implementation not in supported:
        near = get_close_matches(implementation, supported, 1)
        raise ModelError(
            f"unknown attention implementation {implementation!r}",
            location=Location(key=setting),
            hint=f"Did you mean {near[0]}?" if near else f"Choose one of: {', '.join(sorted(supported))}.",
        )
    missing = missing_attention_package(implementation)
    if missing is not None:
        why = f"needs the package {missing}, which is not installed"
    elif implementation in FLASH_ATTENTION_PACKAGES and not torch.cuda.is_available():
        why = "needs a CUDA or ROCm device, and there is none"
    else:
        return implementation
    logger.warning("%s: %s %s; sdpa is used instead", setting, implementation, why)
    return None


def _model_args_key(key: str) -> str:
    """Return the config key of the model arguments that go with the model named by `key`."""
    return f"{key.rpartition('.')[0]}.model_args"


def _device_map(
    args: ModelArgs, topology: ProcessTopology, sharded_by: Sharding | None, key: str
) -> dict[str, int | str] | str | None:
    if args.device_map is not None:
        location = Location(key=f"{_model_args_key(key)}.device_map")
        if sharded_by is not None:
            raise ConfigError(
                f"device_map cannot be combined with {sharded_by}, which places the weights itself; remove device_map",
                location=location,
            )
        if topology.is_distributed and isinstance(args.device_map, str) and not _is_device(args.device_map):
            raise ConfigError(
                f"device_map: {args.device_map} spreads the model over all devices, in each of {topology.world_size}"
                " processes; remove device_map, or run a single process",
                location=location,
            )
        return args.device_map
    if sharded_by is None and torch.cuda.is_available():
        return {"": topology.local_rank}
    return None


def _is_device(name: str) -> bool:
    return name == "cpu" or name.startswith(("cuda", "xpu", "mps"))


def _safetensors_only(source: ModelLocation, args: ModelArgs, key: str) -> bool | None:
    """Return `use_safetensors` for `from_pretrained`; None lets it load pickled weights too.

    Unpickling can execute code, so pickled weights are only loaded when the user asks for them.

    Raises:
        ModelError: weights are missing or damaged, or there are only pickled ones.
    """
    allows_pickle = args.use_safetensors is False
    extra = args.model_extra or {}
    if source.folder is None or args.variant or "gguf_file" in extra or "key_mapping" in extra:
        return None if allows_pickle else True
    folder = source.folder
    if any((folder / name).is_file() for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)):
        # Reading the headers finds truncated and missing shards in milliseconds, before minutes of loading.
        read_model_headers(folder)
        return True
    pickles = [name for name in _PICKLED_WEIGHTS if (folder / name).is_file()]
    if pickles and allows_pickle:
        return False
    if pickles:
        raise ModelError(
            f"{folder} has only pickled weights ({pickles[0]}), which can execute code when they are loaded",
            location=Location(key=key),
            hint=f"Convert them to safetensors, or set {_model_args_key(key)}.use_safetensors: false if you trust"
            " them.",
        )
    if any(folder.glob("*.safetensors")):
        return True
    raise ModelError(
        f"{folder} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} exists",
        location=Location(key=key),
    )


def load_pretrained_config(
    source: ModelLocation, args: ModelArgs, key: str = _KEY
) -> tuple[PreTrainedConfig, dict[str, object]]:
    """Return the model's config with the user's fields applied, and the extra arguments for `from_pretrained`.

    Raises:
        ModelError: the config cannot be loaded, or an extra key is neither an argument nor a config field.
    """
    extras: dict[str, object] = dict(args.model_extra or {})
    loader_arguments = {name: extras.pop(name) for name in _LOADER_ARGUMENTS if name in extras}
    fields = extras | ({} if args.use_cache is None else {"use_cache": args.use_cache})
    if "gguf_file" in loader_arguments:
        fields["gguf_file"] = loader_arguments["gguf_file"]
    if source.folder is not None:
        check_config_size(source.folder, key)
    with _loading(source, key):
        config, unused = AutoConfig.from_pretrained(
            source.name,
            return_unused_kwargs=True,
            trust_remote_code=args.trust_remote_code,
            code_revision=args.code_revision,
            **fields,
            **source.hub_kwargs,
        )
    assert isinstance(config, PreTrainedConfig)
    unknown = [name for name in unused if name in extras]
    if unknown:
        supported = [*ModelArgs.model_fields, *_LOADER_ARGUMENTS, *config.to_dict()]
        near = get_close_matches(unknown[0], supported, 1)
        raise ModelError(
            f"{unknown[0]!r} is neither an argument of from_pretrained nor a field of a {config.model_type} config",
            location=Location(key=f"{_model_args_key(key)}.{unknown[0]}"),
            hint=f"Did you mean {near[0]}?" if near else None,
        )
    return config, loader_arguments


def check_config_size(folder: Path, key: str = _KEY) -> None:
    """Raise ModelError if the config.json in a folder asks for a model that no machine could build."""
    has_weights = any((folder / name).is_file() for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
    num_tensors = len(read_model_headers(folder)) if has_weights else None
    excess = find_excessive_size(read_pretrained_config(str(folder)) or {}, num_tensors)
    if excess:
        raise ModelError(f"{folder / 'config.json'} cannot be right: {excess}", location=Location(key=key))


@contextmanager
def _loading(source: ModelLocation, key: str) -> Iterator[None]:
    """Turn errors of the block into a ModelError that says what to do; see `reading`."""
    problem = f"{source} cannot be loaded"
    try:
        # From the hub this may be a download.
        with reading(problem, location=Location(key=key)), announce_wait(f"{source} to load", after_s=30.0):
            yield
    except ModelError as error:
        if isinstance(error.__cause__, UnpicklingError):
            text = "its pickle file contains more than weights, so it was not loaded"
            hint = "If you trust its author, convert it to safetensors."
        elif "trust_remote_code" in str(error):
            text = "it needs custom code from its repository"
            hint = f"Set {_model_args_key(key)}.trust_remote_code: true to run it, and pin revision to a commit."
        else:
            raise
        raise ModelError(f"{problem}: {text}", location=Location(key=key), hint=hint) from error.__cause__


def _check_loading_info(
    loading_info: Mapping[str, Sequence[object]], source: ModelLocation, location: Location, head: TaskHead
) -> None:
    missing = head.required_missing(sorted(str(name) for name in loading_info["missing_keys"]))
    mismatched = sorted(str(item) for item in loading_info["mismatched_keys"])
    wrong = missing or mismatched
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        what = (
            "is missing weights that its config requires"
            if missing
            else "has weights whose shapes differ from its config"
        )
        raise ModelError(
            f"{source} {what}: {', '.join(wrong[:4])}{more}",
            location=location,
            hint="They would be initialized randomly. Check that config.json and the weight files belong together.",
        )
    unexpected = head.unexpected(sorted(str(name) for name in loading_info["unexpected_keys"]))
    if unexpected:
        logger.warning(
            "%s has %d tensors that its architecture does not use, such as %s; they are ignored",
            source,
            len(unexpected),
            unexpected[0],
        )
