"""Trace which functions of the package a small run enters.

Fine-tunes a tiny Llama with LoRA on four chat rows, by the console script's own `main`, and records every function of
`src/finetuning` that is called in this process: the files they are in, the stack at `trainer.train()`, and the stack
where a logged loss reaches the queue of the MLflow tracker. The tracker is given a port that nothing listens on, so
nothing leaves the machine.

    python scripts/trace_run.py [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import os
import socket
import sys
import tempfile
import threading
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "finetuning"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "FINETUNING_CACHE": "off",
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COLORS = ("red", "green", "blue", "white")
INLINED = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}
CALLBACKS = "transformers/trainer_callback.py"
WRITES = {"write", "writelines", "flush", "put", "put_nowait"}


@dataclass
class Trace:
    """What a run entered. Frames are `path:function`, outermost first; paths are relative to the package."""

    functions: set[str] = field(default_factory=set)
    frames_to_train: list[str] = field(default_factory=list)
    frames_to_queue: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        return sorted({name.partition(":")[0] for name in self.functions})

    @property
    def files_per_package(self) -> Counter[str]:
        return Counter(name.partition("/")[0] if "/" in name else "." for name in self.files)


class Tracer:
    """A profile function that fills a `Trace`.

    `queue_folder` is where the tracker keeps its queue: a write is recognized by the queue file that has grown, or by
    a `put` into a queue, so that neither depends on a name of ours.
    """

    def __init__(self, trace: Trace, queue_folder: Path):
        self._trace = trace
        self._queue_folder = queue_folder
        self._names: dict[CodeType, str | None] = {}
        self._queue_size = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._called(frame)
        elif event == "c_return" and argument.__name__ in WRITES and not self._trace.frames_to_queue:
            self._written(frame)

    def _called(self, frame: FrameType) -> None:
        code = frame.f_code
        if name := self._name(code):
            self._trace.functions.add(name)
        elif code.co_name == "train" and code.co_filename.endswith("transformers/trainer.py"):
            self._trace.frames_to_train = self._trace.frames_to_train or self._stack(frame)
        elif code.co_name == "on_log" and code.co_filename.endswith(CALLBACKS):
            self._has_grown()  # anything that grows after this point was written for this log
        elif code.co_name in WRITES and code.co_filename.endswith("/queue.py"):
            self._written(frame)

    def _written(self, frame: FrameType) -> None:
        inner = self._stack(frame, until=("on_log", CALLBACKS))
        if inner and (frame.f_code.co_name.startswith("put") or self._has_grown()):
            self._trace.frames_to_queue = self._trace.frames_to_queue or inner

    def _has_grown(self) -> bool:
        size = sum(path.stat().st_size for path in self._queue_folder.glob("*mlflow*.jsonl"))
        grown, self._queue_size = size > self._queue_size, size
        return grown

    def _stack(self, frame: FrameType | None, until: tuple[str, str] | None = None) -> list[str]:
        """Frames of the package, outermost first; with `until`, those inside that function, if it is on the stack."""
        names = []
        while frame is not None:
            if until and frame.f_code.co_name == until[0] and frame.f_code.co_filename.endswith(until[1]):
                return names[::-1]
            if name := self._name(frame.f_code):
                names.append(name)
            frame = frame.f_back
        return [] if until else names[::-1]

    def _name(self, code: CodeType) -> str | None:
        if code not in self._names:
            self._names[code] = self._find_name(code)
        return self._names[code]

    @staticmethod
    def _find_name(code: CodeType) -> str | None:
        """`path:function` for a function of the package; None for others, and for bodies of modules and classes."""
        path = Path(code.co_filename)
        is_function = code.co_flags & inspect.CO_OPTIMIZED and code.co_name not in INLINED
        if not is_function or not path.is_relative_to(PACKAGE):
            return None
        return f"{path.relative_to(PACKAGE)}:{code.co_qualname}"


def save_model(folder: Path) -> None:
    """A two-layer Llama of random weights and a byte-level tokenizer with the ChatML template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"user assistant What is number 1? {' '.join(COLORS)}"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:],
        model_max_length=256,
        chat_template=CHATML,
    )
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_config(folder: Path) -> Path:
    """An SFT config with LoRA, and its four rows."""
    import yaml

    rows = [
        [{"role": "user", "content": f"What is number {number}?"}, {"role": "assistant", "content": color}]
        for number, color in enumerate(COLORS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    values = {
        "data_conf": {
            "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(folder / "rows.jsonl")}]},
            "validation_data": {"type": "NONE"},
            "chat_template_name": "chat-ml",
        },
        "training_args": {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        "batchsize_conf": {"total_train_batch_size": 2, "max_per_device_train_batch_size": 2},
        "peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 2, "target_modules": "all-linear"}},
        "run_conf": {"model": str(folder / "model")},
        "sft_args": {"max_seq_length": 128, "train_on_completions_only": True},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def console_main() -> Any:
    """`main` of the console script `finetuning`, as pyproject.toml names it."""
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["finetuning"]
    module, _, function = script.partition(":")
    return getattr(importlib.import_module(module), function)


def trace_run() -> Trace:
    """Run the fine-tuning under the tracer.

    Raises:
        SystemExit: the run failed, or never reached `trainer.train()`; its output is in the message.
    """
    trace = Trace()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        uri = f"http://127.0.0.1:{closed_port()}"
        arguments = ["sft", str(write_config(folder)), "--num-preprocess-workers", "1", "--mlflow-server-uri", uri]
        main, tracer, output = console_main(), Tracer(trace, folder / "out"), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            threading.setprofile(tracer)
            sys.setprofile(tracer)
            try:
                code = main(arguments)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
    if code or not trace.frames_to_train:
        sys.exit(f"the run ended with {code}:\n{output.getvalue()}")
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the trace to this file")
    options = parser.parse_args()
    os.environ.update(SETTINGS)
    sys.path.insert(0, str(PACKAGE.parent))
    trace = trace_run()
    for package, count in sorted(trace.files_per_package.items()):
        print(f"{package}  {count} files")
        for path in trace.files:
            if (path.partition("/")[0] if "/" in path else ".") == package:
                entered = sum(name.startswith(f"{path}:") for name in trace.functions)
                print(f"    {path}  {entered} functions")
    print(f"\n{len(trace.files)} files entered\n")
    for title, frames in (("trainer.train()", trace.frames_to_train), ("tracker queue", trace.frames_to_queue)):
        print(f"{len(frames)} frames to the {title}", *(f"    {name}" for name in frames), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({**asdict(trace), "functions": sorted(trace.functions)}, indent=1))


if __name__ == "__main__":
    main()
