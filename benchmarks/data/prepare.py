"""Preparation of chats: JSON to token ids with a proven mask, against the bare tokenizer, TRL and others.

Random chats of 30 to 400 tokens; a BPE of bytes trained on them, or one of SentencePiece's kind; the ChatML template,
or one out of TRL's package by name, with the special tokens that it writes. Each measurement is a process of its own
and counts from the first byte read to the last label; imports and the tokenizer's loading are left out. The variants
take turns, medians count. `raw` is `encode_batch_fast` of texts that are rendered already, on all cores: what no
preparation can beat. `ours` has as many processes as there are cores, `ours, one process` none beside itself.
`llamafactory` runs where LLaMA-Factory can be imported (`PYTHONPATH` to its unpacked wheel will do, with
`DISABLE_VERSION_CHECK=1` under newer libraries); its audio library, which no text needs, is left out.

`python benchmarks/data/prepare.py --rows 20000 --rounds 3` prints a Markdown table; `--template qwen3` and `--tokenizer
pieces` take others. `--baseline CHECKOUT` measures `ours` with another checkout of this repository as well, in
turns, and adds ratios. `doctor` is `finetuning data doctor` of the same rows, its page included, with as many
processes: `--rows 100000 --only ours doctor` compares it with preparation.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# TRL knows a template by its text and brings its own marked one; transformers needs the marks in the template.
MARKED = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|end|>", "<turn|>")
"""What ends a turn in one template or another."""
_CLOCK = """
import sys, time, resource, json
folder = sys.argv[1]
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder + "/tokenizer")
tokenizer("warm up")
def cpu():
    mine = resource.getrusage(resource.RUSAGE_SELF); theirs = resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime
def start():
    global began
    began = (time.monotonic(), cpu())
def stop(tokens, trained):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"wall": time.monotonic() - began[0], "cpu": cpu() - began[1], "tokens": tokens,
                      "trained": trained, "peak_mb": peak}))
"""
# The second of each are the modules' names before they were renamed, for --baseline.
_OURS = """
try:
    from finetuning.config.sections.data import DataConfig
    from finetuning.config.sections.training import SFTArgs
    from finetuning.data.pipeline import prepare_sft
except ImportError:
    from finetuning.config.data import DataConfig
    from finetuning.config.training import SFTArgs
    from finetuning.data.prepare import prepare_sft
import datasets, pyarrow.compute as pc
conf = DataConfig.model_validate({
    "training_data": {"type": "CONCATENATION", "datasets": [{"path": folder + "/chats.jsonl"}]},
    "validation_data": {"type": "NONE"}, "chat_template_name": "keep-original"})
args = SFTArgs(max_seq_length=4096, train_on_completions_only=True)
start()
data = prepare_sft(conf, args, tokenizer, WORKERS)
part = data.statistics.splits[0].counts if hasattr(data, "statistics") else data.ledger.parts[0].totals
stop(part.tokens, part.trained_tokens)
"""
_DOCTOR = """
import re
from pathlib import Path
import yaml
from finetuning.algorithms import ALGORITHMS
from finetuning.cli.data_doctor import examine
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.data.doctor.doctor_page import to_html, to_text
from finetuning.training.setup import load_tokenizer
import datasets, pyarrow.compute as pc
values = {
    "data_conf": {"training_data": {"type": "CONCATENATION", "datasets": [{"path": folder + "/chats.jsonl"}]},
                  "validation_data": {"type": "NONE"}, "chat_template_name": "keep-original"},
    "sft_args": {"max_seq_length": 4096, "train_on_completions_only": True},
    "training_args": {"output_dir": folder + "/out"},
    "batchsize_conf": {"total_train_batch_size": 8, "max_per_device_train_batch_size": 8},
    "peft_conf": {"peft_type": "NO_PEFT"}, "run_conf": {"model": folder + "/tokenizer"}}
Path(folder, "config.yaml").write_text(yaml.safe_dump(values))
method = ALGORITHMS["sft"]
experiment = validate(read_document(folder + "/config.yaml"), method.experiment).experiment
loaded = load_tokenizer(experiment)
loaded.tokenizer("warm up")
start()
report = examine(experiment, method, loaded, WORKERS, "config.yaml")
to_text(report), to_html(report)
found = re.search(r"(\\d+) tokens, (\\d+) trained", dict(report.facts)["training"])
stop(int(found[1]), int(found[2]))
"""
_CORES = str(len(os.sched_getaffinity(0)))
VARIANTS = {
    "raw": """
texts = json.load(open(folder + "/texts.json"))
start()
tokens = 0
for first in range(0, len(texts), 1024):
    for one in tokenizer.backend_tokenizer.encode_batch_fast(texts[first:first + 1024], add_special_tokens=False):
        tokens += len(one)
stop(tokens, 0)
""",
    "ours": _OURS.replace("WORKERS", _CORES),
    "ours, one process": _OURS.replace("WORKERS", "1"),
    "doctor": _DOCTOR.replace("WORKERS", _CORES),
    "doctor, one process": _DOCTOR.replace("WORKERS", "1"),
    "transformers": """
tokenizer.chat_template = open(folder + "/marked.jinja").read()
start()
rows = [json.loads(line)["messages"] for line in open(folder + "/chats.jsonl")]
tokens = trained = 0
for first in range(0, len(rows), 1024):
    batch = tokenizer.apply_chat_template(rows[first:first + 1024], tokenize=True, return_dict=True,
                                          return_assistant_tokens_mask=True)
    for ids, mask in zip(batch["input_ids"], batch["assistant_masks"]):
        tokens += len(ids)
        trained += sum(mask)
stop(tokens, trained)
""",
    "trl": """
import torch, datasets
datasets.disable_progress_bars()
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
tokenizer.chat_template = open(folder + "/marked.jinja").read()
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
                                     num_hidden_layers=1, num_attention_heads=1))
arguments = SFTConfig(output_dir=folder + "/trl", assistant_only_loss=True, max_length=4096, use_cpu=True,
                      report_to="none", bf16=False)
start()
rows = [{"messages": json.loads(line)["messages"]} for line in open(folder + "/chats.jsonl")]
rows = datasets.Dataset.from_list(rows)
trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
data = trainer.train_dataset
tokens = sum(len(ids) for ids in data["input_ids"])
column = "assistant_masks" if "assistant_masks" in data.column_names else "labels"
stop(tokens, sum(one not in (0, -100) if column == "labels" else one for row in data[column] for one in row))
""",
    "llamafactory": """
import importlib.machinery, types
audio = types.ModuleType("torchaudio"); audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = audio
import datasets
datasets.disable_progress_bars()
from types import SimpleNamespace
from llamafactory.data.converter import align_dataset
from llamafactory.data.loader import _get_preprocessed_dataset
from llamafactory.data.parser import DatasetAttr
from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams.data_args import DataArguments
options = DataArguments(template="chatml", cutoff_len=4096, overwrite_cache=True)
shape = DatasetAttr("file", dataset_name="chats.jsonl", formatting="sharegpt", messages="messages", role_tag="role",
                    content_tag="content", user_tag="user", assistant_tag="assistant", system_tag="system")
seat = SimpleNamespace(local_process_index=0, should_log=False, predict_with_generate=False)
template = get_template_and_fix_tokenizer(tokenizer, options)
start()
data = datasets.load_dataset("json", data_files=folder + "/chats.jsonl", split="train", cache_dir=folder + "/hub")
data = align_dataset(data, shape, options, seat)
data = _get_preprocessed_dataset(data, options, seat, "sft", template, tokenizer)
tokens = trained = 0
for batch in data.iter(1000):
    tokens += sum(map(len, batch["input_ids"])); trained += sum(one != -100 for row in batch["labels"] for one in row)
stop(tokens, trained)
""",
}


def make_chats(path: Path, rows: int, seed: int) -> list[list[dict[str, str]]]:
    """Chats of 30 to 400 tokens or so, half of them of one exchange, a third with a system prompt; as JSON Lines."""
    draw = random.Random(seed)
    syllables = [one + vowel + last for one in "bdfgklmnprstvz" for vowel in "aeiou" for last in ("", "n", "r", "s")]
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 1, 2, 2, 3)))) for _ in range(6000)]
    words += ["the", "a", "of", "and", "to", "in", "is", "what", "how", "Why", "42", "naïve", "größer", "你好"] * 200

    def sentence(count: int) -> str:
        return " ".join(draw.choices(words, k=count)).capitalize() + draw.choice((".", "?", "!", ".\n", ":"))

    def text(low: int, high: int) -> str:
        return " ".join(sentence(draw.randint(4, 12)) for _ in range(draw.randint(low, high))).strip()

    chats = []
    with open(path, "w", encoding="utf-8") as stream:
        for index in range(rows):
            messages = [{"role": "system", "content": text(1, 2)}] if draw.random() < 0.33 else []
            for _ in range(draw.choice((1, 1, 2, 3))):
                messages.append({"role": "user", "content": text(1, 3)})
                messages.append({"role": "assistant", "content": text(1, 5)})
            chats.append(messages)
            stream.write(json.dumps({"messages": messages, "id": index}, ensure_ascii=False) + "\n")
    return chats


def templates(name: str | None) -> tuple[str, str]:
    """A chat template, and the same with the answers marked, by its name in TRL's package; ChatML by default."""
    if name is None:
        return TEMPLATE, MARKED
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return (folder / f"{name}.jinja").read_text("utf-8"), (folder / f"{name}_training.jinja").read_text("utf-8")


def backend_of(kind: str, special: list[str], texts: Iterable[str]) -> Any:
    """A tokenizer of 16,000 tokens: a byte-level BPE as Qwen's, or one of pieces as Gemma's, trained on texts."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "pieces":
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *special]
        trainer = trainers.BpeTrainer(vocab_size=16000, special_tokens=special, show_progress=False)
        backend.train_from_iterator(texts, trainer)
        state = json.loads(backend.to_str())
        state["added_tokens"] = [one for one in state["added_tokens"] if not one["content"].startswith("<0x")]
        return Tokenizer.from_str(json.dumps(state))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def make_tokenizer(folder: Path, chats: list[list[dict[str, str]]], name: str | None = None, kind: str = "") -> None:
    """A tokenizer trained on some of the chats, saved with the template."""
    from transformers import PreTrainedTokenizerFast

    template, marked = templates(name)
    written = re.findall(r"<[|｜]?[A-Za-z_▁]+[|｜]?>", template)
    special = list(dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", *written]))
    backend = backend_of(kind, special, (one["content"] for chat in chats[:4000] for one in chat))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=next((one for one in ENDS if one in template), "<|im_end|>"),
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:],
        chat_template=template,
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "marked.jinja").write_text(marked, encoding="utf-8")
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")


def installed() -> list[str]:
    """The variants whose packages are here."""
    return [name for name in VARIANTS if name != "llamafactory" or importlib.util.find_spec(name)]


def of_any_template(name: str) -> bool:
    """Whether a variant takes a template as it is, instead of having it built in."""
    return name != "llamafactory"


def measure(name: str, folder: Path, checkout: Path | None = None) -> dict[str, float]:
    """What one variant took, in a process of its own, with the engine of a checkout or the one found otherwise."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "FINETUNING_CACHE": "off"}
    if checkout:
        environment["PYTHONPATH"] = str((checkout / "src").resolve())
    command = [sys.executable, "-c", _CLOCK + VARIANTS[name], str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(results: dict[str, list[dict[str, float]]], rows: int) -> str:
    """Medians, as Markdown; ratios are the seconds of the raw tokenizer, and of TRL, over those of the variant, and
    the seconds of the variant over those of `ours`, with as many processes."""
    tokens = int(next(iter(results.values()))[0]["tokens"])
    lines = [
        f"{rows:,} chats, {tokens:,} tokens, {len(os.sched_getaffinity(0))} cores\n",
        "| preparation | CPU s | wall s | raw/it, CPU | raw/it, wall | TRL/it, CPU | TRL/it, wall | it/ours, CPU |"
        " it/ours, wall | peak MB | trained tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    medians = {
        name: {kind: statistics.median(one[kind] for one in measured) for kind in ("cpu", "wall", "peak_mb")}
        for name, measured in results.items()
    }
    for name, own in medians.items():
        ratios = [
            f"{medians[other][kind] / own[kind]:.2f}" if other in medians else ""
            for other in ("raw", "trl")
            for kind in ("cpu", "wall")
        ]
        base = medians.get("ours, one process" if "one process" in name else "ours")
        ratios += [f"{own[kind] / base[kind]:.2f}" if base else "" for kind in ("cpu", "wall")]
        lines.append(
            f"| {name} | {own['cpu']:.2f} | {own['wall']:.2f} | {' | '.join(ratios)} | {own['peak_mb']:.0f} |"
            f" {int(results[name][0]['trained']):,} |"
        )
    return "\n".join(lines)


def comparison(results: dict[str, list[dict[str, float]]], baseline: dict[str, list[dict[str, float]]]) -> str:
    """Medians of this checkout and of the baseline, as Markdown."""
    lines = ["| preparation | CPU s | baseline | ratio | wall s | baseline | ratio |", "|---|---|---|---|---|---|---|"]
    for name, measured in baseline.items():
        cells = [name]
        for kind in ("cpu", "wall"):
            now, before = (statistics.median(one[kind] for one in which) for which in (results[name], measured))
            cells += [f"{now:.2f}", f"{before:.2f}", f"{now / before:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the preparation of chats.")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", choices=("bytes", "pieces"), default="bytes")
    parser.add_argument("--template", help="of TRL's package, one that has a training variant; ChatML by default")
    parser.add_argument("--only", nargs="*", default=installed(), choices=list(VARIANTS))
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(
            folder, make_chats(folder / "chats.jsonl", options.rows, options.seed), options.template, options.tokenizer
        )
        variants = [name for name in options.only if not options.template or of_any_template(name)]
        results: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        baseline: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants if "ours" in variant}
        checkout = Path(__file__).parents[2] if options.baseline else None
        for _ in range(options.rounds):
            for variant in variants:
                results[variant].append(measure(variant, folder, checkout))
                if options.baseline and variant in baseline:
                    baseline[variant].append(measure(variant, folder, options.baseline))
    print(f"{options.template or 'chatml'}, {options.tokenizer}: {table(results, options.rows)}")
    if options.baseline:
        print(f"\n{comparison(results, baseline)}")


if __name__ == "__main__":
    main()
