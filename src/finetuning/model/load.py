"""A model from a folder or the hub, or one clear message why not.

What stands on a model's last layer: the vocabulary, or one score."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES
from finetuning.config.sections.model import Dtype, ModelArgs, NoQuantization, Quantized, RunConfig
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError, Location, MissingPackageError, ModelError
from finetuning.model.quantization import Sharding, choose_trainable_kernel, to_quantization_config
from finetuning.model.resolve import ModelLocation, resolve_model
from finetuning.model.safetensors_io import INDEX, SINGLE, read_model_headers
from finetuning.model.stop_tokens import fix_sampling_config


@dataclass(frozen=True)
class TaskHead:
    """A kind of model: the class that loads it, and which weights another kind's checkpoint lacks or has too many."""

    auto_class: str
    """Name of the class of transformers that loads it."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields that its config must have."""
    new: str | None = None
    """Pattern of the names of weights that start at zero when the checkpoint has none."""
    unused: str | None = None
    """Pattern of the names of weights that another head needs and this one does not."""

    @property
    def loader(self) -> Any:
        return getattr(transformers, self.auto_class)

    def missing(self, names: Sequence[str]) -> list[str]:
        """The weights, of those that a checkpoint lacks, that cannot be made here."""
        return [name for name in names if self.new is None or not re.fullmatch(self.new, name)]

    def unexpected(self, names: Sequence[str]) -> list[str]:
        """The weights, of those that have no place, that are worth a word."""
        return [name for name in names if self.unused is None or not re.match(self.unused, name)]

    def is_head(self, name: str) -> bool:
        """Whether a weight is one of the head, be the model bare or within an adapter that trains the head whole."""
        bare = re.sub(r"\.(modules_to_save\.\w+|original_module)(?=\.)", "", name)
        return self.new is not None and re.search(rf"(^|\.){self.new}$", bare) is not None

    def begin(self, model: PreTrainedModel, missing: Sequence[str]) -> bool:
        """Sets the weights that the checkpoint lacks to zero; True when there are any.

        Every score is then 0 at first, whatever the seed, so that the first loss is known.
        """
        made = [name for name in missing if self.new is not None and re.fullmatch(self.new, name)]
        with torch.no_grad():
            for name in made:
                model.get_parameter(name).zero_()
        return bool(made)


LANGUAGE = TaskHead("AutoModelForCausalLM")
SCORE = TaskHead(
    "AutoModelForSequenceClassification",
    fields={"num_labels": 1},
    new=r"(score|classifier)\.(weight|bias)",
    unused=r"(lm_head|output)\.",
)


def task_head_of(architectures: Sequence[str]) -> TaskHead:
    """The head of a saved model, by the architectures that its config names."""
    return SCORE if any(name.endswith("ForSequenceClassification") for name in architectures) else LANGUAGE


logger = logging.getLogger(__name__)

_KEY = "run_conf.model"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# `resolve_model` takes these; the rest of ModelArgs goes to `from_pretrained`.
_WHERE = ("revision", "subfolder", "cache_dir", "force_download", "local_files_only", "token")
# Arguments of `from_pretrained` that are neither ours nor a field of a model's config.
_PASSED_ON = ("max_memory", "attn_implementation", "offload_folder", "offload_buffers", "variant", "code_revision")
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


def load_model(
    run_conf: RunConfig,
    quant_conf: NoQuantization | Quantized | None = None,
    *,
    topology: ProcessTopology | None = None,
    sharded_by: Sharding | None = None,
    default_dtype: Dtype = "auto",
    head: TaskHead = LANGUAGE,
    key: str = _KEY,
) -> PreTrainedModel:
    """The model that `run_conf` names, on this process's device, in evaluation mode.

    `default_dtype` counts where model_args.dtype is `auto` (fp16 training needs float32 weights). `sharded_by` says
    that FSDP or DeepSpeed places the weights, so no device is chosen here. A `head` that the checkpoint lacks starts at
    zero.

    Raises:
        ModelError: it is not there, is damaged or pickled, lacks weights that its config asks for, or an argument is
            unknown to it.
        ConfigError: the device map does not go with the launcher.
        MissingPackageError: the attention implementation, or what quantises, is not installed.
    """
    args = run_conf.model_args
    check_attention(args.attn_implementation, key)
    where = {name: getattr(args, name) for name in _WHERE if name != "token"}
    token = args.token.get_secret_value() if args.token else None
    location = resolve_model(run_conf.model, "model", key=key, token=token, **where)
    arguments: dict[str, Any] = {
        "dtype": default_dtype if args.dtype == "auto" else args.dtype,
        "device_map": _device_map(args, topology or ProcessTopology(), sharded_by, key),
        "use_safetensors": _safetensors_only(location, args, key),
        "trust_remote_code": args.trust_remote_code,
    }
    arguments |= {name: value for name in _PASSED_ON if (value := getattr(args, name)) is not None}
    if isinstance(quant_conf, Quantized):
        arguments["quantization_config"] = to_quantization_config(quant_conf, sharded_by=sharded_by)
    config, extras = load_config(location, args, key)
    config.update(dict(head.fields))
    choose_trainable_kernel(config)
    model = _read(location, head, key, {"config": config, **arguments, **extras})
    if model.can_generate():
        # Every checkpoint saves these settings, and transformers refuses to save contradictory ones.
        for change in fix_sampling_config(model.generation_config):
            logger.info("%s: %s", location, change)
    return model


def _read(location: ModelLocation, head: TaskHead, key: str, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """The model as `from_pretrained` reads it, with a head.

    Raises:
        ModelError: it cannot be read, or lacks weights.
    """
    try:
        model, found = head.loader.from_pretrained(
            location.name, output_loading_info=True, **arguments, **location.hub_arguments
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
        _raise_unless_memory(error, location, key)
    _check_found(found, location, Location(key=key), head)
    if head.begin(model, sorted(found["missing_keys"])):
        logger.info("%s has no head that gives scores: a new one starts at zero", location)
    return model


def check_attention(implementation: str | None, key: str = _KEY) -> None:
    """Nothing when the attention implementation can be used here; looked at before a weight is loaded.

    Raises:
        MissingPackageError: its package is not installed; the message has the install line.
        ModelError: it is unknown, or needs a device that is not here.
    """
    if implementation is None:
        return
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    place = Location(key=f"{_args(key)}.attn_implementation")
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if "/" in implementation:
        if find_spec("kernels") is None:
            raise MissingPackageError(
                f"{implementation} is a kernel of the hub, and the package kernels is not installed",
                place=place,
                hint="It runs code from the hub. Use sdpa, or install it knowingly with: pip install kernels",
            )
        return
    if implementation not in known:
        near = get_close_matches(implementation, known, 1)
        raise ModelError(
            f"there is no attention implementation {implementation!r}",
            place=place,
            hint=f"Did you mean {near[0]}?" if near else f"Choose one of: {', '.join(sorted(known))}.",
        )
    if implementation in FLASH_ATTENTION_PACKAGES:
        package = FLASH_ATTENTION_PACKAGES[implementation]
        if not package.is_installed:
            raise MissingPackageError(
                f"{implementation} needs the package {package.distribution}, which is not installed",
                place=place,
                hint=f"Install it with: {package.install}; or use sdpa.",
            )
        if not torch.cuda.is_available():
            raise ModelError(f"{implementation} needs a CUDA or ROCm device; use sdpa here", place=place)


def _args(key: str) -> str:
    """The key of the model's arguments, beside the key that names the model."""
    return f"{key.rpartition('.')[0]}.model_args"


def _device_map(args: ModelArgs, topology: ProcessTopology, sharded_by: Sharding | None, key: str) -> Any:
    import torch

    if args.device_map is not None:
        place = Location(key=f"{_args(key)}.device_map")
        if sharded_by is not None:
            raise ConfigError(f"a device_map and {sharded_by} exclude each other; remove device_map", place=place)
        if topology.is_distributed and isinstance(args.device_map, str) and not _is_device(args.device_map):
            raise ConfigError(
                f"device_map: {args.device_map} spreads the model over all devices, and {topology.world_size} processes"
                " would each do so; remove device_map, or start one process",
                place=place,
            )
        return args.device_map
    if sharded_by is None and torch.cuda.is_available():
        return {"": topology.local_rank}
    return None


def _is_device(name: str) -> bool:
    return name == "cpu" or name.startswith(("cuda", "xpu", "mps"))


def _safetensors_only(location: ModelLocation, args: ModelArgs, key: str) -> bool | None:
    """Whether only safetensors are read. Pickled weights can carry code, so they are read only when asked for.

    Raises:
        ModelError: weights are missing or damaged, or only pickled ones are there.
    """
    asked = args.use_safetensors is False
    extra = args.model_extra or {}
    if location.folder is None or args.variant or "gguf_file" in extra or "key_mapping" in extra:
        return None if asked else True
    folder = location.folder
    if any((folder / name).is_file() for name in (INDEX, SINGLE)):
        read_model_headers(folder)
        return True
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles and asked:
        return False
    if pickles:
        raise ModelError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are opened",
            place=Location(key=key),
            hint=f"Convert them to safetensors, or set {_args(key)}.use_safetensors: false if you trust them.",
        )
    if any(folder.glob("*.safetensors")):
        return True
    raise ModelError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there", place=Location(key=key))


def load_config(location: ModelLocation, args: ModelArgs, key: str = _KEY) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The model's config with the user's fields set in it, and the arguments that are left for `from_pretrained`."""
    extras = dict(args.model_extra or {})
    loader = {name: extras.pop(name) for name in _LOADER_ARGUMENTS if name in extras}
    fields = extras | ({} if args.use_cache is None else {"use_cache": args.use_cache})
    if "gguf_file" in loader:
        fields["gguf_file"] = loader["gguf_file"]
    try:
        config, unused = AutoConfig.from_pretrained(
            location.name,
            return_unused_kwargs=True,
            trust_remote_code=args.trust_remote_code,
            code_revision=args.code_revision,
            **fields,
            **location.hub_arguments,
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        _raise_unless_memory(error, location, key)
    unknown = [name for name in unused if name in extras]
    if unknown:
        known = [*ModelArgs.model_fields, *_LOADER_ARGUMENTS, *config.to_dict()]
        near = get_close_matches(unknown[0], known, 1)
        raise ModelError(
            f"neither from_pretrained nor a {config.model_type} config knows {unknown[0]!r}",
            place=Location(key=f"{_args(key)}.{unknown[0]}"),
            hint=f"Did you mean {near[0]}?" if near else None,
        )
    return config, loader


def _raise_unless_memory(error: Exception, location: ModelLocation, key: str) -> None:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        raise error
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:3]) or type(error).__name__
    hint = None
    if isinstance(error, UnpicklingError):
        text = "its pickle holds other things than weights, and is not opened"
        hint = "Convert it to safetensors where its maker is trusted."
    elif "trust_remote_code" in text:
        text = "it comes with code of its own"
        hint = f"Set {_args(key)}.trust_remote_code: true to run it, and pin revision to a commit."
    raise ModelError(f"{location} cannot be loaded: {text}", place=Location(key=key), hint=hint) from error


def _check_found(found: Mapping[str, Any], location: ModelLocation, place: Location, head: TaskHead) -> None:
    missing = head.missing(sorted(found["missing_keys"]))
    mismatched = sorted(str(item) for item in found["mismatched_keys"])
    wrong = missing or mismatched
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        what = "lacks weights that its config asks for" if missing else "has weights of other shapes than its config"
        raise ModelError(
            f"{location} {what}: {', '.join(wrong[:4])}{more}",
            place=place,
            hint="They would be random numbers. Check that config.json and the weight files belong together.",
        )
    unexpected = head.unexpected(sorted(found["unexpected_keys"]))
    if unexpected:
        logger.warning(
            "%s holds %d tensors that its config has no place for, such as %s: they are not used",
            location,
            len(unexpected),
            unexpected[0],
        )
