"""The command that starts vLLM with a model, and the process of `generate` with `backend: vllm`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetuning.config.sections.experiment import GenerationModel, VllmConfig
from finetuning.config.sections.model import NoQuantization, Quantized
from finetuning.errors import read_json_object, reading
from finetuning.export.local_server import LocalServer, run_server
from finetuning.inference.vllm import find_vllm

_START_SECONDS = 1800.0
"""A large model is read from a network disk, compiled, and its graphs captured."""


@dataclass(frozen=True)
class ServingCommand:
    """How vLLM is started with a model."""

    words: tuple[str, ...]
    """The first one is `vllm`."""
    model: str
    """The name of the model in requests."""
    notes: tuple[str, ...] = ()


def serving_command(
    conf: GenerationModel, quant_conf: NoQuantization | Quantized, base: str | None = None
) -> ServingCommand:
    """Return the command for a model, after converting an adapter that vLLM does not take as it is.

    Raises:
        ModelError: vLLM can serve the adapter only merged, and there is no merged model next to it.
    """
    if conf.adapter is None:
        return ServingCommand(("vllm", "serve", conf.model), conf.model)
    from finetuning.export.vllm.convert import NotServableError, make_vllm_compatible, plan_serving
    from finetuning.export.vllm.serving import SERVING

    notes: list[str] = []
    kind = quant_conf.quantization_type
    if kind != "no-quantization":
        notes.append(f"vLLM loads the base model without the quantization that the adapter was trained with ({kind})")
    adapter = Path(conf.adapter).expanduser()
    converted, merged = (adapter.with_name(f"{adapter.name}-{end}") for end in ("vllm", "merged"))
    try:
        serving = plan_serving(adapter, base)
        if serving is not None:
            notes += serving["notes"]
            return ServingCommand(tuple(shlex.split(serving["command"])), serving["adapter"]["name"], tuple(notes))
        if _is_older(converted / SERVING, adapter):
            result = make_vllm_compatible(adapter, base_name=base, output=converted)
            notes += [f"{adapter} converted for vLLM: {converted}", *result.notes]
    except NotServableError as error:
        if not (merged / "config.json").is_file():
            raise
        notes.append(f"{error.problems[0].message} Served merged, from {merged}")
        return ServingCommand(("vllm", "serve", str(merged)), str(merged), tuple(notes))
    with reading(f"{converted / SERVING} cannot be read"):
        content = read_json_object(converted / SERVING)
        words, name = shlex.split(content["command"]), str(content["adapter"]["name"])
    return ServingCommand(tuple(words), name, tuple(notes))


def _is_older(file: Path, adapter: Path) -> bool:
    """Return whether a conversion is missing, or older than the weights of its adapter."""
    weights = adapter / "adapter_model.safetensors"
    return not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime


@contextmanager
def running_vllm(
    conf: VllmConfig, model: GenerationModel, dtype: str, on_note: Callable[[str], None]
) -> Iterator[tuple[LocalServer, str]]:
    """Start vLLM with a model, and end it after the block. Yields the server, and the name of the model in requests.

    Raises:
        ModelError: vLLM does not start with this model.
    """
    command = serving_command(model, NoQuantization(), model.model if model.adapter is not None else None)
    for note in command.notes:
        on_note(note)
    words = [find_vllm(conf.program), *command.words[1:], *conf.flags]
    if not any(flag.partition("=")[0] == "--dtype" for flag in conf.flags):
        # vLLM would load float32 as float16.
        words += ["--dtype", dtype]
    on_note(shlex.join(words))

    def start(port: int) -> list[str]:
        return [*words, "--host", "127.0.0.1", "--port", str(port)]

    with run_server(start, "vLLM", command.model, _START_SECONDS) as server:
        yield server, command.model
