"""Damaged files of others end in one message: each border is fuzzed, and no parser's error is called internal.

The damage is drawn from a fixed seed. To look for more, set FUZZ_SEED and FUZZ_CASES.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetuning.cli.main import main
from finetuning.errors import CheckpointError, DataError, GuardStopped, ModelError, StorageError, reading

SEED = int(os.environ.get("FUZZ_SEED", "20"))
CASES = int(os.environ.get("FUZZ_CASES", "6"))
ENDS = {0, 1, 3}

STRANGE: list[Any] = [
    None, True, -1, 2**70, 4 * 10**9, 1e308, "", "\ud800", "x" * 5000, [], {}, [[]], [None], {"a": None}, "../x", 0.5,
]  # fmt: skip


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return data with bytes cut off, replaced, inserted or repeated."""
    kind = rng.randrange(6)
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return b""
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at + 1 :]
    if kind == 3:
        return data[:at] + data[end:]
    if kind == 4:
        return data[:end] + data[at:]
    return rng.randbytes(64) + data[64:]


def damaged_value(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one of its parts replaced, removed, renamed or wrapped."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return rng.choice(STRANGE)
    copy = value.copy()
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    choice = rng.random()
    if choice < 0.6:
        copy[key] = damaged_value(copy[key], rng)
    elif choice < 0.75:
        del copy[key]
    elif choice < 0.9 and isinstance(copy, dict):
        copy[key + "x"] = copy.pop(key)
    else:
        copy[key] = [copy[key]]
    return copy


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return rng.choice([damaged_bytes(data, rng), b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b"NaN", b"[]"])
    return json.dumps(damaged_value(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header = damaged_json(data[8 : 8 + length], rng)
    length = rng.choice([len(header), 2**63, 2**64 - 1, 0, len(header) + 1])
    return struct.pack("<Q", length) + header + data[8 + len(header) :]


def damaged_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    index = rng.randrange(len(lines))
    lines[index] = damaged_json(lines[index], rng) + b"\n"
    return b"".join(lines)


@pytest.fixture
def ends_well(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """A function that runs a command, and asserts that it ends without an internal error."""

    def run(args: list[object], what: object) -> None:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        streams = capsys.readouterr()
        text = streams.out + streams.err
        assert code in ENDS, f"{what}: exit code {code}: {text[-2000:]}"
        assert "Traceback" not in text, f"{what}: {text[-2000:]}"
        assert "internal error" not in text, f"{what}: {text[-2000:]}"

    return run


def damages(file: Path, damage: Callable[[bytes, random.Random], bytes], salt: str) -> Iterator[int]:
    """Write a damaged version of the file, and yield; restore it in the end."""
    original = file.read_bytes()
    for number in range(CASES):
        rng = random.Random(f"{SEED} {salt} {file.name} {number}")
        file.write_bytes(damage(original, rng))
        yield number
    file.write_bytes(original)


MODEL_FILES = {
    "config.json": damaged_json,
    "generation_config.json": damaged_json,
    "tokenizer.json": damaged_json,
    "tokenizer_config.json": damaged_json,
    "model.safetensors": damaged_safetensors,
}


@pytest.fixture
def model(chatml_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chatml_llama_dir, tmp_path / "model"))


@pytest.fixture
def config(sft_values: Any, write_config: Any, model: Path) -> Path:
    changes = {
        "run_conf.model": str(model),
        "data_conf.chat_template_name": "keep-original",
        "training_args.max_steps": 1,
        "telemetry": {"enabled": False},
    }
    return write_config(sft_values(changes))


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_damaged_model(ends_well: Any, config: Path, model: Path, tmp_path: Path, name: str) -> None:
    for number in damages(model / name, MODEL_FILES[name], "train"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ends_well(["sft", config], f"{name} {number}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_model_whose_modules_are_listed(ends_well: Any, config: Path, model: Path, name: str) -> None:
    for number in damages(model / name, MODEL_FILES[name], "targets"):
        ends_well(["targets", config], f"{name} {number}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path, write_jsonl: Any, sft_rows: Any) -> Path:
    """The folder of a config and its finished run, with an adapter and a checkpoint."""
    import yaml

    folder = tmp_path_factory.mktemp("trained")
    rows = write_jsonl(folder / "rows.jsonl", sft_rows(12))
    values = {
        "data_conf": {
            "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(rows)}]},
            "validation_data": {"type": "NONE"},
            "chat_template_name": "keep-original",
            "cache": str(folder / "cache"),
        },
        "training_args": {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
        },
        "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 2},
        "peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 2}},
        "run_conf": {"model": str(chatml_llama_dir), "resume_from_checkpoint": "auto"},
        "sft_args": {"max_seq_length": 256},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["sft", str(folder / "config.yaml")]) == 0
    return folder


CHECKPOINT_FILES = {
    "adapter_config.json": damaged_json,
    "adapter_model.safetensors": damaged_safetensors,
    "optimizer.pt": damaged_bytes,
    "scheduler.pt": damaged_bytes,
    "rng_state.pth": damaged_bytes,
    "trainer_state.json": damaged_json,
    "run_config.json": damaged_json,
    "manifest.json": damaged_json,
}


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint(ends_well: Any, trained: Path, tmp_path: Path, name: str) -> None:
    from finetuning.atomic_io import MANIFEST, write_manifest

    checkpoint = shutil.copytree(trained / "out" / "checkpoint-1", tmp_path / "checkpoint-1")
    for number in damages(checkpoint / name, CHECKPOINT_FILES[name], "resume"):
        if name != MANIFEST:
            # Otherwise the manifest refuses it, and no parser sees it.
            write_manifest(checkpoint)
        out = tmp_path / f"out-{number}"
        overrides = [f"training_args.output_dir={out}", f"run_conf.resume_from_checkpoint={checkpoint}"]
        ends_well(["sft", trained / "config.yaml", *overrides], f"{name} {number}")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "base_fingerprint.json"])
def test_a_damaged_adapter(ends_well: Any, trained: Path, chatml_llama_dir: Path, tmp_path: Path, name: str) -> None:
    adapter = shutil.copytree(trained / "out" / "checkpoint-final", tmp_path / "adapter")
    damage = damaged_safetensors if name.endswith("safetensors") else damaged_json
    for number in damages(adapter / name, damage, "adapter"):
        merge = ["merge", chatml_llama_dir, adapter, tmp_path / f"merged-{number}"]
        ends_well(merge, f"merge {name} {number}")
        ends_well(["create_vllm_compatible_adapter", adapter, "--output", tmp_path / f"v-{number}"], f"{name} {number}")


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "data_report.json", "config.resolved.yaml"])
def test_damaged_records_of_a_run(ends_well: Any, trained: Path, tmp_path: Path, name: str) -> None:
    out = shutil.copytree(trained / "out", tmp_path / "out")
    damage = {"run.json": damaged_json, "data_report.json": damaged_json, "metrics.jsonl": damaged_lines}
    for number in damages(out / name, damage.get(name, damaged_bytes), "report"):
        ends_well(["report", out, "--output", tmp_path / "report.html"], f"report {name} {number}")
        ends_well(["runs", tmp_path], f"runs {name} {number}")


def test_a_damaged_cache_entry(ends_well: Any, trained: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(trained / "cache", tmp_path / "cache")
    for file in [path for path in cache.rglob("*") if path.suffix in (".json", ".arrow")]:
        damage = damaged_json if file.suffix == ".json" else damaged_bytes
        for number in damages(file, damage, "cache"):
            overrides = [f"data_conf.cache={cache}", f"training_args.output_dir={tmp_path / 'out'}"]
            ends_well(["preview", "sft", trained / "config.yaml", *overrides], f"{file.name} {number}")


def _data_files(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Callable[[bytes, random.Random], bytes]]:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "rows.parquet")
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    (folder / "rows.csv").write_text("prompt,completion\n" + "".join(f'"Say {n}","It is {n}"\n' for n in range(9)))
    return {
        "rows.jsonl": damaged_lines,
        "rows.json": damaged_json,
        "rows.jsonl.gz": damaged_bytes,
        "rows.parquet": damaged_bytes,
        "rows.arrow": damaged_bytes,
        "rows.csv": damaged_bytes,
    }


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet", "rows.arrow", "rows.csv"])
def test_damaged_data(ends_well: Any, config: Path, sft_rows: Any, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    damage = _data_files(folder, sft_rows(8))[name]
    for number in damages(folder / name, damage, "data"):
        path = f"data_conf.training_data.datasets.0.path={folder / name}"
        ends_well(["preview", "sft", config, path, "data_conf.on_bad_row=skip"], f"{name} {number}")


@pytest.mark.parametrize("ids", [[4 * 10**9], [2**70], [-1], [0.5], ["a"], [None], [[1]], {"a": 1}, [True], [10**6]])
def test_strange_token_ids(ends_well: Any, config: Path, write_jsonl: Any, tmp_path: Path, ids: Any) -> None:
    rows = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4)
    with rows.open("a") as stream:
        stream.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    ends_well(["sft", config, f"data_conf.training_data.datasets.0.path={rows}"], ids)


TEMPLATES = [
    "{{ messages[5].content }}",
    "{{ 1 / 0 }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ range(10 ** 9) }}",
    "{% for m in messages %}{{ m.content.foo.bar }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages | tojson(indent='x' * 9) | int }}{{ 'a' * 10 ** 12 }}",
    "{{ '%s %s' % 1 }}",
    "{{ messages | sum }}",
    "{% include 'x' %}",
    "{% for m in messages %}{{ raise_exception(m) }}{% endfor %}",
    "{{ '\ud800' }}",
    "{{ dict(messages) }}{{ namespace(__x=1) }}",
    "{% set messages = 1 %}{% for m in messages %}{% endfor %}",
    "{{ strftime_now('%') }}{{ strftime_now(1) }}",
    "{% generation %}{{ messages[1:] | map('foo') | list }}{% endgeneration %}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_strange_templates(ends_well: Any, config: Path, model: Path, source: str, tmp_path: Path) -> None:
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": source}))
    ends_well(["preview", "sft", config], source)


def test_damaged_configs(ends_well: Any, config: Path) -> None:
    for number in damages(config, damaged_bytes, "yaml"):
        ends_well(["sft", config, "--dry-run"], number)


JOB = {
    "model_name_or_path": "model", "training_data_path": "rows.jsonl", "output_dir": "out", "peft_method": "lora",
    "dataset_text_field": "output", "response_template": "### Label:", "target_modules": ["q_proj"],
    "accelerate_launch_args": {"num_processes": 1}, "exp_metadata": {"team": "a"}, "r": 8,
}  # fmt: skip
DATA_CONFIG = {
    "dataprocessor": {"type": "default", "seed": 3, "chat_template": "{{ messages }}"},
    "datasets": [
        {
            "name": "d", "data_paths": ["rows.jsonl"], "sampling": 1.0, "split": {"train": 0.8, "validation": 0.2},
            "data_handlers": [
                {"name": "duplicate_columns", "arguments": {"fn_kwargs": {"old_column": "a", "new_column": "b"}}},
            ],
        },
    ],
}  # fmt: skip
RULES = {
    "controllers": [
        {"name": "low", "triggers": ["on_log"], "rule": "loss['loss'] < 1", "operations": ["stop.should_training_stop"]}
    ],
    "controller_metrics": [{"name": "loss", "class": "Loss"}],
    "operations": [{"name": "stop", "class": "HFControls"}],
}
AXOLOTL = {"base_model": "m", "datasets": [{"path": "a.jsonl", "type": "alpaca"}], "adapter": "lora", "lora_r": 8}
LLAMA_FACTORY = {"model_name_or_path": "m", "stage": "sft", "dataset": "a", "finetuning_type": "lora", "template": "x"}
GENERATE = {
    "prompt_conf": {"type": "open-input", "input": "Hello"}, "model_conf": {"model": "model", "model_args": {}},
    "hf_gen_params": {"max_new_tokens": 2},
}  # fmt: skip
FOREIGN_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "job.json": (JOB, ["job", "job.json", "--worker", "--dry-run"]),
    "job to import.json": (JOB, ["import", "job to import.json"]),
    "data.json": (DATA_CONFIG, ["import", "job.json"]),
    "rules.json": (RULES, ["sft", "config.yaml", "--dry-run", "trainer_controller=rules.json"]),
    "axolotl.json": (AXOLOTL, ["import", "axolotl.json"]),
    "llama_factory.json": (LLAMA_FACTORY, ["import", "llama_factory.json"]),
    "generate.json": (GENERATE, ["generate", "generate.json", "answers.yaml"]),
    "accelerate.json": ({"distributed_type": "NO", "num_processes": 1}, ["job", "job.json", "--print-config"]),
}
"""Files that other programs' users write, and the command that reads each."""


@pytest.mark.parametrize("name", FOREIGN_CONFIGS)
def test_damaged_configs_of_other_programs(
    ends_well: Any, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"output": "a ### Label: b"}\n')
    content, command = FOREIGN_CONFIGS[name]
    job = dict(JOB)
    if name == "data.json":
        job = {key: JOB[key] for key in ("model_name_or_path", "output_dir")} | {"data_config_path": name}
    if name == "accelerate.json":
        job["accelerate_launch_args"] = {"config_file": name}
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / name).write_text(json.dumps(content))
    ends_well(command, name)
    for number in damages(tmp_path / name, damaged_json, "foreign"):
        ends_well(command, f"{name} {number}: {(tmp_path / name).read_bytes()[:500]!r}")


SIZES = {
    "layers": ("config.json", {"num_hidden_layers": 10**9}),
    "more layers than tensors": ("config.json", {"num_hidden_layers": 999}),
    "labels": ("config.json", {"num_labels": 10**9}),
    "vocabulary": ("config.json", {"vocab_size": 4 * 10**9}),
    "heads": ("config.json", {"num_attention_heads": 10**9}),
    "padding": ("config.json", {"pad_token_id": 4 * 10**9}),
}


@pytest.mark.parametrize(("file", "changes"), SIZES.values(), ids=SIZES)
def test_a_model_that_no_machine_could_build_is_refused(
    config: Path, model: Path, capsys: pytest.CaptureFixture[str], file: str, changes: dict[str, int]
) -> None:
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert main(["sft", str(config)]) == 1
    message = capsys.readouterr().err
    if "pad_token_id" not in changes:
        assert f"cannot be right: {next(iter(changes))} is" in message
        assert main(["sft", str(config), "--dry-run"]) == 1


class PanicException(BaseException):
    """What Rust extensions raise; it is no Exception."""


@pytest.mark.parametrize(
    "error",
    [KeyError("a"), RecursionError(), MemoryError(), PanicException("boom"), OSError(5, "I/O error"), ValueError()],
)
def test_any_error_of_a_parser_is_one_of_the_input(error: BaseException) -> None:
    with pytest.raises(ModelError, match=r"x cannot be read: .") as raised, reading("x cannot be read"):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [DataError("a"), GuardStopped("b"), KeyboardInterrupt(), OSError(28, "full")])
def test_other_errors_pass_the_border(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, reading("x cannot be read", CheckpointError):
        raise error
    assert raised.value is error
    assert not isinstance(error, StorageError)
