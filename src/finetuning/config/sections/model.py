"""`run_conf`, `peft_conf` and `quant_conf`: the model, its adapter and its quantization."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, SecretStr, Tag

from finetuning.config.sections.section import ConfigSection, PathName
from finetuning.config.yaml.document import YamlValue

Dtype = Literal["auto", "float32", "float16", "bfloat16"]


class ModelArgs(ConfigSection):
    """Arguments passed to `AutoModelForCausalLM.from_pretrained`.

    Keys that are not listed here are passed through if `from_pretrained` or the model's config class accepts them.
    """

    model_config = ConfigDict(extra="allow")

    dtype: Dtype = "auto"
    """Data type to load the weights in. `auto` keeps the dtype of the checkpoint."""
    device_map: dict[str, int | str] | str | None = None
    """Device of each module. By default each process uses the single device that the launcher assigned to it."""
    max_memory: dict[int | str, str | int] | None = None
    """Maximum memory per device, for an automatic `device_map`."""
    low_cpu_mem_usage: bool | None = None
    """Accepted for compatibility and ignored: weights are always loaded without a second copy in memory."""
    attn_implementation: str | None = None
    """Attention implementation: `eager`, `sdpa`, `flash_attention_2`, …. By default FlashAttention if it is installed,
    the batches are padding-free and its logits match those of `sdpa`, or of `eager` for models without `sdpa`, which
    are used otherwise. One that cannot run on this machine is replaced in the same way, with a warning."""
    offload_folder: str | None = None
    """Folder for weights that `device_map` offloads to disk."""
    offload_state_dict: bool | None = None
    """Accepted for compatibility."""
    offload_buffers: bool | None = None
    """Offload buffers together with the weights."""
    use_cache: bool | None = None
    """Use the key-value cache. Always disabled during training with gradient checkpointing."""
    cache_dir: str | None = None
    """Folder to cache downloaded models in."""
    force_download: bool | None = None
    """Download the model even if it is in the cache."""
    local_files_only: bool | None = None
    """Only use local files; never contact the Hub."""
    proxies: dict[str, str] | None = None
    """Accepted for compatibility. Set HTTPS_PROXY in the environment instead."""
    resume_download: bool | None = None
    """Accepted for compatibility: downloads are always resumed."""
    revision: str = "main"
    """Branch, tag or commit of the model on the Hub."""
    code_revision: str | None = None
    """Branch, tag or commit of the remote code on the Hub, if it differs from `revision`."""
    subfolder: str | None = None
    """Subfolder of the model repository that holds the model."""
    token: SecretStr | None = Field(default=None, exclude=True)
    """Hub access token. Prefer HF_TOKEN in the environment. Never logged or saved."""
    use_safetensors: bool | None = None
    """`true` loads safetensors files only, `false` also loads pickled weights."""
    variant: str | None = None
    """Variant of the weight files, such as `fp16`."""
    trust_remote_code: bool = False
    """Run Python code from the model repository. The code runs with your permissions: pin `revision` to a commit."""


ModelPart = Literal["language_model", "projector", "vision_tower"]
"""The parts of a model that takes images."""


class RunConfig(ConfigSection):
    """Model, checkpoints and limits of the run."""

    model: str = Field(default="/local_resources/basemodel", min_length=1)
    """Local path or Hugging Face Hub id of the model to train."""
    model_args: ModelArgs = ModelArgs()
    """Arguments passed to `AutoModelForCausalLM.from_pretrained`."""
    tokenizer: str | None = None
    """Local path or Hub id of the tokenizer. Defaults to the model's tokenizer."""
    embedding_size_multiple_of: int = Field(default=1, ge=1)
    """Round the number of embedding rows up to a multiple of this when new tokens need more rows than there are."""
    train_parts: list[ModelPart] = Field(default=["language_model"], min_length=1)
    """The parts of a vision-language model that are trained: `language_model`, `projector` and `vision_tower`. An
    adapter goes into the modules of these parts only, whatever other modules have the names in `target_modules`. The
    other parts are frozen, and saved with the model. Models that take text only have no such parts."""
    use_fast_tokenizer: bool = True
    """Accepted for compatibility: only fast tokenizers are supported, because loss masks need character offsets."""
    resume_from_checkpoint: bool | str = False
    """`auto` resumes from the latest checkpoint if there is one, `true` requires one, `false` starts from scratch, and
    a path resumes from that checkpoint."""
    on_existing_run: Literal["error", "move"] = "error"
    """What to do with checkpoints and a final model in `output_dir` that this run does not continue, because it starts
    from scratch or trains further than the run that ended: `error` stops, `move` moves them to a folder `earlier-N` in
    `output_dir`."""
    final_checkpoint_name: PathName = "checkpoint-final"
    """Name of the folder in `output_dir` that the final model is saved to."""
    determinism: Literal["no", "half", "full"] = "no"
    """`half` prefers deterministic operations, `full` raises an error for non-deterministic ones. Both are slower."""
    allow_changed: list[str] = Field(default_factory=list)
    """Config keys that may change when a run resumes even though the change alters the training trajectory, such as
    `training_args.learning_rate`. `data`, `model`, `versions` and `code` stand for the contents of the data, the model,
    the package versions, and the source of reward functions and `trainer_mixin`. Any other such change is an error."""
    memory_check: Literal["auto"] | bool = "auto"
    """Run one forward and backward pass on the longest training and validation rows before the first step, and halve
    the per-device batch size until they fit into memory. `auto` enables it on GPUs."""
    trainer_mixin: str | None = Field(default=None, pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """`path/to/file.py:Class` or `package.module:Class`: a class whose methods, such as `compute_loss` and
    `create_optimizer`, come before those of the trainer. In it `super()` is the trainer. Running the config runs this
    code."""
    max_time: str | None = Field(default=None, pattern=r"^(\d+[dhms])+$")
    """Maximum training time of this job, such as `3h` or `1h30m`. The run then saves a checkpoint and exits with code
    143."""
    name_hung_after: float = Field(default=300.0, gt=0)
    """Seconds without progress after which a hung process is named, and after twice as many the job ends with exit code
    203. Only with several processes, between the first and the last step, and not during a save."""
    copy_checkpoints_to: str | None = None
    """Upload each complete checkpoint and the final model to this fsspec URL, such as `s3://bucket/run`. Uploads run in
    the background; a failed upload is a warning. The run waits for pending uploads before it exits."""


class NoPeft(ConfigSection):
    """Full fine-tuning: train all weights."""

    peft_type: Literal["NO_PEFT"]


class PretrainedPeft(ConfigSection):
    """Continue training an existing adapter."""

    peft_type: Literal["PRETRAINED_PEFT"]
    name_or_path: str = Field(min_length=1)
    """Local path or Hub id of the adapter."""


class NewPeft(ConfigSection):
    """Train a new adapter, of any PEFT type that supports causal language models."""

    peft_type: str = Field(json_schema_extra={"not": {"enum": ["NO_PEFT", "PRETRAINED_PEFT"]}})
    """Adapter type: a name from `peft.PeftType`, such as LORA."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """PEFT task type. Always CAUSAL_LM."""
    peft_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the PEFT config of this adapter type, such as `r` and `target_modules` for LORA."""
    alora_invocation_string: str | None = Field(default=None, min_length=1)
    """Activated LoRA (aLoRA): the text that activates the adapter, such as the start of an assistant turn in the chat
    template. Every row must contain it. Tokens before it are computed by the base model, whose key-value cache can be
    reused."""


def peft_kind(value: YamlValue | NoPeft | PretrainedPeft | NewPeft) -> str:
    """Return the tag of the `PeftConfig` member that a value selects."""
    peft_type = value.get("peft_type") if isinstance(value, dict) else getattr(value, "peft_type", None)
    return peft_type if peft_type in ("NO_PEFT", "PRETRAINED_PEFT") else "NEW_PEFT"


PeftConfig = Annotated[
    Annotated[NoPeft, Tag("NO_PEFT")]
    | Annotated[PretrainedPeft, Tag("PRETRAINED_PEFT")]
    | Annotated[NewPeft, Tag("NEW_PEFT")],
    Discriminator(peft_kind),
]


class NewScorePeft(NewPeft):
    """Train a new adapter, of any PEFT type that supports sequence classification, together with the score head."""

    # Sound because sections are frozen, which a type checker does not see in `model_config`.
    task_type: Literal["SEQ_CLS"] = "SEQ_CLS"  # pyright: ignore[reportIncompatibleVariableOverride]
    """PEFT task type. Always SEQ_CLS, so that the score head is trained and saved with the adapter."""


ScorePeftConfig = Annotated[
    Annotated[NoPeft, Tag("NO_PEFT")]
    | Annotated[PretrainedPeft, Tag("PRETRAINED_PEFT")]
    | Annotated[NewScorePeft, Tag("NEW_PEFT")],
    Discriminator(peft_kind),
]


class NoQuantization(ConfigSection):
    """Load the weights without quantization."""

    quantization_type: Literal["no-quantization"] = "no-quantization"


class BitsAndBytes(ConfigSection):
    """Quantize to 8 or 4 bits with bitsandbytes. The fields are those of `transformers.BitsAndBytesConfig`."""

    quantization_type: Literal["bits-and-bytes"]
    load_in_8bit: bool = False
    """Quantize the weights to 8 bits (LLM.int8())."""
    load_in_4bit: bool = False
    """Quantize the weights to 4 bits, as in QLoRA."""
    llm_int8_threshold: float = Field(default=6.0, ge=0)
    """Outlier threshold of LLM.int8(): activations above this magnitude are computed in 16 bits."""
    llm_int8_skip_modules: list[str] | None = None
    """Modules that are not quantized, in addition to the output layer. Applies to 4 bits as well."""
    llm_int8_enable_fp32_cpu_offload: bool = False
    """Keep modules that are offloaded to the CPU in float32."""
    llm_int8_has_fp16_weight: bool = False
    """Keep the main weights in 16 bits."""
    bnb_4bit_compute_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Data type to compute with 4-bit weights in. Defaults to bfloat16 on GPUs that compute in it, else to float32."""
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = "nf4"
    """Data type of 4-bit weights: `nf4`, as QLoRA recommends, or `fp4`, which transformers takes by default."""
    bnb_4bit_use_double_quant: bool = False
    """Also quantize the quantization constants (nested quantization)."""
    bnb_4bit_quant_storage: Literal["uint8", "int8", "float16", "bfloat16", "float32"] | None = None
    """Data type that packed 4-bit weights are stored in. Only relevant for FSDP."""


class TorchAO(ConfigSection):
    """Quantize to 8 bits with torchao, on any device. Only LoRA can be trained on top."""

    quantization_type: Literal["torchao"]
    weight_dtype: Literal["int8", "float8"] = "int8"
    """Data type of the weights of linear layers. Computation uses the dtype of the model."""
    skip_modules: list[str] | None = None
    """Modules that are not quantized, in addition to the output layer."""


Quantized = BitsAndBytes | TorchAO
QuantConfig = Annotated[NoQuantization | BitsAndBytes | TorchAO, Field(discriminator="quantization_type")]
