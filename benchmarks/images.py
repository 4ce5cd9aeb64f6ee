"""Train a tiny vision-language model on the same rows by this engine and by TRL's SFTTrainer, one after the other.

    python benchmarks/images.py [--rounds 3] [--steps 20] [--family qwen2_5_vl]

Prints a Markdown table with the CPU time of the training loop and the trained tokens (those with a label) for each
second of it. The model is a random one of tests/vision/families.py, so that most of the time is that of images, batches
and the loop.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLORS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
BATCH = 4


def make_inputs(folder: Path, family: str, rows: int) -> None:
    """Write the model, the pictures and the rows."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest
    from PIL import Image
    from transformers import PreTrainedTokenizerFast
    from vision.families import save_family

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=conftest._train_tokenizer(tokens),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=tokens[1:],
        chat_template=conftest.CHATML_TEMPLATE,
    )
    save_family(family, folder / "model", tokenizer)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            color, size = COLORS[number % len(COLORS)], (40 + 7 * (number % 9), 56 + 5 * (number % 7))
            Image.new("RGB", size, color).save(folder / f"{number}.png")
            messages = [
                {"role": "user", "content": "<image>\nWhich color is it?"},
                {"role": "assistant", "content": f"It is {color}, and it is all of it."},
            ]
            file.write(json.dumps({"messages": messages, "images": [f"{number}.png"]}) + "\n")


def build_ours(folder: Path, steps: int) -> tuple[Any, int]:
    """Return this engine's trainer, and the labels of a batch."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Trainer, TrainingArguments, set_seed

    from finetuning.algorithms.sft import SelectedLogitsMixin
    from finetuning.config.sections.data import Concatenation, DataConfig, ImagesConfig, NoData
    from finetuning.config.sections.training import SFTArgs
    from finetuning.data.collators import PaddingCollator
    from finetuning.data.images.collator import ImageCollator
    from finetuning.data.images.processor import load_processor
    from finetuning.data.pipeline import prepare_sft
    from finetuning.trainer.mixin import TrainerMixin

    class Ours(SelectedLogitsMixin, TrainerMixin, Trainer):
        collator_columns = ("images", "text")
        uses_model_loss = False
        uses_logits_to_keep = True

    data = DataConfig(
        training_data=Concatenation(type="CONCATENATION", datasets=[{"path": str(folder / "rows.jsonl")}]),
        validation_data=NoData(type="NONE"),
        chat_template_name="keep-original",
        cache="off",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    processor = load_processor(folder / "model", tokenizer, ImagesConfig())
    assert not isinstance(processor, str)
    args = SFTArgs(max_seq_length=512, train_on_completions_only=True)
    rows: Any = prepare_sft(data, args, tokenizer, images=processor).train
    set_seed(0)
    trainer = Ours(
        model=AutoModelForImageTextToText.from_pretrained(folder / "model"),
        args=TrainingArguments(**arguments(folder, steps)),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=ImageCollator(PaddingCollator.for_tokenizer(tokenizer), processor),
    )
    trainer.model_accepts_loss_kwargs = True
    return trainer, sum(label != -100 for row in rows for label in row["labels"]) * BATCH // len(rows)


def build_trl(folder: Path, steps: int) -> Any:
    """Return TRL's trainer for the same rows as prompt and completion, of which it trains the completion."""
    import datasets
    from transformers import AutoModelForImageTextToText, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    from finetuning.config.sections.data import ImagesConfig
    from finetuning.data.images.processor import load_processor

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    processor: Any = load_processor(folder / "model", tokenizer, ImagesConfig())
    processor._processor.chat_template = tokenizer.chat_template
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    made = [
        {
            "prompt": [{"role": "user", "content": row["messages"][0]["content"].removeprefix("<image>\n")}],
            "completion": row["messages"][1:],
            "images": [str(folder / row["images"][0])],
        }
        for row in rows
    ]
    dataset = datasets.Dataset.from_list(made).cast_column("images", datasets.List(datasets.Image()))
    set_seed(0)
    return SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder / "model"),
        args=SFTConfig(**arguments(folder, steps), max_length=None),
        train_dataset=dataset,
        processing_class=processor._processor,
    )


def arguments(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"), "use_cpu": True, "max_steps": steps, "report_to": "none", "bf16": False,
        "per_device_train_batch_size": BATCH, "learning_rate": 1e-4, "save_strategy": "no", "logging_steps": steps,
        "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Training on images beside TRL's trainer.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--family", default="qwen2_5_vl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options.family, 64)
        times: dict[str, list[float]] = {"ours": [], "TRL": []}
        labels = 0
        for _ in range(options.rounds + 1):
            ours, labels = build_ours(folder, options.steps)
            for variant, trainer in (("ours", ours), ("TRL", build_trl(folder, options.steps))):
                start = time.process_time()
                trainer.train()
                times[variant].append(time.process_time() - start)
        # The first round warms up.
        seconds = {variant: median(values[1:]) for variant, values in times.items()}
        print("| trainer | CPU seconds | trained tokens a second | CPU time beside TRL |\n|---|---|---|---|")
        for variant, value in seconds.items():
            rate = labels * options.steps / value
            print(f"| {variant} | {value:.2f} | {rate:,.0f} | {value / seconds['TRL']:.2f} |")


if __name__ == "__main__":
    main()
