"""YAML files of Silogen's engine, unchanged: they train, save, go on, merge, convert and answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetuning.cli import create_vllm_compatible_adapter, generate, merge_adapter
from finetuning.cli import main as finetuning

LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "peft_kwargs": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}
STRATEGIES = ("bos-repurpose", "eos-repurpose", "unk-repurpose", "unk-convert-to-eos")


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "training_logs.jsonl").read_text().splitlines()]
    return [line["data"]["value"] for line in lines if line["name"] == "training_loss"]


def config_for_answers(model: Path, adapter: Path | None) -> dict[str, Any]:
    return {
        "prompt_conf": {"type": "open-input", "input": "What is number 3?", "num_samples": 1},
        "model_conf": {"model": str(model), **({"adapter": str(adapter)} if adapter else {})},
        "hf_gen_params": {"max_length": 200, "max_new_tokens": 4},
    }


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a console script in this process, to success; gives its stdout."""

    def run(script: Any, *arguments: str | Path) -> str:
        capsys.readouterr()
        code = script.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


def end_of_turn(folder: Path) -> str:
    return json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]


@pytest.mark.parametrize(
    ("template", "strategy", "ends"),
    [
        ("mistral-with-system", "bos-repurpose", "</s>"),
        ("chat-ml", "eos-repurpose", "<|im_end|>"),
        ("poro", "unk-repurpose", "</s>"),
        ("simplified-llama31", "unk-convert-to-eos", "<|eot_id|>"),
        ("keep-original", "bos-repurpose", "<|im_end|>"),
    ],
)
def test_each_template_from_rows_to_answers(
    tool: Any,
    sft_values: Any,
    write_config: Any,
    tiny_llama_dir: Path,
    chatml_llama_dir: Path,
    snug_llama_dir: Path,
    read_tensors: Any,
    tmp_path: Path,
    template: str,
    strategy: str,
    ends: str,
) -> None:
    # New tokens find spare rows in one base, and make the other grow.
    base = {"keep-original": chatml_llama_dir, "poro": tiny_llama_dir}.get(template, snug_llama_dir)
    changes = {
        "data_conf.chat_template_name": template,
        "data_conf.missing_pad_token_strategy": strategy,
        "run_conf.model": str(base),
        "peft_conf": LORA,
        "sft_args.length_handling": "truncate",
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 2,
        "training_args.max_steps": 2,
        "run_conf.final_checkpoint_name": "checkpoint-part",
    }
    tool(finetuning, "sft", write_config(sft_values(changes)))
    longer = {
        "training_args.max_steps": 4,
        "run_conf.final_checkpoint_name": None,
        "run_conf.resume_from_checkpoint": "auto",
        "run_conf.allow_changed": ["training_args.max_steps"],
    }
    output = tool(finetuning, "sft", write_config(sft_values({**changes, **longer})))
    assert "resumed from" in output
    out, adapter = tmp_path / "out", tmp_path / "out" / "checkpoint-final"
    assert len(losses(out)) == 4
    assert end_of_turn(adapter) == ends
    grown = out / "checkpoint-new-basemodel"
    base = grown if grown.is_dir() else base
    assert grown.is_dir() == (template in ("chat-ml", "simplified-llama31"))
    merged = tmp_path / "merged"
    tool(merge_adapter, base, adapter, merged)
    assert end_of_turn(merged) == ends
    for model, wearing in ((base, adapter), (merged, None)):
        config = write_config(config_for_answers(model, wearing), "generate.yaml")
        tool(generate, config, tmp_path / "answers.yaml")
        answers = yaml.safe_load((tmp_path / "answers.yaml").read_text())
        assert len(answers) == 1
        assert "What is number 3?" in answers[0]["prompt"]
    from transformers import AutoModelForCausalLM

    rows = read_tensors(base)["model.embed_tokens.weight"].shape[0]
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert loaded.get_input_embeddings().weight.shape[0] == rows
    served = tmp_path / "served"
    if template in ("mistral-with-system", "keep-original"):
        tool(create_vllm_compatible_adapter, adapter, "--output", served)
        assert all(".lora_" in name for name in read_tensors(served))
    else:
        assert create_vllm_compatible_adapter.main([str(adapter), "--output", str(served)]) == 1
        assert not served.exists(), "the rows of new tokens would be lost"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_pads_does_not_change_what_is_learnt(
    tool: Any, sft_values: Any, write_config: Any, tiny_llama_dir: Path, tmp_path: Path, strategy: str
) -> None:
    changes = {
        "data_conf.chat_template_name": "mistral-with-system",
        "data_conf.missing_pad_token_strategy": strategy,
        "run_conf.model": str(tiny_llama_dir),
        "sft_args.batching": "padded",
    }
    tool(finetuning, "sft", write_config(sft_values(changes)))
    plain = {"sft_args.batching": "auto", "training_args.output_dir": str(tmp_path / "plain")}
    tool(finetuning, "sft", write_config(sft_values({**changes, **plain})))
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_rows_that_are_too_long(tool: Any, sft_values: Any, write_config: Any, tmp_path: Path) -> None:
    def report(handling: str) -> dict[str, Any]:
        out = tmp_path / handling
        changes = {
            "sft_args.length_handling": handling,
            "sft_args.max_seq_length": 48,
            "training_args.output_dir": str(out),
            "training_args.max_steps": 1,
        }
        tool(finetuning, "sft", write_config(sft_values(changes)))
        data = json.loads((out / "data_report.json").read_text())
        return (data if isinstance(data, list) else data["parts"])[0]

    filtered, truncated = report("filter"), report("truncate")
    assert filtered["kept"] < filtered["rows"] == 24
    assert filtered["filtered_by_length"] == 24 - filtered["kept"]
    assert truncated["truncated"] > 0
    assert truncated["kept"] > filtered["kept"]


def test_a_weighted_mix_with_a_split(
    tool: Any, sft_values: Any, write_config: Any, write_jsonl: Any, sft_rows: Any, tmp_path: Path
) -> None:
    paths = [write_jsonl(tmp_path / f"{count}.jsonl", sft_rows(count)) for count in (8, 4, 2)]
    weights = (1.0, 1.0, 0.0)
    sources = [{"path": str(path), "sampling_weight": weight} for path, weight in zip(paths, weights, strict=True)]
    changes = {
        "data_conf.training_data": {"type": "PRECOMPUTE_WEIGHTED_MIX", "datasets": sources, "seed": 3},
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "data_type": "ChatConversation", "ratio": 0.25, "seed": 5},
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 1,
    }
    tool(finetuning, "sft", write_config(sft_values(changes)))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    # Taking turns until the longer set is used up gives 16 rows, a quarter of which validates.
    assert record["data"]["rows"] == 12


def test_validation_files_of_their_own(tool: Any, dpo_values: Any, write_config: Any, tmp_path: Path) -> None:
    values = dpo_values()
    source = values["data_conf"]["training_data"]
    changes = {
        "data_conf.validation_data": source,
        "training_args.eval_strategy": "epoch",
        "training_args.max_steps": 3,
        "peft_conf": LORA,
    }
    tool(finetuning, "dpo", write_config(dpo_values(changes)))
    log = (tmp_path / "out" / "training_logs.jsonl").read_text()
    assert "validation_loss" in log


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path) -> Path:
    """A GPT-2 of two layers, whose weights are stored transposed."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(chatml_llama_dir)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        sizes = {"vocab_size": 504, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=2))
    directory = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_yaml_in_the_manner_of_its_own_tests(
    tool: Any, write_config: Any, tiny_gpt2_dir: Path, sft_rows: Any, tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text(json.dumps(sft_rows(1)[0]))
    values = {
        "data_conf": {
            "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(tmp_path / "data.json")}]},
            "validation_data": {"type": "NONE"},
            "chat_template_name": "chat-ml",
            "padding_side": "right",
            "missing_pad_token_strategy": "bos-repurpose",
        },
        "training_args": {
            "bf16": True,
            "use_cpu": True,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "learning_rate": 0.5,
            "logging_steps": 1,
            "logging_strategy": "steps",
            "lr_scheduler_type": "constant",
            "max_steps": 5,
            "num_train_epochs": -1,
            "optim": "sgd",
            "output_dir": str(tmp_path / "out"),
            "overwrite_output_dir": True,
            "push_to_hub": False,
            "report_to": ["none"],
            "save_steps": 1.0,
            "save_strategy": "steps",
            "seed": 42,
        },
        "batchsize_conf": {"total_train_batch_size": 1, "max_per_device_train_batch_size": 1},
        "peft_conf": {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "peft_kwargs": {"r": 8, "fan_in_fan_out": True, "target_modules": ["c_attn"], "lora_dropout": 0.0},
        },
        "run_conf": {
            "model": str(tiny_gpt2_dir),
            "model_args": {
                "attn_implementation": "eager",
                "use_cache": False,
                "revision": "5f91d94bd9cd7190a9f3216ff93cd1dd95f2c7be",
            },
            "resume_from_checkpoint": False,
            "determinism": "full",
        },
        "sft_args": {"max_seq_length": 2048, "train_on_completions_only": True},
        "tracking": None,
    }
    tool(finetuning, "sft", write_config(values))
    out = tmp_path / "out"
    actual = losses(out)
    assert len(actual) == 5
    assert actual[-1] < actual[0]
    tool(merge_adapter, tiny_gpt2_dir, out / "checkpoint-final", tmp_path / "merged")


def test_a_tracking_folder_as_its_readme_shows_it(
    run_cli: Any, sft_values: Any, write_config: Any, tmp_path: Path
) -> None:
    """MLflow 3 refuses such an address by itself."""
    address = (tmp_path / "mlruns").as_uri()
    tracking = {"mlflow_server_uri": address, "experiment_name": "colors", "hf_mlflow_log_artifacts": "False"}
    result = run_cli(["sft", write_config(sft_values({"tracking": tracking}))])
    assert result.returncode == 0, result.stderr
    assert f"{address}, experiment colors" in result.stdout
    assert len(list((tmp_path / "mlruns").rglob("metrics/loss"))) == 1, result.stdout + result.stderr


def test_another_models_grown_base_is_neither_used_nor_overwritten(
    run_cli: Any, sft_values: Any, write_config: Any, snug_llama_dir: Path, tmp_path: Path
) -> None:
    import shutil

    stale = tmp_path / "out" / "checkpoint-new-basemodel"
    shutil.copytree(snug_llama_dir, stale)
    before = {path.name: path.read_bytes() for path in stale.iterdir()}
    config = write_config(sft_values({"run_conf.model": str(snug_llama_dir), "peft_conf": LORA}))
    # A process of its own: the program leaves packages out of the one that it runs in.
    refused = run_cli(["sft", config])
    assert refused.returncode == 1
    assert f"{stale} exists and is not empty" in refused.stderr
    assert {path.name: path.read_bytes() for path in stale.iterdir()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="FlashAttention may run")
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_attention_that_cannot_run_here_trains_as_sdpa(
    sft_values: Any, write_config: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    runs = {}
    for attention in (name, "sdpa"):
        out = tmp_path / attention.replace("/", "-")
        values = sft_values(
            {
                "peft_conf": LORA,
                "run_conf.model_args.attn_implementation": attention,
                "training_args.output_dir": str(out),
                "training_args.max_steps": 2,
            }
        )
        config = str(write_config(values, f"{out.name}.yaml"))
        expected = 1 if attention == name else 0
        for arguments in (["sft", config, "--dry-run"], ["sft", config]):
            assert finetuning.main(arguments) == 0
            stderr = capsys.readouterr().err
            assert stderr.count("; sdpa is used instead") == expected
            assert stderr.count(f"attn_implementation: {name} needs ") == expected
            assert "pip install" not in stderr
        runs[attention] = losses(out)
    assert runs[name] == runs["sdpa"]
    assert len(runs["sdpa"]) > 0
