"""The YAML of `generate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetuning.config.sections.data import DatasetSource
from finetuning.config.sections.model import ModelArgs, NoQuantization, QuantConfig
from finetuning.config.sections.section import ConfigSection


class OpenInput(ConfigSection):
    """One prompt, continued as text."""

    type: Literal["open-input"]
    input: str = ""
    """The prompt."""
    num_samples: int = Field(default=1, gt=0)
    """How many continuations to generate."""


class EvalData(ConfigSection):
    """Prompts from rows."""

    type: Literal["eval-data"]
    data: DatasetSource
    """Where the prompts come from, found as training data is: rows with `messages`, `prompt_messages` or `prompt`, and
    `correct_answers`."""


class GenerationModel(ConfigSection):
    """The model that generates."""

    model: str = Field(min_length=1)
    """Path or hub id of the model."""
    model_args: ModelArgs = ModelArgs()
    """Arguments of `AutoModelForCausalLM.from_pretrained`."""
    adapter: str | None = None
    """Path or hub id of an adapter."""
    tokenizer: str | None = None
    """Path or hub id of the tokenizer; by default the adapter's or the model's."""


class GenerationConfig(ConfigSection):
    """What is generated, by which model, how."""

    prompt_conf: Annotated[OpenInput | EvalData, Field(discriminator="type")]
    """What is generated from."""
    model_conf: GenerationModel
    """The model that generates."""
    hf_gen_params: dict[str, Any] = Field(default_factory=dict)
    """Fields of `transformers.GenerationConfig`."""
    quant_conf: QuantConfig = NoQuantization()
    """Quantisation of the model."""
