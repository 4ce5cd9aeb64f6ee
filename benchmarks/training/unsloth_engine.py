"""unsloth's variants of the training benchmark; they run in an interpreter of their own, without our engine.

That interpreter has unsloth, unsloth_zoo and what they ask for, but for the packages that compute on GPUs alone. On a
machine without a GPU unsloth takes its CPU path by itself.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from measuring import Bench, last_loss


def with_unsloth(bench: Bench, checkpointing: bool, compiled: bool = False, **arguments: Any) -> tuple[int, float]:
    """unsloth as its notebooks have it, on our rows and labels, from the same adapter.

    Args:
        checkpointing: its own gradient checkpointing, which is its default.
        compiled: its CPU path's switch for torch.compile, which needs a C++ compiler.
        arguments: of the trainer; all else is its own default, autocast to bfloat16 among it where the CPU has that.
    """
    os.environ["UNSLOTH_CPU_COMPILE"] = "1" if compiled else "0"
    # Before the libraries that it changes.
    language_model = importlib.import_module("unsloth").FastLanguageModel
    import datasets
    import torch
    import trl
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    kept = "unsloth" if checkpointing else False
    model, tokenizer = language_model.from_pretrained(
        str(bench.folder / "model"),
        max_seq_length=1024,
        dtype=torch.bfloat16 if bench.options.bf16 else torch.float32,
        load_in_4bit=False,
        full_finetuning=not bench.options.lora,
        use_gradient_checkpointing=kept,
    )
    if bench.options.lora:
        model = language_model.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing=kept)
        set_peft_model_state_dict(model, load_file(bench.folder / "adapter" / "adapter_model.safetensors"))
    rows = bench.rows()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            **bench.arguments("unsloth"), max_length=1024, gradient_checkpointing=checkpointing,
            learning_rate=5e-5, lr_scheduler_type="constant", **arguments,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[bench.watch()],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return bench.counted(rows), last_loss(trainer)
