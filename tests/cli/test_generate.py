"""`generate` as a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ForkServer

from finetuning.cli.generate import main

RunCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def generate(run_cli: RunCli, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs `generate` in the test's folder."""
    return lambda *args: run_cli(args, cwd=tmp_path, program="generate")


def write_config(path: Path, model: Path, prompt_conf: dict[str, Any], **sections: Any) -> Path:
    values = {"prompt_conf": prompt_conf, "model_conf": {"model": str(model)}, **sections}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def eval_data(path: Path) -> dict[str, Any]:
    return {"type": "eval-data", "data": {"path": str(path)}}


def test_eval_data_is_answered_and_scored(
    generate: Any, chatml_llama_dir: Path, tmp_path: Path, write_jsonl: Any, sft_rows: Any
) -> None:
    data = write_jsonl(tmp_path / "colors.jsonl", sft_rows(5))
    config = write_config(
        tmp_path / "config.yaml", chatml_llama_dir, eval_data(data), hf_gen_params={"max_new_tokens": 4}
    )
    result = generate(config, "out.yaml", "--score", "regex", "--batch-size", "2")
    assert result.returncode == 0, result.stderr
    records = yaml.safe_load((tmp_path / "out.yaml").read_text(encoding="utf-8"))
    assert [record["id"] for record in records] == [f"row-{number}" for number in range(5)]
    assert records[0]["correct_answers"] == ["red"]
    assert records[0]["prompt"].count("<|im_start|>assistant") == 2
    scores = json.loads((tmp_path / "out.yaml.scores.json").read_text())
    assert (scores["score"], scores["total"], len(scores["rows"])) == ("regex", 5, 5)
    assert result.stdout.splitlines()[0].split() == ["dataset", "regex", "correct"]
    assert "5 answers in out.yaml" in result.stderr


def test_open_input_and_overrides(generate: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", Path("/none"), {"type": "open-input", "input": "The quick"})
    result = generate(
        config,
        "deep/out.jsonl",
        f"model_conf.model={tiny_llama_dir}",
        "prompt_conf.num_samples=3",
        "hf_gen_params={do_sample: true, max_new_tokens: 12}",
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "deep/out.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["The quick"] * 3
    assert len({record["answer"] for record in records}) > 1


def test_flags_of_fms_hf_tuning(generate: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("The quick\n\nNames of rows are\n", encoding="utf-8")
    result = generate("--model", tiny_llama_dir, "--text_file", "texts.txt", "--max_new_tokens", "3")
    assert result.returncode == 0, result.stderr
    records = json.loads((tmp_path / "inference_result.json").read_text())
    assert [record["input"] for record in records] == ["The quick", "Names of rows are"]
    assert all(record["output"].startswith(f"<s>{record['input']}") for record in records)

    result = generate("--model", tiny_llama_dir, "--text", "The quick", "--out_file", "one.json")
    assert result.returncode == 0, result.stderr
    assert [record["input"] for record in json.loads((tmp_path / "one.json").read_text())] == ["The quick"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected RUN, CONFIG and OUT, or --model"),
        (["config.yaml"], "expected RUN, CONFIG and OUT, or --model"),
        (["confg.yaml"], 'confg.yaml: no such run, model folder or config. Did you mean "config.yaml"?'),
        (["none.yaml", "out.yaml"], "none.yaml: no such file"),
        (["config.yaml", "out.txt"], "out.txt: the extension selects"),
        (["config.yaml", "out.yaml", "--text", "a"], "--text: only valid with --model"),
        (["config.yaml", "out.yaml", "--model", "m", "--text", "a"], "--model cannot be combined with a config"),
        (["--model", "m"], "--model requires --text or --text_file"),
        (["--model", "/none", "--text", "a"], "error: --model: there is no folder /none"),
        (["--model", "/none", "--text_file", "none.txt"], "--text_file: cannot read none.txt"),
        (["config.yaml", "out.yaml", "--score", "exact"], "nothing to score"),
        (["config.yaml", "out.yaml", "hf_gen_params.max_new_token=3"], 'Did you mean "max_new_tokens"?'),
        (
            ["config.yaml", "out.yaml", "hf_gen_params.max_new_tokens=3000"],
            'command line "hf_gen_params.max_new_tokens=3000": hf_gen_params.max_new_tokens: 3000 leaves no tokens',
        ),
        (["config.yaml", "out.yaml"], "config.yaml:2:3: model_conf.model: there is no folder /none"),
        (["config.yaml", "out.yaml", "prompt_conf.inputs=a"], 'Did you mean "input"?'),
        (["config.yaml", "out.yaml", "prompt_conf={type: eval-data, data: {path: no.jsonl}}"], "no.jsonl: no such"),
        (
            ["config.yaml", "out.yaml", "backend=vllm", "vllm_conf.program=/none/vllm"],
            "vllm_conf.program: /none/vllm is not installed here, and backend: vllm starts it. Name the program of an",
        ),
        (
            ["config.yaml", "out.yaml", "backend=vllm", "hf_gen_params.num_beams=2"],
            "hf_gen_params.num_beams: has no effect with backend: vllm",
        ),
        (
            [
                "config.yaml",
                "out.yaml",
                "backend=vllm",
                "quant_conf={quantization_type: bits-and-bytes, load_in_4bit: true}",
            ],
            "quant_conf: backend: vllm loads the model without it",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    generate: Any, tmp_path: Path, args: list[str], message: str
) -> None:
    write_config(tmp_path / "config.yaml", Path("/none"), {"type": "open-input", "input": "a"})
    result = generate(*args)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def adapter_of(folder: Path, base: str | None) -> Path:
    """An adapter folder that contains nothing but a config with its base model."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/none"], "--model: there is no folder /none"),
        (["--model", "texts.txt"], "--model: texts.txt is a file"),
        (["--model", "adapter"], "adapter/adapter_config.json: base_model_name_or_path: there is no folder /gone"),
        (["--model", "unnamed"], "--model: unnamed/adapter_config.json does not name its base model"),
        (["--model", "adapter", "--base_model_name_or_path", "/none"], "--base_model_name_or_path: there is no folder"),
        (
            ["--model", "adapter", "--base_model_name_or_path", "adapter"],
            "--base_model_name_or_path: adapter contains an adapter, not a base model. Name the base model here and the"
            " adapter as --model.",
        ),
        (["--model", "TINY", "--base_model_name_or_path", "TINY"], "--base_model_name_or_path: TINY is not an adapter"),
        (["--model", "adapter", "--base_model_name_or_path", "TINY"], "--model: adapter contains no adapter_model"),
        (["--model", "TINY", "--max_new_tokens", "4000"], "--max_new_tokens: 4000 leaves no tokens for the prompt"),
        (["--model", "TINY", "--out_file", "out.txt"], "--out_file: out.txt: the extension selects"),
        (["--model", "CHAT", "--text", ""], "--text: the prompt is empty"),
        (["--model", "TINY", "--text_file", "none.txt"], "--text_file: cannot read none.txt"),
    ],
)
def test_errors_name_the_flag_that_caused_them(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_llama_dir: Path,
    chatml_llama_dir: Path,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter_of(tmp_path / "adapter", "/gone")
    adapter_of(tmp_path / "unnamed", None)
    (tmp_path / "texts.txt").write_text("The quick\n")
    names = {"TINY": str(tiny_llama_dir), "CHAT": str(chatml_llama_dir)}
    text = [] if "--text" in flags or "--text_file" in flags else ["--text_file", "texts.txt"]
    assert main([names.get(flag, flag) for flag in flags] + text) == 1
    reported = capsys.readouterr().err.replace(str(tiny_llama_dir), "TINY")
    assert f"error: {message}" in reported
    assert "model_conf" not in reported and "hf_gen_params" not in reported


@pytest.mark.parametrize("args", [["--help"], ["config.yaml", "out.yaml", "hf_gen_params.max_new_token=3"]])
def test_neither_help_nor_a_typo_needs_torch(tmp_path: Path, args: list[str]) -> None:
    write_config(tmp_path / "config.yaml", Path("/none"), {"type": "open-input", "input": "a"})
    program = (
        "import sys; from finetuning.cli.generate import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *args], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "set()"


def test_ctrl_c_leaves_what_is_done(
    tiny_llama_dir: Path, tmp_path: Path, write_jsonl: Any, generate: Any, fork_server: ForkServer
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"number {number}"} for number in range(400)])
    config = write_config(
        tmp_path / "config.yaml", tiny_llama_dir, eval_data(data), hf_gen_params={"min_new_tokens": 30}
    )
    arguments = [config, "out.json", "--batch-size", "2"]
    process = fork_server.start(arguments, program="generate", cwd=tmp_path)
    partial = tmp_path / ".out.json.spool.jsonl"  # old name
    assert process.wait_for(lambda: partial.exists() and partial.read_text().count("\n") > 3), process.output
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert "interrupted: out.json contains" in process.stderr
    assert "Traceback" not in process.stderr
    records = json.loads((tmp_path / "out.json").read_text())
    assert 0 < len(records) < 400
    positions = [record["id"] for record in records]
    assert positions == sorted(positions)
