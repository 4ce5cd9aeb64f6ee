from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Messages = Callable[..., list[str]]
Changed = Callable[..., str]


def extras(check: Callable, changed: Changed, training_args: str, method: str = "sft") -> dict:
    return check(changed(training_args=training_args), method).experiment.training_args.model_extra


def test_training_args_take_the_trainers_fields(check: Callable, changed: Changed) -> None:
    text = "{dataloader_num_workers: '2', eval_delay: 5, lr_scheduler_kwargs: {num_cycles: 1}, hub_strategy: end,"
    text += " lr_scheduler_type: cosine_with_restarts,"
    result = extras(check, changed, text + " include_num_input_tokens_seen: yes, dataloader_drop_last: no, fsdp: true}")
    assert result == {
        "dataloader_num_workers": 2,
        "eval_delay": 5,
        "lr_scheduler_kwargs": {"num_cycles": 1},
        "hub_strategy": "end",
        "include_num_input_tokens_seen": "yes",
        "dataloader_drop_last": False,
        "fsdp": True,
    }
    assert extras(check, changed, "{precompute_ref_log_probs: on}", "dpo") == {"precompute_ref_log_probs": True}


@pytest.mark.parametrize(
    ("training_args", "method", "line"),
    [
        ("{dataloader_num_worker: 2}", "sft", 'unknown key. Did you mean "dataloader_num_workers"?'),
        ("{dataloader_num_workers: two}", "sft", 'expected a whole number (got "two")'),
        ("{dataloader_num_workers: true}", "sft", "training_args.dataloader_num_workers: expected a number (got true)"),
        ("{dataloader_drop_last: 7}", "sft", "expected true or false (got 7)"),
        ("{neftune_noise_alpha: .nan}", "sft", "must be a finite number (got nan)"),
        ("{hub_strategy: every}", "sft", "must be one of end, every_save, checkpoint, all_checkpoints (got"),
        ("{train_sampling_strategy: randm}", "sft", 'Did you mean "random"?'),
        ("{per_device_train_batch_size: 2}", "sft", "is computed from batchsize_conf. Remove it here."),
        ("{per_device_eval_batch_size: 2}", "sft", "is computed from batchsize_conf. Remove it here."),
        ("{gradient_accumulation_steps: 2}", "sft", "is computed from batchsize_conf. Remove it here."),
        ("{optim: adamw_torc}", "sft", 'unknown optim "adamw_torc". Did you mean "adamw_torch"?'),
        ("{lr_scheduler_type: cosin}", "sft", 'unknown lr_scheduler_type "cosin". Did you mean "cosine"?'),
        ("{report_to: [tensorbord]}", "sft", 'unknown report_to "tensorbord". Did you mean "tensorboard"?'),
        ("{loss_type: sigmod}", "dpo", 'unknown loss_type "sigmod". Did you mean "sigmoid"?'),
        ("{loss_type: [sigmoid, ippo]}", "dpo", 'unknown loss_type "ippo". Did you mean "ipo"?'),
        ("{loss_type: dpo}", "dpo", 'unknown loss_type "dpo"'),
        ("{sync_ref_modl: true}", "dpo", 'unknown key. Did you mean "sync_ref_model"?'),
        ("{model_init_kwargs: {}}", "dpo", "is set by run_conf.model_args. Remove it here."),
    ],
)
def test_wrong_training_args(training_args: str, method: str, line: str, messages: Messages, changed: Changed) -> None:
    lines = messages(changed(training_args=training_args), method)
    assert len(lines) == 1
    assert line in lines[0]


def test_peft_kwargs_are_the_chosen_types(check: Callable, changed: Changed) -> None:
    text = "{r: 8, lora_alpha: 1.5, lora_dropout: 1e-1, target_modules: all-linear, use_rslora: yes, use_dora: no,"
    text += " init_lora_weights: pissa_niter_16, layers_to_transform: [1, 2], rank_pattern: {q_proj: 4}}"
    conf = check(changed(peft_conf=f"{{peft_type: LORA, peft_kwargs: {text}}}")).experiment.peft_conf
    assert conf.peft_kwargs == {
        "r": 8,
        "lora_alpha": 1.5,
        "lora_dropout": 0.1,
        "target_modules": "all-linear",
        "use_rslora": True,
        "use_dora": False,
        "init_lora_weights": "pissa_niter_16",
        "layers_to_transform": [1, 2],
        "rank_pattern": {"q_proj": 4},
    }


@pytest.mark.parametrize(
    ("peft_conf", "line"),
    [
        ("{peft_type: lora}", 'peft_conf.peft_type: unknown peft_type "lora". Did you mean LORA?'),
        ("{peft_type: no-peft}", 'unknown peft_type "no-peft". Did you mean NO_PEFT?'),
        ("{peft_type: QQQQ}", 'unknown peft_type "QQQQ"; one of: NO_PEFT, PRETRAINED_PEFT, PROMPT_TUNING'),
        ("{peft_type: LORA, peft_kwargs: {r: eight}}", 'peft_kwargs.r: expected a whole number (got "eight")'),
        ("{peft_type: LORA, peft_kwargs: {rank: 8}}", 'peft_kwargs.rank: unknown key. Did you mean "r"?'),
        ("{peft_type: LORA, peft_kwargs: {lora_alfa: 8}}", 'Did you mean "lora_alpha"?'),
        ("{peft_type: LORA, peft_kwargs: {bias: some}}", "must be one of none, all, lora_only (got"),
        ("{peft_type: LORA, peft_kwargs: {target_modules: 5}}", "expected a list or text (got 5)"),
        (
            "{peft_type: LORA, peft_kwargs: {task_type: CAUSAL_LM}}",
            "is set by peft_conf.task_type. Remove it here.",
        ),
        ("{peft_type: IA3, peft_kwargs: {r: 8}}", "peft_kwargs.r: unknown key."),
        ("{peft_type: PROMPT_TUNING, peft_kwargs: {num_virtual_token: 8}}", 'Did you mean "num_virtual_tokens"?'),
        ("{peft_type: LORA, r: 8}", "peft_conf.r: unknown key. It belongs under peft_conf.peft_kwargs."),
        ("{peft_type: LORA, task_type: SEQ_CLS}", "must be one of CAUSAL_LM (got"),
    ],
)
def test_wrong_peft_conf(peft_conf: str, line: str, messages: Messages, changed: Changed) -> None:
    lines = messages(changed(peft_conf=peft_conf))
    assert len(lines) == 1
    assert line in lines[0]


def test_model_args_of_a_model_that_is_here(
    check: Callable, messages: Messages, changed: Changed, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "my_own_key": 1}))
    good = "{my_own_key: 3, attention_dropout: 0.1, rope_parameters: {rope_theta: 1e4}, use_kernels: no, gguf_file: x}"
    run_conf = f"{{model: '{tmp_path}', model_args: {good}}}"
    args = check(changed(run_conf=run_conf)).experiment.run_conf.model_args
    assert args.model_extra["my_own_key"] == 3
    assert args.model_extra["rope_parameters"] == {"rope_theta": 10000.0}
    bad = "{attn_implementaton: sdpa, attention_dropuot: 0.1, hidden_size: big, torchscipt: 1}"
    lines = messages(changed(run_conf=f"{{model: '{tmp_path}', model_args: {bad}}}"))
    assert [line.split("model_args.")[1] for line in lines] == [
        'attn_implementaton: unknown key. Did you mean "attn_implementation"?',
        'attention_dropuot: unknown key. Did you mean "attention_dropout"?',
        'hidden_size: expected a whole number (got "big")',
        "torchscipt: unknown key.",
    ]


def test_model_args_of_a_model_that_is_elsewhere(check: Callable, messages: Messages, changed: Changed) -> None:
    validated = check(changed(run_conf="{model: some/model, model_args: {resid_pdrop: 0.1}}"))
    assert [str(warning) for warning in validated.warnings] == [
        "config.yaml:15:44: run_conf.model_args.resid_pdrop: is not an argument of from_pretrained, and the model's"
        " config is not on this machine. It is passed on without a check."
    ]
    lines = messages(changed(run_conf="{model: some/model, model_args: {trust_remote_cod: true, load_in_4bit: true}}"))
    assert 'Did you mean "trust_remote_code"?' in lines[0]
    assert "It belongs under quant_conf." in lines[1]


def test_the_hubs_cache_is_read(
    check: Callable, changed: Changed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    (folder / "snapshots" / "abc123").mkdir(parents=True)
    (folder / "snapshots" / "abc123" / "config.json").write_text(json.dumps({"resid_pdrop": 0.0}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert check(changed(run_conf="{model: some/model, model_args: {resid_pdrop: 0.1}}")).warnings == []
