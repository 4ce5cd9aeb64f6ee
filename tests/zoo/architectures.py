"""A tiny random model of each causal LM class of the installed transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""The model types of `AutoModelForCausalLM`."""

LAYERS = 2
TINY: dict[str, Any] = {
    # Sizes of the hidden states.
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embedding_size": 32,
    "hidden_dim": 32, "word_embed_proj_dim": 32, "dim_model": 32, "d_embed": 32, "embedding_dim": 32,
    "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "dff": 64, "dim_ff": 64, "d_inner": 64, "n_inner": 64,
    "decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "ffn_hidden_size": 64, "intermediate_size_mlp": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "shared_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "hidden_size_per_layer_input": 8, "hidden_size_global": 32,
    # Layers and heads.
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "decoder_layers": LAYERS, "encoder_layers": LAYERS, "num_decoder_layers": LAYERS, "num_encoder_layers": LAYERS,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "kv_channels": 8, "attention_head_size": 8,
    "d_kv": 8, "global_head_dim": 8, "swa_head_dim": 8,
    # Multi-head latent attention.
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16,
    # Mixtures of experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "num_expert_group": 2,
    # State-space and linear attention layers.
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_dt_rank": 4, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8, "time_step_rank": 4, "mamba_n_groups": 1,
    "mamba_d_ssm": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4, "lru_width": 32,
    # Lengths and windows.
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_sequence_length": 512, "max_seq_len": 512,
    "max_source_positions": 512, "max_target_positions": 512, "sliding_window": 64,
}  # fmt: skip
"""Values of fields that set the size of a model, whatever its architecture. A field that is None stays None."""

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
DECODER = {"is_decoder": True}
OVERRIDES: dict[str, dict[str, Any]] = {
    # Without it these attend to later tokens as well.
    "bert": DECODER, "bert-generation": DECODER, "big_bird": DECODER, "camembert": DECODER, "data2vec-text": DECODER,
    "electra": DECODER, "ernie": DECODER, "megatron-bert": DECODER, "rembert": DECODER, "roberta": DECODER,
    "roberta-prelayernorm": DECODER, "roformer": DECODER, "xlm-roberta": DECODER, "xlm-roberta-xl": DECODER,
    "roc_bert": {**DECODER, "pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": 304},
    "xmod": {**DECODER, "default_language": "en_XX"},
    "reformer": {
        **DECODER, "attn_layers": ["local", "lsh"], "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [8, 24],
        "feed_forward_size": 64, "num_buckets": 4,
    },
    "xlm": {"causal": True},
    "xlnet": {"d_head": 8},
    # The window, the rotated part of each head, or the size of a head follow from other sizes.
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "longcat_flash": {"zero_expert_num": 0},
    "nemotron": {"num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    # Mixtures of experts that have none by default.
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    # One layer of each kind.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"], "n_groups": 1},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4,
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4,
        "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8, "hybrid_layer_ids": [1, 3],
        "num_query_groups": 4, "adapter_rank": 4, "num_key_value_heads": 4,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32, "context_length": 512},
    "xlstm": {
        "hidden_size": 128, "embedding_dim": 128, "num_heads": 2, "num_blocks": 2, "ffn_round_up_to_multiple_of": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ple_embed_dim": 32, "ngram_vocab_size_base": 64,
    },
    "dots3_note_text": {"head_dim": 16},
    "dots3_note": {
        "text_config": {"head_dim": 16},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 1, "nemo_conv_channels": 16, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
        },
    },
    "marian": {"decoder_vocab_size": None},
}  # fmt: skip
"""Fields of architectures that `TINY` does not fit."""
OVERRIDES["qwen4_exp"] = {"text_config": OVERRIDES["qwen4_exp_text"]}

_DRAFT = "it drafts tokens for another model, and takes that model's hidden states and keys instead of a text"
_NO_CONFIG = "AutoModelForCausalLM builds no model from its config: the class takes the config of the decoder alone"
NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm; the text half is gemma3n_text",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _NO_CONFIG,
    "musicgen_melody": _NO_CONFIG,
}
"""Architectures that no model is made of, with the reason."""

RELOADED_DIFFERENTLY = {
    "youtu": "transformers sets the padding token's row of the embeddings, which are the output layer as well, to zero"
    " whenever it loads this class; the engine restores it",
}
"""Architectures that plain transformers does not load as they were saved, with the reason."""

_PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types")


def tiny_config(model_type: str, vocabulary: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config of a tiny model: the defaults of its class with the sizes of `TINY`.

    Args:
        vocabulary: `vocab_size` and the ids of special tokens.
    """
    config_class = CONFIG_MAPPING[model_type]
    return config_class.from_dict(_merged(_shrunk(config_class().to_dict(), vocabulary), OVERRIDES.get(model_type, {})))


def _merged(fields: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        is_nested = isinstance(value, dict) and isinstance(fields.get(name), dict)
        fields[name] = _merged(fields[name], value) if is_nested else value
    return fields


def _shrunk(fields: Mapping[str, Any], vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    layers = next((fields[name] for name in ("num_hidden_layers", "num_layers") if fields.get(name)), None)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name in vocabulary or (name in ("decoder_vocab_size", "vocab_size_per_layer_input") and value is not None):
            small[name] = vocabulary.get(name, vocabulary["vocab_size"])
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            # Without dropout the first loss is known.
            small[name] = 0.0
        elif name == "per_layer_config":
            small[name] = {}
        elif isinstance(value, dict) and name.endswith(("_config", "_encoder", "decoder")):
            small[name] = _shrunk(value, vocabulary)
        elif name in _PER_LAYER and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            small[name] = (kinds * LAYERS)[:LAYERS]
        elif isinstance(value, list) and len(value) == layers and name not in TINY:
            small[name] = value[:LAYERS]
        elif name in TINY and value is not None and not isinstance(value, dict):
            small[name] = [TINY[name]] * LAYERS if isinstance(value, list) else TINY[name]
        else:
            small[name] = value
    if small.get("kv_lora_rank") is not None and "num_key_value_heads" in small:
        # Latent attention has a key for each head.
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model with random weights."""
    return AutoModelForCausalLM.from_config(config)
