"""What a name on the command line means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuning.atomic_io import write_manifest
from finetuning.cli.named_model import find_model
from finetuning.errors import ConfigError, ModelError

PREVIEW = """--- data.jsonl:3 (row): 9 tokens, 2 trained
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
⟦Hello<|im_end|>⟧
"""


def make_folder(folder: Path, adapter_of: str | None = None) -> Path:
    """A folder that has the files of a model, or of an adapter, without what they hold."""
    folder.mkdir(parents=True)
    if adapter_of is None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("weights")
    else:
        config = {"peft_type": "LORA", "base_model_name_or_path": adapter_of}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_text("weights")
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    """A function that makes the output directory of a run, without its models."""

    def make(config: dict[str, Any] | None = None, **record: Any) -> Path:
        run = tmp_path / "out"
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"status": "completed", "method": "sft", **record}))
        (run / "config.resolved.yaml").write_text(yaml.safe_dump(config or {}))
        (run / "preview.txt").write_text(PREVIEW)
        return run

    return make


def test_the_final_model_of_a_run_comes_before_its_checkpoints(make_run: Any) -> None:
    # The recorded folder is relative to where the run was started.
    run = make_run(artifact={"folder": "elsewhere/out/last"})
    make_folder(run / "last")
    make_folder(run / "checkpoint-9")
    model = find_model(str(run))
    assert (model.conf.model, model.conf.adapter) == (str(run / "last"), None)
    assert model.notes == (f"{run}: the final model, last",)


def test_without_a_final_model_the_newest_complete_checkpoint_is_chosen(make_run: Any) -> None:
    run = make_run(status="interrupted")
    for step in (8, 16, 24):
        write_manifest(make_folder(run / f"checkpoint-{step}"))
    (run / "checkpoint-24" / "model.safetensors").unlink()
    (run / "checkpoint-16" / "model.safetensors").write_text("WEIGHTS")
    model = find_model(str(run))
    assert model.folder == run / "checkpoint-8"
    (note,) = model.notes
    assert note.startswith(
        f"{run}: no final model (interrupted); checkpoint-8; checkpoint-24 skipped: it has no weights"
    )
    assert "checkpoint-16 skipped: model.safetensors" in note


def test_a_run_without_weights_is_refused(make_run: Any) -> None:
    run = make_run()
    with pytest.raises(ModelError, match="neither a final model nor a checkpoint with weights"):
        find_model(str(run))


def test_a_reward_model_generates_nothing(make_run: Any) -> None:
    run = make_run(method="reward", artifact={"folder": "last"})
    make_folder(run / "last")
    with pytest.raises(ModelError, match="scores texts and generates none"):
        find_model(str(run))


def test_an_adapter_gets_the_base_of_its_training(make_run: Any, tmp_path: Path) -> None:
    base = str(make_folder(tmp_path / "base"))
    arguments = {"dtype": "float32", "revision": "abc", "device_map": {"": 3}, "trust_remote_code": True}
    quantization = {"quantization_type": "bits-and-bytes", "load_in_4bit": True}
    run = make_run({"run_conf": {"model": base, "model_args": arguments}, "quant_conf": quantization})
    make_folder(run / "checkpoint-final", base)
    for name in (run, run / "checkpoint-final"):
        model = find_model(str(name))
        args = model.conf.model_args
        assert (model.conf.model, model.conf.adapter) == (base, str(run / "checkpoint-final"))
        # The devices are those of the training machine.
        assert (args.dtype, args.revision, args.device_map, args.trust_remote_code) == ("float32", "abc", None, True)
        assert model.quant_conf.model_dump()["load_in_4bit"] is True
        assert "quantized as in training" in model.notes[-1]


def test_another_base_gets_no_revision_of_the_first(make_run: Any, tmp_path: Path) -> None:
    run = make_run({"run_conf": {"model": "base", "model_args": {"dtype": "float32", "subfolder": "inner"}}})
    make_folder(run / "checkpoint-final", "base")
    model = find_model(str(run), base=str(make_folder(tmp_path / "other")))
    assert (model.conf.model, model.conf.model_args.subfolder) == (str(tmp_path / "other"), None)
    assert model.conf.model_args.dtype == "float32"


def test_a_base_in_the_folder_of_a_moved_run_is_found(make_run: Any) -> None:
    run = make_run()
    make_folder(run / "checkpoint-new-basemodel")
    make_folder(run / "checkpoint-final", "/gone/out/checkpoint-new-basemodel")
    assert find_model(str(run)).conf.model == str(run / "checkpoint-new-basemodel")


def test_a_folder_that_is_in_no_run_has_no_memory(tmp_path: Path) -> None:
    model = find_model(str(make_folder(tmp_path / "model")))
    assert (model.run, model.notes, model.system_prompt) == (None, (), None)
    with pytest.raises(ConfigError, match="no training prompt is known"):
        model.first_row()


def test_the_first_training_row_is_split_before_what_is_trained(make_run: Any) -> None:
    run = make_run(data={"system_prompt": "Be brief."})
    make_folder(run / "checkpoint-final")
    model = find_model(str(run))
    row = model.first_row()
    assert row.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (row.answer, str(row.location)) == ("Hello<|im_end|>", "data.jsonl:3")
    assert model.system_prompt == "Be brief."


def test_of_a_plain_text_the_first_half_is_the_prompt(make_run: Any) -> None:
    run = make_run()
    make_folder(run / "checkpoint-final")
    (run / "preview.txt").write_text("--- data.txt:1 (row): 4 tokens, 4 trained\n⟦one two three four⟧\n")
    row = find_model(str(run)).first_row()
    assert (row.prompt, row.answer) == ("one two", " three four")
