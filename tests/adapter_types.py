"""Every kind of adapter that the tests train, merge and serve: the smallest arguments that work on a tiny Llama."""

from __future__ import annotations

from typing import Any

Arguments = dict[str, Any]

QV = {"target_modules": ["q_proj", "v_proj"]}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

MINIMAL: dict[str, Arguments] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, **QV},
    "ADAMSS": {"r": 8, "num_subspaces": 2, **QV},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BEFT": {"target_modules": ["v_proj"]},
    "BOFT": {"boft_block_size": 4, "target_modules": ["q_proj"]},
    "C3A": {"block_size": 16, **QV},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "DEFT": {"r": 4, **QV},
    "DELORA": {"r": 4, **QV},
    "FOURIERFT": {"n_frequency": 50, **QV},
    "FROD": {"target_modules": ["q_proj"], "progressbar": False},
    "GLORA": {"r": 4, **QV},
    "GRALORA": {"r": 4, **QV},
    "HIRA": {"r": 4, **QV},
    "HRA": {"r": 4, **QV},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LILY": {"r": 4, **QV},
    "LN_TUNING": {},
    "LOHA": {"r": 4, **QV},
    "LOKR": {"r": 4, **QV},
    "LORA": {"r": 4, **QV},
    "MISS": {"r": 4, **QV},
    "OFT": {"oft_block_size": 8, **QV},
    "OSF": QV,
    "PEANUT": {"r": 4, **QV},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 4, **QV},
    "PVERA": {"r": 8, "target_modules": ["q_proj"]},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 4, **QV},
    "ROAD": {"group_size": 8, **QV},  # PEFT's name
    "SHADOW": {"r": 4},
    "SHIRA": {"r": 4, **QV},
    "SUPERTUNING": QV,
    "TINYLORA": QV,
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7], "target_modules": ["embed_tokens"]},
    "UNILORA": QV,
    "VBLORA": {"r": 4, "num_vectors": 8, "vector_length": 16, **QV},
    "VERA": {"r": 8, "target_modules": ["q_proj"]},
    "WAVEFT": {"n_frequency": 50, **QV},
}
"""By PEFT's name, all types but those that want a task id with each row and X-LoRA, which mixes trained adapters."""

LORA_KINDS: dict[str, Arguments] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR},
    "odd scaling": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 6, "lora_alpha": 7, "use_rslora": True, "target_modules": ALL_LINEAR},
    "dora": {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ALL_LINEAR},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 3},
    },
    "head and embeddings": {"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora embeddings": {"r": 4, "use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
    "modules to save": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "norms to save": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["input_layernorm"]},
    "tokens": {"r": 4, "target_modules": ["v_proj"], "trainable_token_indices": [3, 300, 17]},
    "one layer": {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    "regex": {"r": 4, "target_modules": r".*\.(q|v)_proj"},
    "gaussian": {"r": 4, "target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
}
"""LoRA as it is merged from file to file."""

LORA_OF_GPT2: dict[str, Arguments] = {
    "transposed": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "transposed dora": {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True, "use_dora": True},
    "lora bias": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
    "all biases": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    "own biases": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"},
}
"""The same on layers that keep their weights transposed, and have biases."""

LORA_BY_PEFT: dict[str, Arguments] = {
    "pissa": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "olora": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "olora"},
}
"""LoRA whose beginning changes the base."""

GROWN: dict[str, Arguments] = {
    "embeddings saved": QV,
    "embeddings trained": {**QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    "new rows trained": {**QV, "trainable_token_indices": [5, 504, 505]},
}
"""LoRA on a base whose vocabulary grew before."""

EXPERTS: Arguments = {
    "r": 4,
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
"""LoRA on the fused weights of experts."""

UNMERGEABLE: dict[str, str] = {
    "ADAPTION_PROMPT": "it changes the input or the layers, not the weights",
    "CARTRIDGE": "it changes the input or the layers, not the weights",
    "CPT": "it changes the input or the layers, not the weights",
    "LILY": "a router chooses its weights for each token",
    "PREFIX_TUNING": "it changes the input or the layers, not the weights",
    "PROMPT_TUNING": "it changes the input or the layers, not the weights",
    "P_TUNING": "it changes the input or the layers, not the weights",
    "SHADOW": "what it adds to a layer is computed from each input",
}
"""Types that are no part of any weights, with what `merge_adapter` says of them."""
