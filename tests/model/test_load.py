"""Loading a model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.config.sections.model import BitsAndBytes, RunConfig
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError, ModelError
from finetuning.model.load import load_model, usable_attn_implementation


def run_config(path: Path | str, **model_args) -> RunConfig:
    return RunConfig.model_validate({"model": str(path), "model_args": model_args})


@pytest.fixture
def copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))


def test_dtype_is_the_checkpoints_unless_asked(tiny_llama_dir: Path):
    assert load_model(run_config(tiny_llama_dir)).dtype == torch.float32
    assert load_model(run_config(tiny_llama_dir, dtype="bfloat16")).dtype == torch.bfloat16
    assert load_model(run_config(tiny_llama_dir), dtype="float16").dtype == torch.float16
    assert load_model(run_config(tiny_llama_dir, dtype="bfloat16"), dtype="float32").dtype == torch.float32


def test_fields_of_the_models_config_pass_through(tiny_llama_dir: Path):
    model = load_model(
        run_config(tiny_llama_dir, attention_dropout=0.25, use_cache=False, attn_implementation="eager", revision="v1")
    )
    assert model.config.attention_dropout == 0.25 and model.config.use_cache is False
    assert model.config._attn_implementation == "eager"


def test_an_unknown_argument_gets_the_nearest_name(tiny_llama_dir: Path):
    with pytest.raises(ModelError, match=r"attn_implementaton.*Did you mean attn_implementation\?"):
        load_model(run_config(tiny_llama_dir, attn_implementaton="sdpa"))


def test_tied_weights_are_not_missing(chatml_llama_dir: Path):
    model = load_model(run_config(chatml_llama_dir))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_whose_sampling_settings_are_off_can_be_saved(copy: Path, tmp_path: Path):
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "do_sample": False}))
    load_model(run_config(copy)).save_pretrained(tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint" / "generation_config.json").read_text())["do_sample"] is True


def test_missing_weights_are_named(copy: Path):
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1.mlp" not in name}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is missing weights.*layers\.1\.mlp\.down_proj"):
        load_model(run_config(copy))


def test_weights_of_another_shape_are_named(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"cannot be loaded|shapes differ"):
        load_model(run_config(copy))


def test_damaged_files_are_named(copy: Path):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        load_model(run_config(copy))
    (copy / "model.safetensors").write_bytes(b"not a header at all")
    with pytest.raises(ModelError, match="not a valid safetensors file"):
        load_model(run_config(copy))
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(ModelError, match=r"lists model-00002-of-00002\.safetensors, which is missing"):
        load_model(run_config(copy))


def test_pickled_weights_are_refused_unless_asked_for(copy: Path):
    weights = load_file(copy / "model.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only pickled weights.*use_safetensors: false"):
        load_model(run_config(copy))
    model = load_model(run_config(copy, use_safetensors=False))
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_an_empty_or_wrong_folder_is_named(tmp_path: Path, copy: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty contains no model: config\.json is missing"):
        load_model(run_config(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"there is no folder .*/nowhere"):
        load_model(run_config(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"/local_resources/basemodel.*the default"):
        load_model(RunConfig())
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="contains an adapter, not a base model"):
        load_model(run_config(copy))
    with pytest.raises(ModelError, match="is a file"):
        load_model(run_config(copy / "config.json"))
    with pytest.raises(ModelError, match="neither a local folder nor a valid hub id"):
        load_model(run_config("not a name!"))


def test_a_hub_id_offline_says_so(tiny_llama_dir: Path):
    with pytest.raises(ModelError, match=r"some/model is not a local folder.*hub is unreachable.*offline"):
        load_model(run_config("some/model"))


def test_remote_code_is_never_asked_about(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit(77)")
    with pytest.raises(ModelError, match=r"custom code.*trust_remote_code"):
        load_model(run_config(copy))


@pytest.mark.parametrize("answers", [False, True], ids=["refused", "silent"])
def test_a_hub_out_of_reach_is_one_message_soon(answers: bool, tmp_path: Path):
    """A port that nobody listens on, and one that takes connections and never replies."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        if answers:
            threading.Thread(target=_hold, args=(server,), daemon=True).start()
        else:
            server.close()
        script = (
            "from finetuning.model.resolve import resolve_model\n"
            "from finetuning.errors import ModelError\n"
            "try:\n    resolve_model('some/model', 'model')\n"
            "except ModelError as error:\n    print('MESSAGE', error)\n"
        )
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=400)
    assert "MESSAGE some/model is not a local folder, is not in" in done.stdout, done.stderr
    assert "Retry" not in done.stderr


def _hold(server: socket.socket) -> None:
    held = []
    while True:
        try:
            held.append(server.accept())
        except OSError:
            return


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_attention_that_cannot_run_here_is_replaced_with_a_warning(
    tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    if torch.cuda.is_available() or find_spec("kernels"):
        pytest.skip("needs a machine where it cannot run")
    model = load_model(run_config(tiny_llama_dir, attn_implementation=name))
    assert model.config._attn_implementation == "sdpa"
    assert [record.message for record in caplog.records if "is used instead" in record.message] == [
        next(record.message for record in caplog.records if f"attn_implementation: {name} needs" in record.message)
    ]


def test_unknown_attention_gets_a_suggestion() -> None:
    with pytest.raises(ModelError, match=r"Did you mean sdpa\?"):
        usable_attn_implementation("sdpaa")
    for name in (None, "sdpa", "eager"):
        assert usable_attn_implementation(name) == name


def test_device_maps_that_fight_the_launcher_are_refused(tiny_llama_dir: Path):
    with pytest.raises(ConfigError, match="2 processes"):
        load_model(run_config(tiny_llama_dir, device_map="auto"), topology=ProcessTopology(0, 0, 2))
    with pytest.raises(ConfigError, match="cannot be combined with fsdp"):
        load_model(run_config(tiny_llama_dir, device_map={"": 0}), sharded_by="fsdp")
    assert load_model(run_config(tiny_llama_dir, device_map={"": "cpu"})).device.type == "cpu"


def test_quantization_needs_exactly_one_width(tiny_llama_dir: Path):
    with pytest.raises(ConfigError, match="neither of load_in_4bit and load_in_8bit"):
        load_model(run_config(tiny_llama_dir), BitsAndBytes(quantization_type="bits-and-bytes"))
