"""Thirty kinds of bad input: each gets one line with its location and a remedy, and leaves nothing behind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuning.cli.main import main

USER = 1
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


class Said:
    """What the command answered."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err
        # The count of bad rows, with what to do about them, closes their list.
        reported = [line for line in err.splitlines() if not line.startswith("warning: ")]
        self.lines = [line for line in reported if not re.match(r"error: \d+ bad rows?[,.] ", line)]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A function that runs the command and gives its one-line message, once nothing else is found wrong with it."""

    def run(config: Path, *arguments: str, method: str = "sft", lines: int = 1) -> str:
        capsys.readouterr()
        code = main([method, str(config), *arguments])
        said = Said(code, *capsys.readouterr())
        assert said.code == USER, said.err
        assert len(said.lines) == lines, said.err
        assert all(line.startswith("error: ") for line in said.lines)
        assert "Traceback" not in said.out + said.err
        assert not (tmp_path / "out").exists(), "an output directory was left behind"
        return said.err

    yield run


def line_of(config: Path, text: str) -> int:
    return next(number for number, line in enumerate(config.read_text().splitlines(), 1) if text in line)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_01_no_file_or_a_directory(refused: Any, tmp_path: Path) -> None:
    assert "nothing.yaml: no such file" in refused(tmp_path / "nothing.yaml")
    assert "is a directory" in refused(tmp_path)


def test_02_an_empty_file(refused: Any, tmp_path: Path) -> None:
    message = refused(written(tmp_path, "# nothing yet\n"))
    assert "config.yaml: is empty; required: data_conf, training_args, batchsize_conf, peft_conf" in message


def test_03_a_list_or_two_documents(refused: Any, tmp_path: Path) -> None:
    message = refused(written(tmp_path, "- data_conf\n"))
    assert "config.yaml:1: expected sections (keys and values), found a list" in message
    message = refused(written(tmp_path, "data_conf: {}\n---\ndata_conf: {}\n"))
    assert "one document" in message
    assert re.search(r"(:|line )[23]\b", message)


@pytest.mark.parametrize("text", ["data_conf:\n\ttraining_data: {}\n", "data_conf: [1, 2\nrun_conf: {}\n"])
def test_04_broken_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    assert main(["sft", str(written(tmp_path, text))]) == USER
    message = capsys.readouterr().err
    assert re.search(r"config\.yaml:2(:\d+)?: ", message)
    assert "Traceback" not in message
    assert "tab" in message if "\t" in text else True


def test_05_an_unknown_key(refused: Any, sft_values: Any, write_config: Any) -> None:
    config = write_config(sft_values({"run_conf.modl": "x", "run_conf.model": None}))
    message = refused(config)
    assert f"config.yaml:{line_of(config, 'modl')}:" in message
    assert 'run_conf.modl: unknown key. Did you mean "model"?' in message


def test_06_a_duplicate_key(refused: Any, sft_values: Any, write_config: Any) -> None:
    config = write_config(sft_values())
    config.write_text(config.read_text() + "run_conf: {model: other}\n")
    message = refused(config)
    first, second = (n for n, line in enumerate(config.read_text().splitlines(), 1) if line.startswith("run_conf"))
    assert "run_conf" in message
    assert f":{second}:" in message
    assert f"line {first}" in message


def test_07_a_number_with_an_exponent_is_a_number(
    sft_values: Any, write_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(sft_values({"peft_conf": {"peft_type": "LORA", "peft_kwargs": {"lora_dropout": 0.5}}}))
    text = config.read_text().replace("learning_rate: 0.01", "learning_rate: 1e-5")
    config.write_text(text.replace("lora_dropout: 0.5", "lora_dropout: 1e-1"))
    assert main(["sft", str(config), "--dry-run"]) == 0
    assert "learning rate      1e-05" in capsys.readouterr().out


def test_08_save_strategy_no(sft_values: Any, write_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(sft_values())
    assert "save_strategy: 'no'" in config.read_text()
    config.write_text(config.read_text().replace("save_strategy: 'no'", "save_strategy: no"))
    assert main(["sft", str(config), "--dry-run"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("training_args.learning_rate", -1, ">= 0"),
        ("training_args.weight_decay", float("nan"), "finite"),
        ("training_args.adam_beta2", 1.5, "< 1"),
        ("batchsize_conf.max_per_device_train_batch_size", 0, "> 0"),
        ("batchsize_conf.total_train_batch_size", -8, "> 0"),
        ("sft_args.max_seq_length", -4, "> 1"),
    ],
)
def test_09_numbers_out_of_range(
    refused: Any, sft_values: Any, write_config: Any, key: str, value: float, bound: str
) -> None:
    config = write_config(sft_values({key: value}))
    message = refused(config)
    assert f"config.yaml:{line_of(config, key.split('.')[-1])}:" in message
    assert key in message
    assert bound in message
    assert f"got {value}" in message


def test_10_a_peft_type_in_small_letters(refused: Any, sft_values: Any, write_config: Any) -> None:
    message = refused(write_config(sft_values({"peft_conf": {"peft_type": "lora"}})))
    assert 'unknown peft_type "lora"' in message
    assert "LORA" in message.split("mean")[1]


def test_11_arguments_that_peft_does_not_have(refused: Any, sft_values: Any, write_config: Any) -> None:
    config = write_config(sft_values({"peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": "eight", "rank": 1}}}))
    message = refused(config, lines=2)
    assert "peft_conf.peft_kwargs.r: " in message
    assert '"eight"' in message
    assert "peft_conf.peft_kwargs.rank: " in message


def test_12_a_total_that_does_not_divide(
    refused: Any, sft_values: Any, write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "0")
    config = write_config(sft_values({"batchsize_conf.total_train_batch_size": 512}))
    message = refused(config)
    assert f"config.yaml:{line_of(config, 'total_train')}" in message
    assert "batchsize_conf.total_train_batch_size" in message
    assert "512 rows cannot be divided among 6 processes; the nearest totals that can are 510 and 516" in message


def test_13_evaluation_without_data(refused: Any, sft_values: Any, write_config: Any) -> None:
    message = refused(write_config(sft_values({"training_args.eval_strategy": "steps"})))
    assert "training_args.eval_strategy" in message
    assert "data_conf.validation_data.type" in message


def test_14_a_template_whose_turns_cannot_be_separated(
    refused: Any, sft_values: Any, write_config: Any, chatml_llama_dir: Path, tmp_path: Path
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(chatml_llama_dir, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    changes = {"run_conf.model": str(model), "data_conf.chat_template_name": "keep-original"}
    message = refused(write_config(sft_values(changes)), lines=2)
    assert "the template writes nothing after an answer, so the model could not learn to stop" in message
    assert "(8 rows like this)" in message and "24 bad rows." in message


def test_15_weights_of_nothing(refused: Any, sft_values: Any, write_config: Any) -> None:
    def mix(*weights: float) -> dict[str, Any]:
        sources = [{"path": f"{weight}.jsonl", "sampling_weight": weight} for weight in weights]
        return {"data_conf.training_data": {"type": "PRECOMPUTE_WEIGHTED_MIX", "datasets": sources}}

    message = refused(write_config(sft_values(mix(0, 0))), lines=2)
    assert "datasets.0.sampling_weight" in message
    assert "datasets.1.sampling_weight" in message
    assert "0.jsonl" in message
    assert "datasets.1.sampling_weight: must be >= 0 (got -2.0)" in refused(write_config(sft_values(mix(1, -2.0))))


def test_16_an_output_directory_that_cannot_be_written(
    refused: Any, sft_values: Any, write_config: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config = write_config(sft_values({"training_args.output_dir": str(tmp_path / "file" / "out")}))
    message = refused(config)
    assert f"config.yaml:{line_of(config, '  output_dir')}:" in message
    assert "is not writable" in message


def test_17_quantized_weights_are_not_trained(refused: Any, sft_values: Any, write_config: Any) -> None:
    quantized = {"quant_conf": {"quantization_type": "bits-and-bytes", "load_in_4bit": True}}
    message = refused(write_config(sft_values(quantized)))
    assert "peft_conf.peft_type: is NO_PEFT, but quant_conf quantizes the model" in message


def test_18_a_config_for_another_method(refused: Any, dpo_values: Any, sft_values: Any, write_config: Any) -> None:
    message = refused(write_config(dpo_values({"training_args.beta": 0.2})))
    assert "this looks like a dpo config" in message
    assert "run: finetuning dpo" in message
    message = refused(write_config(sft_values()), method="dpo")
    assert "run: finetuning sft" in message


def test_19_a_password_in_the_tracking_address(refused: Any, sft_values: Any, write_config: Any) -> None:
    tracking = {"mlflow_server_uri": "http://me:geheim@host:5000", "experiment_name": "e"}
    config = write_config(sft_values({"tracking": tracking}))
    message = refused(config)
    assert "MLFLOW_TRACKING_PASSWORD" in message
    assert "geheim" not in message
    assert "geheim" not in refused(write_config(sft_values()), "--mlflow-server-uri", "http://me:geheim@host")


def test_20_data_that_is_not_there(refused: Any, sft_values: Any, write_config: Any, tmp_path: Path) -> None:
    config = write_config(sft_values({"data_conf.training_data.datasets": [{"path": "nowhere.jsonl"}]}))
    message = refused(config)
    assert f"config.yaml:{line_of(config, 'nowhere')}:" in message
    assert "nowhere.jsonl: no such file (working directory" in message
    assert "nowhere.jsonl: no such file" in refused(config, "--dry-run")
    (tmp_path / "empty").mkdir()
    config = write_config(sft_values({"data_conf.training_data.datasets": [{"path": str(tmp_path / "empty")}]}))
    assert str(tmp_path / "empty") in refused(config)


@pytest.fixture
def of_data(refused: Any, sft_values: Any, write_config: Any, tmp_path: Path) -> Callable[..., str]:
    """A function that gives the message for a data file of these bytes."""

    def message(content: bytes | str, changes: dict[str, Any] | None = None, *, lines: int = 1) -> str:
        path = tmp_path / "train.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        source = {"data_conf.training_data.datasets": [{"path": str(path)}]}
        return refused(write_config(sft_values({**source, **(changes or {})})), lines=lines)

    return message


def rows(*values: Any) -> str:
    import json

    return "".join(json.dumps(value) + "\n" for value in values)


def test_21_an_empty_data_file(of_data: Any) -> None:
    assert "train.jsonl: 0 rows" in of_data("")
    assert "train.jsonl: 0 rows" in of_data("\n\n")


def test_22_malformed_json(of_data: Any) -> None:
    assert "train.jsonl:2: invalid JSON at column" in of_data(rows(ROW) + '{"messages": [\n' + rows(ROW))


@pytest.mark.parametrize(("content", "actual"), [(None, "null"), (3, "number|3"), ([1], "list|text|parts")])
def test_23_content_that_is_no_text(of_data: Any, content: Any, actual: str) -> None:
    bad = {"messages": [ROW["messages"][0], {"role": "assistant", "content": content}]}
    message = of_data(rows(ROW, bad))
    assert "train.jsonl:2: " in message
    assert "messages[1].content" in message
    assert re.search(actual, message)


def test_24_no_message(of_data: Any) -> None:
    message = of_data(rows({"messages": []}))
    assert "train.jsonl:1: " in message
    assert "at least one message" in message


def test_25_rows_of_another_shape(of_data: Any) -> None:
    turns = [{"from": "humman", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert "train.jsonl:1: " in of_data(rows({"conversations": turns}))
    message = of_data(rows({"prompt_messages": [], "chosen_messages": [], "rejected_messages": []}))
    assert "messages" in message
    assert "dpo" in message
    message = of_data(rows({"exchange": ROW["messages"]}))
    assert "exchange" in message


def test_26_roles(of_data: Any) -> None:
    typo = {"messages": [ROW["messages"][0], {"role": "asistant", "content": "Ho"}]}
    message = of_data(rows(ROW, typo))
    assert "train.jsonl:2: " in message
    assert "asistant" in message
    assert "assistant" in message
    silent_rank = {"messages": [ROW["messages"][0]]}
    assert "train.jsonl" in of_data(rows(silent_rank, silent_rank))


def test_27_bytes_that_are_no_text(
    of_data: Any, sft_values: Any, write_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = of_data(rows(ROW).encode() + b'{"messages": [{"role": "user", "content": "\xff"}]}\n')
    assert "train.jsonl:2: " in message
    assert "UTF-8" in message
    assert "train.jsonl:1: " in of_data(rows(ROW).replace("Ho", "\\ud800"))
    assert "train.jsonl:1: " in of_data(rows(ROW).replace("Ho", "\\u0000"))
    assert "UTF-16" in of_data(rows(ROW).encode("utf-16"))
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + rows(ROW).encode())
    config = write_config(sft_values({"data_conf.training_data.datasets": [{"path": str(marked)}]}))
    assert main(["sft", str(config), "--dry-run"]) == 0, capsys.readouterr().err


def test_28_every_row_too_long(of_data: Any) -> None:
    message = of_data(rows(ROW, ROW), {"sft_args.max_seq_length": 4})
    assert "all 2 rows" in message
    assert re.search(r"shortest .*\d+ tokens", message)
    assert "max_seq_length" in message


def test_29_some_rows_bad(of_data: Any) -> None:
    bad = {"messages": []}
    message = of_data(rows(*[bad] * 13, ROW))
    assert "train.jsonl:1: " in message and "(13 rows like this)" in message
    assert "train.jsonl:2: " not in message
    assert "13 bad rows. Set data_conf.on_bad_row: skip" in message
    message = of_data(rows(bad, *[ROW] * 3), {"data_conf.on_bad_row": "skip"}, lines=2)
    assert "max_lost_fraction" in message


def test_30_pairs_without_a_difference(refused: Any, dpo_values: Any, write_config: Any, tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "Hi"}]
    answer = [{"role": "assistant", "content": "Ho"}]
    path = tmp_path / "pairs.jsonl"
    same = {"prompt_messages": turn, "chosen_messages": answer, "rejected_messages": answer}
    path.write_text(rows(*[same] * 4))
    config = write_config(dpo_values({"data_conf.training_data.datasets": [{"path": str(path)}]}))
    message = refused(config, method="dpo")
    assert "pairs.jsonl" in message


@pytest.mark.parametrize("case", ["typo", "data", "model", "template", "resume"])
def test_as_a_process(run_cli: Any, sft_values: Any, write_config: Any, tmp_path: Path, case: str) -> None:
    changes: dict[str, Any] = {
        "typo": {"training_args.learning_rat": 1},
        "data": {"data_conf.training_data.datasets": [{"path": str(tmp_path / "bad.jsonl")}]},
        "model": {"run_conf.model": str(tmp_path / "no-model")},
        "template": {"data_conf.chat_template_name": "chatml"},
        "resume": {"run_conf.resume_from_checkpoint": True},
    }[case]
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    config = write_config(sft_values(changes))
    result = run_cli(["sft", config], cwd=tmp_path)
    errors = Said(result.returncode, result.stdout, result.stderr).lines
    assert result.returncode == USER
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert ("bad.jsonl:1: " if case == "data" else "config.yaml:") in errors[0]
    assert not (tmp_path / "out").exists()
