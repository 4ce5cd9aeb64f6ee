"""`run_conf`, `peft_conf` and `quant_conf`: which model is trained, what is trained of it, in which numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, SecretStr, Tag

from finetuning.config.sections.section import ConfigSection, PathName

Dtype = Literal["auto", "float32", "float16", "bfloat16"]


class ModelArgs(ConfigSection):
    """Arguments of `AutoModelForCausalLM.from_pretrained`.

    A key that is not listed here passes through when `from_pretrained` or the model's own config knows it.
    """

    model_config = ConfigDict(extra="allow")

    dtype: Dtype = "auto"
    """Data type that the weights are loaded in; `auto` keeps the checkpoint's own."""
    device_map: dict[str, int | str] | str | None = None
    """Where each module goes. By default one device a process, chosen by the launcher."""
    max_memory: dict[int | str, str | int] | None = None
    """Most memory to use per device, for an automatic `device_map`."""
    low_cpu_mem_usage: bool | None = None
    """Read for compatibility: weights are always loaded without a second copy in memory."""
    attn_implementation: str | None = None
    """Attention implementation: `sdpa`, `eager`, `flash_attention_2`, …; by default `sdpa`, or else `eager`, and
    FlashAttention where it is installed and rows that lie end to end are proven to come out of it as out of `sdpa`."""
    offload_folder: str | None = None
    """Folder for weights that `device_map` puts on disk."""
    offload_state_dict: bool | None = None
    """Read for compatibility."""
    offload_buffers: bool | None = None
    """Whether buffers are offloaded with the weights."""
    use_cache: bool | None = None
    """Whether the model keeps keys and values. Off in training, whatever is said here, where gradient
    checkpointing is on."""
    cache_dir: str | None = None
    """Folder of downloaded models."""
    force_download: bool | None = None
    """Download again even when the model is in the cache."""
    local_files_only: bool | None = None
    """Never ask the hub."""
    proxies: dict[str, str] | None = None
    """Read for compatibility: set HTTPS_PROXY in the environment."""
    resume_download: bool | None = None
    """Read for compatibility: downloads always resume."""
    revision: str = "main"
    """Branch, tag or commit of the model on the hub."""
    code_revision: str | None = None
    """Branch, tag or commit of remote code."""
    subfolder: str | None = None
    """Folder inside the model's repository."""
    token: SecretStr | None = Field(default=None, exclude=True)
    """Token for the hub. Better: HF_TOKEN in the environment. Never written anywhere."""
    use_safetensors: bool | None = None
    """Load only safetensors (true), or pickled weights too (false)."""
    variant: str | None = None
    """Variant of the weight files, such as `fp16`."""
    trust_remote_code: bool = False
    """Run code that comes with the model. It runs with your rights: pin `revision` to a commit."""


class RunConfig(ConfigSection):
    """The model, and how the run begins and ends."""

    model: str = Field(default="/local_resources/basemodel", min_length=1)
    """Path or hub id of the model to train."""
    model_args: ModelArgs = ModelArgs()
    """Arguments of `AutoModelForCausalLM.from_pretrained`."""
    tokenizer: str | None = None
    """Path or hub id of the tokenizer; by default the model's."""
    use_fast_tokenizer: bool = True
    """Read for compatibility: only fast tokenizers can prove a loss mask."""
    resume_from_checkpoint: bool | str = False
    """`auto` resumes when there is a checkpoint, true must find one, false starts afresh, a path resumes from it."""
    final_checkpoint_name: PathName = "checkpoint-final"
    """Name of the folder, inside `output_dir`, of the tuned model."""
    determinism: Literal["no", "half", "full"] = "no"
    """`half` prefers deterministic operations, `full` allows no others. Both cost speed."""
    allow_changed: list[str] = Field(default_factory=list)
    """Keys whose change a resumed run applies although it changes the curve, such as `training_args.learning_rate`;
    `data`, `model` and `versions` stand for what the keys name. Without this, such a change is an error."""
    memory_check: Literal["auto"] | bool = "auto"
    """Compute the longest training and validation rows once before the first step, and halve the batch until they fit;
    `auto` does so on a GPU."""
    max_time: str | None = Field(default=None, pattern=r"^(\d+[dhms])+$")
    """Most time that the job trains, such as `3h` or `1h30m`; then it saves a checkpoint and ends with code 143."""
    name_hung_after: float = Field(default=300.0, gt=0)
    """Seconds after which a process that hangs is named, with what it was doing; where there are several."""
    copy_checkpoints_to: str | None = None
    """Where each checkpoint, and the tuned model, is copied once it is whole, such as `s3://bucket/run`; any address
    that fsspec knows. A copy that fails is a warning, and training never waits for one; the end of the run does."""


class NoPeft(ConfigSection):
    """Train all weights."""

    peft_type: Literal["NO_PEFT"]


class PretrainedPeft(ConfigSection):
    """Go on training an adapter."""

    peft_type: Literal["PRETRAINED_PEFT"]
    name_or_path: str = Field(min_length=1)
    """Path or hub id of the adapter."""


class NewPeft(ConfigSection):
    """Train a new adapter of any type that PEFT has for causal language models."""

    peft_type: str = Field(json_schema_extra={"not": {"enum": ["NO_PEFT", "PRETRAINED_PEFT"]}})
    """A name out of `peft.PeftType`, such as LORA."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """The task; always CAUSAL_LM."""
    peft_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that type's PEFT config, such as `r` and `target_modules` for LORA."""
    alora_invocation_string: str | None = Field(default=None, min_length=1)
    """aLoRA: the text from which on a LORA works, such as the chat template's start of an assistant's turn. Each row
    must hold it; before it the model stays the base, whose key-value cache it can share."""


def peft_kind(value: Any) -> str:
    """The tag of the section that a `peft_conf` is."""
    peft_type = value.get("peft_type") if isinstance(value, dict) else getattr(value, "peft_type", None)
    return peft_type if peft_type in ("NO_PEFT", "PRETRAINED_PEFT") else "NEW_PEFT"


PeftConfig = Annotated[
    Annotated[NoPeft, Tag("NO_PEFT")]
    | Annotated[PretrainedPeft, Tag("PRETRAINED_PEFT")]
    | Annotated[NewPeft, Tag("NEW_PEFT")],
    Discriminator(peft_kind),
]


class NewScorePeft(NewPeft):
    """Train a new adapter of any type that PEFT has for sequence classification, and the new head with it."""

    task_type: Literal["SEQ_CLS"] = "SEQ_CLS"
    """The task; always SEQ_CLS, so that the head that gives the score is trained and saved with the adapter."""


ScorePeftConfig = Annotated[
    Annotated[NoPeft, Tag("NO_PEFT")]
    | Annotated[PretrainedPeft, Tag("PRETRAINED_PEFT")]
    | Annotated[NewScorePeft, Tag("NEW_PEFT")],
    Discriminator(peft_kind),
]


class NoQuantization(ConfigSection):
    """Weights as they are."""

    quantization_type: Literal["no-quantization"] = "no-quantization"


class BitsAndBytes(ConfigSection):
    """8 or 4 bit weights by bitsandbytes; the fields are those of `transformers.BitsAndBytesConfig`."""

    quantization_type: Literal["bits-and-bytes"]
    load_in_8bit: bool = False
    """LLM.int8()."""
    load_in_4bit: bool = False
    """4 bit weights, as in QLoRA."""
    llm_int8_threshold: float = Field(default=6.0, ge=0)
    """Magnitude above which an activation is computed outside of 8 bit."""
    llm_int8_skip_modules: list[str] | None = None
    """Modules that stay as they are, besides the output layer; of 4 bit, too."""
    llm_int8_enable_fp32_cpu_offload: bool = False
    """Keep offloaded modules in float32 on the CPU."""
    llm_int8_has_fp16_weight: bool = False
    """Keep the main weights in 16 bit."""
    bnb_4bit_compute_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Data type that 4 bit weights are computed in; by default float32."""
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = "fp4"
    """Number format of 4 bit weights. `nf4` is what QLoRA recommends."""
    bnb_4bit_use_double_quant: bool = False
    """Quantise the quantisation constants, too."""
    bnb_4bit_quant_storage: Literal["uint8", "int8", "float16", "bfloat16", "float32"] | None = None
    """Data type that 4 bit weights are stored in; matters for FSDP only."""


class TorchAO(ConfigSection):
    """8 bit weights by torchao, on any device; LoRA is trained over them."""

    quantization_type: Literal["torchao"]
    weight_dtype: Literal["int8", "float8"] = "int8"
    """What the weights of linear layers are stored in; they are computed in the model's own type."""
    skip_modules: list[str] | None = None
    """Modules that stay as they are, besides the output layer."""


Quantized = BitsAndBytes | TorchAO
QuantConfig = Annotated[NoQuantization | BitsAndBytes | TorchAO, Field(discriminator="quantization_type")]
