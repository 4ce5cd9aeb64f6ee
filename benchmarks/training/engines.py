"""The variants of the training benchmark that run beside our engine: a plain loop, ours, transformers, TRL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from measuring import WARM_STEPS, Bench, last_loss

LORA = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def write_rows(bench: Bench) -> None:
    """The rows as our engine prepares them, so that all variants train on the same tokens; and the first adapter."""
    import json

    from transformers import AutoTokenizer, set_seed

    from finetuning.config.sections.data import Concatenation, DataConfig, NoData
    from finetuning.config.sections.training import SFTArgs
    from finetuning.data.pipeline import prepare_sft

    folder = bench.folder
    data = DataConfig(
        training_data=Concatenation(type="CONCATENATION", datasets=[{"path": str(folder / "train.jsonl")}]),
        validation_data=NoData(type="NONE"),
        chat_template_name="keep-original",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prepared = prepare_sft(data, SFTArgs(max_seq_length=1024, train_on_completions_only=True), tokenizer)
    rows = [{name: list(row[name]) for name in ("input_ids", "labels")} for row in prepared.train.to_list()]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    if bench.options.lora:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        get_peft_model(model, LoraConfig(**LORA)).save_pretrained(folder / "adapter")


def model_of(bench: Bench) -> Any:
    """The model, with the adapter where asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    options = bench.options
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(bench.folder / "model", dtype=dtype).to(options.device)
    if options.lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, bench.folder / "adapter", is_trainable=True)
    return model


def lay_end_to_end(model: Any) -> None:
    from finetuning.model.varlen_attention import enable_varlen

    reason = enable_varlen(model, getattr(model, "peft_config", {}).get("default"))
    if reason:
        raise SystemExit(reason)


def plain_loop(bench: Bench, flat: bool, autocast: bool = False) -> tuple[int, float]:
    """A hand-written loop, the least that a step takes: padded, or end to end; logits only where there are labels."""
    import torch
    from torch.nn.functional import cross_entropy

    from finetuning.data.collators import FlatteningCollator, PaddingCollator

    options, rows, model, loss = bench.options, bench.rows(), model_of(bench), 0.0
    if flat:
        lay_end_to_end(model)
    collate = FlatteningCollator() if flat else PaddingCollator(0)
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], 5e-5, weight_decay=0.0
    )
    model.train()
    for step in range(options.steps):
        taken = rows[step * bench.rows_a_step : (step + 1) * bench.rows_a_step]
        batches = [collate(taken[start : start + options.batch]) for start in range(0, len(taken), options.batch)]
        count, loss = sum(int(batch["shift_labels"].ne(-100).sum()) for batch in batches), 0.0
        for batch in batches:
            batch = {name: value.to(options.device) if hasattr(value, "to") else value for name, value in batch.items()}
            targets, *_ = (batch.pop(name) for name in ("shift_labels", "labels", "label_positions", "num_labels"))
            wanted = targets.ne(-100)
            with torch.autocast(options.device, torch.bfloat16, enabled=autocast):
                logits = model(**batch, logits_to_keep=wanted, use_cache=False).logits.flatten(0, -2).float()
            part = cross_entropy(logits, targets[wanted], reduction="sum") / count
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bench.meter.step()
    return bench.counted(rows), loss


def with_trainer(bench: Bench, name: str, autocast: bool = False) -> tuple[int, float]:
    """transformers' Trainer on padded rows, or our trainer on padded or flat ones, over the same order of rows."""
    import datasets
    import transformers

    from finetuning.data.collators import FlatteningCollator, PaddingCollator

    rows, model = bench.rows(), model_of(bench)
    arguments = transformers.TrainingArguments(
        **bench.arguments(name), lr_scheduler_type="constant", optim="adamw_torch", bf16=autocast
    )
    data = datasets.Dataset.from_list(rows)
    if name.startswith("transformers"):

        def padded(batch: list[dict[str, Any]]) -> dict[str, Any]:
            names = ("input_ids", "attention_mask", "labels")
            return {key: value for key, value in PaddingCollator(0)(batch).items() if key in names}

        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=padded, callbacks=[bench.watch()]
        )
    else:
        flat = "end to end" in name
        if flat:
            lay_end_to_end(model)
        trainer = _our_trainer(bench, model, arguments, data, flat)
        trainer.data_collator = FlatteningCollator() if flat else PaddingCollator(0)
    trainer.train()
    return bench.counted(rows), last_loss(trainer)


def _our_trainer(bench: Bench, model: Any, arguments: Any, data: Any, flat: bool) -> Any:
    from transformers import AutoTokenizer

    from finetuning.algorithms.algorithm import BatchLayout
    from finetuning.algorithms.sft import build_trainer

    tokenizer = AutoTokenizer.from_pretrained(bench.folder / "model")
    return build_trainer(
        SimpleNamespace(
            model=model,
            arguments=arguments,
            data=SimpleNamespace(train=data, validation=None, has_images=False),
            tokenizer=SimpleNamespace(tokenizer=tokenizer, pad_input_id=None),
            layout=BatchLayout(not flat, "benchmark"),
            callbacks=[bench.watch()],
            end_of_turn=None,
            extended=lambda trainer_class: trainer_class,
            experiment=SimpleNamespace(
                sft_args=SimpleNamespace(max_seq_length=1024, logits_at_once="auto"), training_args=None
            ),
            peft_config=None,
            load_reference=None,
        )
    )


def with_trl(bench: Bench) -> tuple[int, float]:
    """TRL's SFTTrainer with its defaults, on rows that it tokenises itself."""
    import transformers
    import trl
    from datasets import load_dataset

    trainer = trl.SFTTrainer(
        model=model_of(bench),
        args=trl.SFTConfig(**bench.arguments("trl")),
        train_dataset=load_dataset("json", data_files=str(bench.folder / "train.jsonl"), split="train"),
        callbacks=[bench.watch()],
        processing_class=transformers.AutoTokenizer.from_pretrained(bench.folder / "model"),
    )
    taken = slice(WARM_STEPS * bench.rows_a_step, bench.options.steps * bench.rows_a_step)
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"][taken])
    trainer.train()
    return tokens, last_loss(trainer)
