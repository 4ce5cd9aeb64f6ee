"""Options that streaming does not support are rejected with a reason and a hint, before any data is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

DATA = (
    "{{training_data: {{type: CONCATENATION, datasets: [{{path: a{source}}}]}}, validation_data: {validation}{more}}}"
)
NONE = "{type: NONE}"


def data(source: str = "", validation: str = NONE, more: str = ", streaming: true") -> str:
    return DATA.format(source=source and f", {source}", validation=validation, more=more)


@pytest.mark.parametrize(
    ("sections", "method", "line"),
    [
        ({"data_conf": data()}, "sft",
         "training_args.max_steps: must be set: the length of an epoch is not known with data_conf.streaming."
         " Set max_steps, or leave streaming out to train for num_train_epochs."),
        ({"data_conf": data(), "training_args": "{max_steps: 5}"}, "kto",
         "data_conf.streaming: is only valid for sft: the trainer of kto needs all rows in advance. Remove it: prepared"
         " rows are read from disk as needed; max_rows limits a dataset."),
        ({"data_conf": data(more=", streaming: true, prepared: p"), "training_args": "{max_steps: 5}"}, "sft",
         "data_conf.streaming: is true, but data_conf.prepared names a dataset that is already prepared. Remove"
         " streaming: prepared rows are read from disk as needed."),
        ({"data_conf": data(validation="{type: AUTO_SPLIT}"),
          "training_args": "{max_steps: 5, eval_strategy: steps, eval_steps: 5}"}, "sft",
         "data_conf.validation_data.type: is AUTO_SPLIT, but data_conf.streaming is true: a fraction of a dataset"
         " requires its length, which is not known. Put validation rows into a separate file, and set"
         " type: CONCATENATION."),
        ({"data_conf": data("train_ratio: 0.5"), "training_args": "{max_steps: 5}"}, "sft",
         "data_conf.training_data.datasets.0.train_ratio: is set, but data_conf.streaming is true: a fraction of a"
         " dataset requires its length, which is not known. Set max_rows."),
        ({"data_conf": data(), "training_args": "{max_steps: 5, save_strategy: epoch}"}, "sft",
         "training_args.save_strategy: is epoch, but the length of an epoch is not known with data_conf.streaming. Set"
         " save_strategy: steps."),
        ({"data_conf": data(), "training_args": "{max_steps: 5, train_sampling_strategy: group_by_length}"}, "sft",
         "training_args.train_sampling_strategy: is group_by_length, but data_conf.streaming is true: rows come as"
         " data_conf.shuffle_buffer draws them. Leave it out; padding costs nothing where sft_args.batching is auto."),
        ({"data_conf": data(), "training_args": "{max_steps: 5, dataloader_num_workers: 2}"}, "sft",
         "training_args.dataloader_num_workers: does not go with data_conf.streaming: rows are made by a thread of the"
         " run, once, and workers would each make all of them. Leave it out."),
        ({"data_conf": data(), "training_args": "{max_steps: 5, accelerator_config: {dispatch_batches: true}}"}, "sft",
         "training_args.accelerator_config.dispatch_batches: does not go with data_conf.streaming: each process takes"
         " its own share of the rows. Leave it out."),
        ({"data_conf": data(), "training_args": "{max_steps: 5}",
          "peft_conf": "{peft_type: LORA, peft_kwargs: {init_lora_weights: eva}}"}, "sft",
         "peft_conf.peft_kwargs.init_lora_weights: is eva, which looks at rows before training, but"
         " data_conf.streaming is true. Leave it out, or leave streaming out."),
    ],
)  # fmt: skip
def test_unsupported_streaming_options_are_rejected(
    sections: dict[str, str], method: str, line: str, messages: Callable[..., list[str]], changed: Callable[..., str]
) -> None:
    (message,) = messages(changed(**sections), method)
    assert message.partition(": ")[2] == line


def test_streaming_with_max_steps_is_valid(check: Callable, changed: Callable[..., str]) -> None:
    validation = "{type: CONCATENATION, datasets: [{path: b}]}"
    text = changed(
        data_conf=data(validation=validation, more=", streaming: true, shuffle_buffer: 1"),
        training_args="{max_steps: 5, eval_strategy: steps, save_strategy: steps}",
    )
    validated = check(text)
    assert validated.experiment.data_conf.shuffle_buffer == 1
    assert not validated.warnings


def test_shuffle_buffer_without_streaming_gives_a_warning(check: Callable, changed: Callable[..., str]) -> None:
    (warning,) = check(changed(data_conf=data(more=", shuffle_buffer: 5"))).warnings
    assert "data_conf.shuffle_buffer: is ignored without data_conf.streaming" in str(warning)
    assert not check(changed(data_conf=data(more=", shuffle_buffer: 10000, streaming: false"))).warnings
