"""Generate answers with a server of vLLM: the backend `vllm` of `generate`.

Prompts are sent as token ids and answers are read as token ids, so that templates and tokenizers are ours. vLLM takes
new prompts into its batch as soon as others are finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from finetuning.config.sections.experiment import GenerationModel, VllmConfig
from finetuning.config.sections.model import NoQuantization, Quantized
from finetuning.distributed import announce_wait
from finetuning.errors import ConfigError, Location, MissingPackageError
from finetuning.inference.generate import EncodedPrompt, Generation, make_answer
from finetuning.inference.generation_params import GenerationParameters
from finetuning.inference.load import LoadedWithoutWeights, dtype_of

if TYPE_CHECKING:
    from transformers import GenerationConfig

_ANSWER_SECONDS = 86400.0
_MAX_REQUESTS = 256
"""Requests in flight; vLLM puts those into a queue that do not fit into its batch."""
_TRANSLATED = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_return_sequences", "stop_strings",
    "min_new_tokens", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "bos_token_id",
)  # fmt: skip
# The defaults of transformers' `generate`, where neither the user nor the model sets a value.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


class VllmServer(Protocol):
    """A vLLM that answers."""

    def post(self, path: str, body: Mapping[str, object], timeout_s: float) -> dict[str, object]:
        """Send a JSON object, and return the JSON object of the answer."""
        ...


StartVllm: TypeAlias = Callable[
    [GenerationModel, str, Callable[[str], None]], AbstractContextManager[tuple[VllmServer, str]]
]
"""Starts vLLM for a model in a dtype, and ends it: returns the server, and the name of the model in requests."""


@dataclass(frozen=True)
class VllmBackend:
    """A vLLM that generates the answers of a job."""

    conf: VllmConfig
    start: StartVllm


def find_vllm(program: str) -> str:
    """Return the path of the program.

    Raises:
        MissingPackageError: it is not installed.
    """
    path = shutil.which(program)
    if path is None:
        raise MissingPackageError(f"{program} is not installed here")
    return path


def check_job(conf: VllmConfig, quant_conf: NoQuantization | Quantized, gen_params: Mapping[str, object]) -> None:
    """Check what can be known before anything is loaded.

    Raises:
        ConfigError: a parameter of generation, or the quantization, is not vLLM's.
        MissingPackageError: the program is not installed.
    """
    for key, value in gen_params.items():
        if value is not None and key not in _TRANSLATED:
            raise ConfigError(
                f"has no effect with backend: vllm. It takes {', '.join(_TRANSLATED)}",
                location=Location(key=f"hf_gen_params.{key}"),
            )
    if quant_conf.quantization_type != "no-quantization":
        raise ConfigError(
            "backend: vllm loads the model without it",
            location=Location(key="quant_conf"),
            hint="Leave it out, or set backend: transformers.",
        )
    try:
        find_vllm(conf.program)
    except MissingPackageError as error:
        raise MissingPackageError(
            f"{error.problems[0].message}, and backend: vllm starts it",
            location=Location(key="vllm_conf.program"),
            hint="Name the program of an environment that has vLLM, or set backend: transformers.",
        ) from None


def generate_with_vllm(
    start: StartVllm,
    model: GenerationModel,
    tokenizer: LoadedWithoutWeights,
    prompts: Sequence[EncodedPrompt],
    indexes: Iterable[int],
    parameters: GenerationParameters,
    seed: int,
    on_note: Callable[[str], None],
) -> Iterator[dict[int, list[Generation]]]:
    """Start vLLM, and yield the answers of the prompts with these indexes, in the order in which they are finished.

    Raises:
        ModelError: vLLM does not start with this model, or refuses a request.
    """
    for note in _ignored(tokenizer.generation_config):
        on_note(note)
    body = request_parameters(parameters, tokenizer.generation_config)
    with start(model, dtype_of(model), on_note) as (server, name):
        pool = ThreadPoolExecutor(_MAX_REQUESTS)
        try:
            requests = {
                pool.submit(
                    server.post,
                    "/v1/completions",
                    {**body, "model": name, "prompt": list(prompts[index].ids), "seed": seed + index},
                    _ANSWER_SECONDS,
                ): index
                for index in indexes
            }
            with announce_wait("vLLM to answer"):
                for request in as_completed(requests):
                    index = requests[request]
                    choices = cast("list[dict[str, object]]", request.result()["choices"])
                    choices.sort(key=itemgetter("index"))
                    rows = [cast("list[int]", choice["token_ids"]) for choice in choices]
                    yield {index: [make_answer(prompts[index], ids, tokenizer, parameters.stop_ids) for ids in rows]}
        finally:
            # The requests in flight end with the server.
            pool.shutdown(wait=False, cancel_futures=True)


def request_parameters(parameters: GenerationParameters, defaults: GenerationConfig) -> dict[str, object]:
    """Return the parameters of a request to vLLM that mean what `generate` of transformers makes of the config.

    All of them are set, so that a server's own defaults play no part.

    Args:
        defaults: the model's generation config, for what the user does not set.
    """
    config = parameters.config

    def value(name: str) -> object:
        configured = getattr(config, name, None)
        return configured if configured is not None else getattr(defaults, name, None)

    sampling: dict[str, object] = {"temperature": 0.0}
    if value("do_sample"):
        values = {name: value(name) for name in ("temperature", "top_k", "top_p", "min_p")}
        sampling = {name: _DEFAULTS[name] if number is None else number for name, number in values.items()}
    penalty = value("repetition_penalty")
    stop_strings = config.stop_strings or []
    return {
        **sampling,
        "repetition_penalty": _DEFAULTS["repetition_penalty"] if penalty is None else penalty,
        "n": parameters.answers_per_prompt,
        "max_tokens": parameters.max_new_tokens,
        "min_tokens": config.min_new_tokens or 0,
        "stop": [stop_strings] if isinstance(stop_strings, str) else stop_strings,
        # The stop tokens are these, whatever the server's generation config says.
        "ignore_eos": True,
        "stop_token_ids": sorted(parameters.stop_ids),
        "return_token_ids": True,
        "skip_special_tokens": False,
    }


def _ignored(defaults: GenerationConfig) -> list[str]:
    """Return a note on values of the model's generation config that vLLM has no counterpart of."""
    supported = {*_TRANSLATED, "transformers_version", "_from_model_config", "use_cache", "cache_implementation"}
    names = sorted(
        name for name, value in defaults.to_diff_dict().items() if value is not None and name not in supported
    )
    return [f"the model's generation config sets {', '.join(names)}, which vLLM ignores"] if names else []
