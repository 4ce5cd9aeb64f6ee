"""`finetuning preview` and `finetuning prepare`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetuning.cli.data_commands import prepare_main, preview_main
from finetuning.cli.main import main
from finetuning.config.sections.data import DatasetSource
from finetuning.data.formats import Options
from finetuning.data.open_dataset import open_dataset
from finetuning.data.samples import TokenIds


@pytest.fixture
def no_model(sft_values: Any, tmp_path: Path, chatml_llama_dir: Path) -> Callable[..., dict[str, Any]]:
    """`sft_values` whose model is a folder with a tokenizer and no weights."""
    folder = tmp_path / "only-tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (chatml_llama_dir / name).exists():
            (folder / name).write_bytes((chatml_llama_dir / name).read_bytes())
    return lambda changes=None: sft_values({"run_conf.model": str(folder), **(changes or {})})


def test_preview_marks_the_trained_text(no_model: Any, write_config: Any, capsys: Any, tmp_path: Path) -> None:
    assert main(["preview", "sft", str(write_config(no_model())), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall("^--- ", out, re.M)) == 2
    assert "⟦Number 1 is green.<|im_end|>⟧" in out
    assert f"--- {tmp_path}/sft.jsonl:2 (row): " in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--color", "--colour"])
def test_colors_mark_trained_text_and_special_tokens(
    no_model: Any, write_config: Any, capsys: Any, option: str
) -> None:
    assert preview_main(["sft", str(write_config(no_model())), "--rows", "1", option, "always"]) == 0
    assert "\x1b[32mNumber 0 is red.\x1b[7m<|im_end|>\x1b[27m" in capsys.readouterr().out


def test_truncation_is_marked(no_model: Any, write_config: Any, capsys: Any, write_jsonl: Any, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "word " * 90}]}
    write_jsonl(tmp_path / "sft.jsonl", [long])
    cut = {"sft_args.max_seq_length": 40, "sft_args.length_handling": "truncate"}
    assert preview_main(["sft", str(write_config(no_model(cut)))]) == 0
    assert re.search(r"word.*⟧✂ \d+ tokens cut off here", capsys.readouterr().out)


def test_invalid_rows_are_counted_and_do_not_stop_the_preview(
    no_model: Any, write_config: Any, capsys: Any, tmp_path: Path
) -> None:
    with open(tmp_path / "sft.jsonl") as stream:
        rows = stream.read()
    (tmp_path / "sft.jsonl").write_text("{\n" + rows)
    assert preview_main(["sft", str(write_config(no_model())), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "dropped: 1 row, bad row" in out
    assert "training: 3 rows of 4 kept" in out


class Page(HTMLParser):
    """Collects the text of a page by the class of the elements that contain it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.texts: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input", "br"):
            self.stack.append(dict(attrs).get("class") or tag)

    def handle_endtag(self, tag: str) -> None:
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        for name in set(self.stack):
            self.texts[name] = self.texts.get(name, "") + data


def test_the_html_page_is_self_contained_and_escaped(
    no_model: Any, write_config: Any, write_jsonl: Any, tmp_path: Path
) -> None:
    nasty = "<script>alert(1)</script> <!--rows--> & <|im_end|>"
    row = {"messages": [{"role": "user", "content": nasty}, {"role": "assistant", "content": "Fine."}]}
    write_jsonl(tmp_path / "sft.jsonl", [row])
    assert preview_main(["sft", str(write_config(no_model())), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text("utf-8")
    page = Page()
    page.feed(text)
    assert page.stack == []
    assert page.texts["trained"] == "Fine.<|im_end|>"
    assert nasty in page.texts["pre"]
    assert page.texts["h1"] == "finetuning sft: first rows"
    assert "<!--" not in text
    assert not re.search(r"""(src|href)=|url\(|@import|https?:""", text)


def test_a_preference_has_two_parts(
    no_model: Any, write_config: Any, capsys: Any, write_jsonl: Any, dpo_rows: Any, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "dpo.jsonl", dpo_rows(6))
    values = no_model({"sft_args": None, "data_conf.training_data.datasets": [{"path": str(rows)}]})
    assert preview_main(["dpo", str(write_config(values)), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert (out.count("(chosen)"), out.count("(rejected)")) == (2, 2)


def test_the_number_of_rows_is_limited(no_model: Any, write_config: Any, capsys: Any) -> None:
    assert preview_main(["sft", str(write_config(no_model())), "--rows", "0"]) == 1
    assert "--rows 0: must be between 1 and 100" in capsys.readouterr().err


def test_a_run_trains_on_prepared_rows_without_the_data_files(
    sft_values: Any, write_config: Any, train: Any, tmp_path: Path, capsys: Any
) -> None:
    losses = train(sft_values({"training_args.output_dir": str(tmp_path / "first")})).losses
    config = str(write_config(sft_values()))
    assert main(["prepare", "sft", config, "--output", str(tmp_path / "ready"), "--shards", "2"]) == 0
    assert "set data_conf.prepared=" in capsys.readouterr().out
    assert len(list((tmp_path / "ready").glob("*.arrow"))) == 2
    assert prepare_main(["sft", config, "--output", str(tmp_path / "ready")]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    (tmp_path / "sft.jsonl").unlink()
    assert train(sft_values({"data_conf.prepared": str(tmp_path / "ready")})).losses == losses


def test_a_folder_of_prepared_rows_is_a_dataset(
    write_config: Any, sft_values: Any, capsys: Any, tmp_path: Path
) -> None:
    validation = {"type": "AUTO_SPLIT", "ratio": 0.25}
    config = str(write_config(sft_values({"data_conf.validation_data": validation})))
    assert prepare_main(["sft", config, "--output", str(tmp_path / "ready"), "--shards", "2"]) == 0
    folders = {
        split: open_dataset(DatasetSource(path=str(tmp_path / "ready"), split=split), "d", "sft", Options())
        for split in (None, "validation")
    }
    rows = {split: [row for row in opened.rows if isinstance(row, TokenIds)] for split, opened in folders.items()}
    assert {opened.row_format.name for opened in folders.values()} == {"tokens"}
    assert len(rows[None]) > len(rows["validation"]) > 0
    assert not {tuple(row.input_ids) for row in rows[None]} & {tuple(row.input_ids) for row in rows["validation"]}


def test_a_run_reads_prepared_rows_from_the_cache(
    sft_values: Any, write_config: Any, train: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("FINETUNING_CACHE", str(tmp_path / "cache"))
    assert prepare_main(["sft", str(write_config(sft_values()))]) == 0
    assert "prepared now" in capsys.readouterr().out
    monkeypatch.setattr("finetuning.data.preprocessor.Preprocessor.read", None)
    run = train(sft_values())
    capsys.readouterr()
    report = json.loads((run.output_dir / "data_report.json").read_text())
    assert report[0]["kept"] == 24
    assert prepare_main(["--prune", "0"]) == 0
    assert "removed 1 entry" in capsys.readouterr().out


def doctor_says(capsys: Any, config: Path, *options: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["data", "doctor", str(config), "--workers", "1", *options])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_the_doctor_judges_the_rows_of_a_config(
    no_model: Any, write_config: Any, write_jsonl: Any, capsys: Any, tmp_path: Path
) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": []}, good])
    code, out, _ = doctor_says(capsys, write_config(no_model()), "--html", str(tmp_path / "data.html"))
    assert code == 1 and "stop Rows: 1 row of 2 (50.0%) cannot be trained on change: data_conf" in out
    assert f"{tmp_path}/sft.jsonl:1: " in out and "needs at least one message" in (tmp_path / "data.html").read_text()


def test_the_doctor_reports_on_data_of_which_no_row_is_left(
    no_model: Any, write_config: Any, write_jsonl: Any, capsys: Any, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": []}, {"messages": [{"role": "user", "content": "Hi"}]}])
    code, out, _ = doctor_says(capsys, write_config(no_model()))
    assert code == 1 and "training: 0 rows of 2 kept" in out
    assert "stop Rows: no training row is left of 2 rows: bad row (1), nothing to train on (1) change: the file" in out
    assert "sft.jsonl:1: messages: bad row: needs at least one message" in out
    assert "sft.jsonl:2: nothing to train on: no assistant message" in out and "Duplicates" not in out


def test_the_doctor_names_a_dataset_of_which_no_row_is_left(
    no_model: Any, write_config: Any, write_jsonl: Any, capsys: Any, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "empty.jsonl", [{"messages": []}])
    datasets = [{"path": str(tmp_path / name)} for name in ("sft.jsonl", "empty.jsonl")]
    config = write_config(no_model({"data_conf.training_data.datasets": datasets}))
    code, out, _ = doctor_says(capsys, config)
    assert code == 1 and f"stop Datasets: every row of {tmp_path}/empty.jsonl was dropped" in out


def test_personal_data_is_counted_where_its_package_is_installed(
    no_model: Any, write_config: Any, write_jsonl: Any, capsys: Any, tmp_path: Path
) -> None:
    pytest.importorskip("presidio_analyzer", reason="pip install 'finetuning[pii]'")

    def row(answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": answer}]}

    config = write_config(no_model())
    write_jsonl(tmp_path / "sft.jsonl", [row(f"Hall {number}, at 10.30, on 2024-05-17.") for number in range(5)])
    assert "OK Personal data: none was found" in doctor_says(capsys, config, "--pii")[1]
    personal = ["Write to rosa@example.com.", "Call +41 44 668 18 00.", "Pay with 4111 1111 1111 1111.", "user@host"]
    personal += ["The host is 192.168.17.5.", "To DE89 3704 0044 0532 0130 00."]
    write_jsonl(tmp_path / "sft.jsonl", [row(answer) for answer in personal])
    code, out, _ = doctor_says(capsys, config, "--pii")
    assert code == 0 and "look Personal data: 5 rows with what looks like personal data: " in out
    for kind in ("email address", "phone number", "credit card", "ip address", "iban code"):
        assert f"1 x {kind}" in out
    assert "sft.jsonl:2: 1 x phone number" in out and "rosa@" not in out


def test_a_missing_package_for_personal_data_is_named(
    no_model: Any, write_config: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer.predefined_recognizers", None)
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    code, _, err = doctor_says(capsys, write_config(no_model()), "--pii")
    assert code == 1
    assert "--pii needs the package presidio-analyzer" in err and "pip install 'finetuning[pii]'" in err
