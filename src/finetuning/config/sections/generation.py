"""The config of `generate`: prompts, model and generation parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetuning.config.sections.data import DatasetSource
from finetuning.config.sections.model import ModelArgs, NoQuantization, QuantConfig
from finetuning.config.sections.section import ConfigSection


class OpenInput(ConfigSection):
    """A single prompt."""

    type: Literal["open-input"]
    input: str = ""
    """Text of the prompt."""
    num_samples: int = Field(default=1, gt=0)
    """Number of completions to generate."""


class EvalData(ConfigSection):
    """Prompts from a dataset."""

    type: Literal["eval-data"]
    data: DatasetSource
    """Dataset of prompts, read like a training dataset. Rows have a column `messages`, `prompt_messages` or `prompt`,
    and optionally `correct_answers`."""


class GenerationModel(ConfigSection):
    """Model, adapter and tokenizer to generate with."""

    model: str = Field(min_length=1)
    """Local path or Hugging Face Hub id of the model."""
    model_args: ModelArgs = ModelArgs()
    """Arguments passed to `AutoModelForCausalLM.from_pretrained`."""
    adapter: str | None = None
    """Local path or Hub id of a PEFT adapter to load on top of the model."""
    tokenizer: str | None = None
    """Local path or Hub id of the tokenizer. Defaults to the adapter's tokenizer if present, otherwise the model's."""


class GenerationConfig(ConfigSection):
    """Prompts, model and generation parameters."""

    prompt_conf: Annotated[OpenInput | EvalData, Field(discriminator="type")]
    """Prompts to complete."""
    model_conf: GenerationModel
    """Model, adapter and tokenizer to generate with."""
    hf_gen_params: dict[str, Any] = Field(default_factory=dict)
    """Generation parameters: the fields of `transformers.GenerationConfig`, such as `max_new_tokens`."""
    quant_conf: QuantConfig = NoQuantization()
    """Quantization of the model."""
