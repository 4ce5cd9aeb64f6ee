"""The keys of axolotl, LLaMA-Factory and TRL that have a counterpart in our YAML, and its path."""

from __future__ import annotations

_CORE = """
    num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps warmup_ratio weight_decay
    max_grad_norm  optim seed bf16 fp16 gradient_checkpointing gradient_checkpointing_kwargs logging_steps
    logging_strategy  logging_first_step eval_strategy eval_steps save_strategy save_steps save_total_limit
    load_best_model_at_end  metric_for_best_model greater_is_better adam_beta1 adam_beta2 adam_epsilon
    neftune_noise_alpha ddp_timeout  dataloader_num_workers deepspeed output_dir report_to run_name
    use_liger_kernel
"""
_TRAINING = {key: f"training_args.{key}" for key in _CORE.split()}

AXOLOTL: dict[str, str] = {
    **{key: f"training_args.{key}" for key in ("learning_rate", "weight_decay", "max_grad_norm", "seed", "deepspeed")},
    **{key: f"training_args.{key}" for key in ("warmup_steps", "warmup_ratio", "logging_steps", "save_steps")},
    **{key: f"training_args.{key}" for key in ("eval_steps", "eval_strategy", "save_strategy", "save_total_limit")},
    **{
        key: f"training_args.{key}" for key in ("gradient_checkpointing", "gradient_checkpointing_kwargs", "output_dir")
    },
    **{key: f"training_args.{key}" for key in ("max_steps", "fp16", "tf32", "neftune_noise_alpha", "adam_beta1")},
    **{key: f"training_args.{key}" for key in ("adam_beta2", "adam_epsilon", "load_best_model_at_end")},
    "num_epochs": "training_args.num_train_epochs",
    "lr_scheduler": "training_args.lr_scheduler_type",
    "optimizer": "training_args.optim",
    "base_model": "run_conf.model",
    "tokenizer_config": "run_conf.tokenizer",
    "trust_remote_code": "run_conf.model_args.trust_remote_code",
    "revision_of_model": "run_conf.model_args.revision",
    "attn_implementation": "run_conf.model_args.attn_implementation",
    "sequence_len": "sft_args.max_seq_length",
    "sample_packing": "sft_args.packing",
    "mlflow_tracking_uri": "tracking.mlflow_server_uri",
    "mlflow_experiment_name": "tracking.experiment_name",
    "mlflow_run_name": "tracking.run_name",
    "hf_mlflow_log_artifacts": "tracking.hf_mlflow_log_artifacts",
}
LLAMA_FACTORY: dict[str, str] = {
    **_TRAINING,
    "model_name_or_path": "run_conf.model",
    "trust_remote_code": "run_conf.model_args.trust_remote_code",
    "model_revision": "run_conf.model_args.revision",
    "cache_dir": "run_conf.model_args.cache_dir",
    "resume_from_checkpoint": "run_conf.resume_from_checkpoint",
    "cutoff_len": "sft_args.max_seq_length",
    "packing": "sft_args.packing",
    "enable_liger_kernel": "training_args.use_liger_kernel",
    "loraplus_lr_ratio": "overrides.loraplus_lr_ratio",
}
TRL: dict[str, str] = {
    **_TRAINING,
    "model_name_or_path": "run_conf.model",
    "model_revision": "run_conf.model_args.revision",
    "trust_remote_code": "run_conf.model_args.trust_remote_code",
    "attn_implementation": "run_conf.model_args.attn_implementation",
    "torch_dtype": "run_conf.model_args.dtype",
    "dtype": "run_conf.model_args.dtype",
    "resume_from_checkpoint": "run_conf.resume_from_checkpoint",
    "packing": "sft_args.packing",
}
DPO = {key: f"training_args.{key}" for key in ["label_smoothing", "loss_weights", "precompute_ref_log_probs"]}
"""What TRL's DPO takes besides, and ours by the same names."""
