"""What cannot stream is refused with its reason and what to do instead, before anything is read."""

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
         "training_args.max_steps: must be set: data_conf.streaming reads rows as training goes, so that nobody has"
         " counted an epoch. Set max_steps, or leave streaming out to train for num_train_epochs."),
        ({"data_conf": data(), "training_args": "{max_steps: 5}"}, "kto",
         "data_conf.streaming: is for sft: the trainer of kto takes rows that are all at hand. Leave it out: prepared"
         " rows lie on the disk, and are read as they are needed; max_rows caps a dataset."),
        ({"data_conf": data(more=", streaming: true, prepared: p"), "training_args": "{max_steps: 5}"}, "sft",
         "data_conf.streaming: is true, but data_conf.prepared names rows that are made already. Leave streaming out:"
         " they are read from the disk as they are needed."),
        ({"data_conf": data(validation="{type: AUTO_SPLIT}"),
          "training_args": "{max_steps: 5, eval_strategy: steps, eval_steps: 5}"}, "sft",
         "data_conf.validation_data.type: is AUTO_SPLIT, but data_conf.streaming is true: a share of a dataset is known"
         " when all of it was read, which a stream never has. Put validation rows into a file of their own, and set"
         " type: CONCATENATION."),
        ({"data_conf": data("train_ratio: 0.5"), "training_args": "{max_steps: 5}"}, "sft",
         "data_conf.training_data.datasets.0.train_ratio: is set, but data_conf.streaming is true: a share of a dataset"
         " is known when all of it was read, which a stream never has. Set max_rows."),
        ({"data_conf": data(), "training_args": "{max_steps: 5, save_strategy: epoch}"}, "sft",
         "training_args.save_strategy: is epoch, but data_conf.streaming has no epochs that could be counted. Set"
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
def test_what_cannot_stream_is_refused(
    sections: dict[str, str], method: str, line: str, messages: Callable[..., list[str]], changed: Callable[..., str]
) -> None:
    (found,) = messages(changed(**sections), method)
    assert found.partition(": ")[2] == line


def test_a_stream_with_steps_is_right(check: Callable, changed: Callable[..., str]) -> None:
    validation = "{type: CONCATENATION, datasets: [{path: b}]}"
    text = changed(
        data_conf=data(validation=validation, more=", streaming: true, shuffle_buffer: 1"),
        training_args="{max_steps: 5, eval_strategy: steps, save_strategy: steps}",
    )
    validated = check(text)
    assert validated.experiment.data_conf.shuffle_buffer == 1
    assert not validated.warnings


def test_a_buffer_without_a_stream_is_said_to_be_ignored(check: Callable, changed: Callable[..., str]) -> None:
    (warning,) = check(changed(data_conf=data(more=", shuffle_buffer: 5"))).warnings
    assert "data_conf.shuffle_buffer: is ignored: it is for streams" in str(warning)
    assert not check(changed(data_conf=data(more=", shuffle_buffer: 10000, streaming: false"))).warnings
