"""The keys of an fms-hf-tuning job, and its defaults that differ from ours.

Source: fms-hf-tuning, README.md and build/README.md; `tuning/config/configs.py`.
"""

from __future__ import annotations

from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "eval_strategy": "no",
    "logging_steps": 500,
    "save_steps": 500,
}
MAX_SEQ_LENGTH = 4096
BATCH_SIZE = 8
EXPERIMENT = "fms-hf-tuning"

# Fields of transformers' TrainingArguments that jobs set; other fields of the installed release are accepted, too.
TRAINING = _names(
    """
    num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim optim_args seed data_seed bf16 fp16 tf32
    bf16_full_eval fp16_full_eval gradient_checkpointing gradient_checkpointing_kwargs logging_strategy logging_steps
    logging_first_step logging_nan_inf_filter eval_strategy evaluation_strategy eval_steps eval_delay
    eval_accumulation_steps eval_on_start save_strategy save_steps save_total_limit save_only_model save_safetensors
    load_best_model_at_end metric_for_best_model greater_is_better report_to run_name include_tokens_per_second
    include_num_input_tokens_seen group_by_length length_column_name dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers ddp_backend ddp_timeout
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers fsdp fsdp_config deepspeed accelerator_config
    neftune_noise_alpha torch_compile torch_compile_backend torch_compile_mode use_liger_kernel use_cpu no_cuda
    overwrite_output_dir push_to_hub hub_model_id hub_strategy hub_token hub_private_repo label_smoothing_factor
    remove_unused_columns disable_tqdm average_tokens_across_devices ignore_data_skip full_determinism do_train
    do_eval do_predict prediction_loss_only label_names log_on_each_node torch_empty_cache_steps skip_memory_metrics
    restore_callback_states_from_checkpoint batch_eval_metrics use_ipex use_mps_device jit_mode_eval past_index
    adafactor dispatch_batches split_batches fp16_backend fp16_opt_level half_precision_backend fsdp_min_num_params
    fsdp_transformer_layer_cls_to_wrap include_inputs_for_metrics mp_parameters push_to_hub_model_id
    push_to_hub_organization push_to_hub_token ray_scope torchdynamo tpu_metrics_debug tpu_num_cores
    use_legacy_prediction_loop xpu_backend
    """
)
LORA_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "target_modules": None,
}
LORA = _names(
    """
    modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern use_rslora use_dora
    fan_in_fan_out exclude_modules layer_replication trainable_token_indices ensure_weight_tying lora_bias
    megatron_config megatron_core target_parameters loftq_config eva_config corda_config use_qalora qalora_group_size
    arrow_config runtime_config alora_invocation_tokens
    """
) | set(LORA_DEFAULTS)
PROMPT_DEFAULTS: dict[str, Any] = {
    "prompt_tuning_init": "TEXT",
    "num_virtual_tokens": 8,
    "prompt_tuning_init_text": "Classify if the tweet is a complaint or not:",
}
DATA = _names(
    """
    training_data_path validation_data_path data_config_path dataset_text_field response_template instruction_template
    data_formatter_template dataset_conversation_field chat_template add_special_tokens
    """
)
TRACKING = _names(
    """
    trackers experiment training_logs_filename run_uri_export_path aim_repo aim_remote_server_ip aim_remote_server_port
    aim_url aim_experiment mlflow_experiment mlflow_tracking_uri clearml_project clearml_task scanner_output_filename
    exp_metadata
    """
)
ACCELERATION = _names("auto_gptq bnb_qlora bitsandbytes fused_lora fast_kernels padding_free multipack fast_moe")
MODEL = _names(
    """
    model_name_or_path tokenizer_name_or_path use_flash_attn flash_attn_implementation torch_dtype
    embedding_size_multiple_of cache_dir
    """
)
RUN = _names(
    """
    output_dir save_model_dir logging_dir max_seq_length packing per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps resume_from_checkpoint trainer_controller_config_file log_level log_level_replica
    enable_reduce_loss_sum peft_method alora_invocation_string
    """
)
OWN = _names("allow_changed max_lost_fraction")
"""Keys that a job can have here only: what this engine refuses otherwise, and fms-hf-tuning does not notice."""
TEXTS = (
    DATA
    | (MODEL - {"use_flash_attn", "embedding_size_multiple_of"})
    | (TRACKING - {"aim_remote_server_port"})
    | _names(
        """
        output_dir save_model_dir logging_dir resume_from_checkpoint trainer_controller_config_file log_level
        log_level_replica peft_method alora_invocation_string target_modules modules_to_save exclude_modules
        layers_pattern prompt_tuning_init prompt_tuning_init_text run_name hub_model_id hub_token hub_strategy
        optim_args length_column_name label_names metric_for_best_model allow_changed
        """
    )
)
"""Keys whose values stay as they are, even those that look like numbers: texts, names and paths."""
LAUNCHER = frozenset({"accelerate_launch_args", "lora_post_process_for_vllm", "do_dataprocessing_only"})
"""Keys that the launcher reads; they are no part of the experiment."""
UNSUPPORTED: dict[str, str] = {
    "fast_moe": "no kernels or parallelism for experts; remove it to train the experts with transformers' own code",
    "dataset_image_field": "vision-language models",
    "quantization_method": "use a quantized checkpoint or bnb_qlora",
    "additional_data_handlers": "data handlers written in Python",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use per_device_eval_batch_size",
}
OFF = frozenset({"false", "none", "[]"})
"""Values that switch a feature off."""
DEPENDENT: dict[str, str] = {
    "dequantize": "quantization_method",
    "num_train_dataset_shards": "do_dataprocessing_only",
    "num_eval_dataset_shards": "do_dataprocessing_only",
}
"""Options of an unsupported key, and that key."""
DEFAULTS: dict[str, Any] = LORA_DEFAULTS | PROMPT_DEFAULTS | {"dequantize": False, "num_train_dataset_shards": 1}
DEFAULTS |= {"num_eval_dataset_shards": 1}
# Training arguments that later releases of transformers renamed or removed.
DEFAULTS |= {
    "warmup_ratio": 0,
    "past_index": -1,
    "save_safetensors": True,
    "evaluation_strategy": "no",
    "fp16_opt_level": "O1",
    "fp16_backend": "auto",
    "half_precision_backend": "auto",
    "ray_scope": "last",
    "fsdp_min_num_params": 0,
} | dict.fromkeys(
    _names(
        """
        overwrite_output_dir group_by_length include_tokens_per_second do_train do_eval do_predict use_ipex
        use_mps_device jit_mode_eval no_cuda adafactor include_inputs_for_metrics tpu_metrics_debug
        use_legacy_prediction_loop
        """
    ),
    False,
)
"""Values at which a key that has no effect is not worth a warning: jobs often state every default."""
SUPPORTED = (
    TRAINING
    | LORA
    | set(PROMPT_DEFAULTS)
    | DATA
    | TRACKING
    | ACCELERATION
    | MODEL
    | RUN
    | LAUNCHER
    | OWN
    | set(UNSUPPORTED)
    | set(DEPENDENT)
)
