"""Tiny random models of vision-language families, with their processors and chat templates, saved like checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerFast

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
"""Sizes of the language model."""
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 3,
}  # fmt: skip
"""Sizes of the vision tower."""
Made = tuple[Any, Any, dict[str, Any]]
_CLIP_TOKENS = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [2, 3, 3]}

# One way to write each kind of template: images where they are in the content, images first, and texts only in lists.
IN_PLACE = (
    "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)
IMAGES_FIRST = (
    "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
    "{{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}}{image}\n{{% endfor %}}"
    "{{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}}{{{{ part['text'] }}}}"
    "{{% endfor %}}{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is made."""

    make: Callable[[PreTrainedTokenizerFast, dict[str, Any]], Made]
    """From the tokenizer and the sizes of its vocabulary to the model's config, its image processor, and the fields of
    processor_config.json."""
    tokens: tuple[str, ...]
    """Special tokens that stand for images."""
    template: str
    names: Mapping[str, str] | None = None
    """Tokens that the tokenizer knows by a name, such as `image_token`."""


def _qwen2_5(tokenizer: Any, vocabulary: dict[str, Any]) -> Made:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 14, "spatial_merge_size": 2, "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    ids = _ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
               vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")  # fmt: skip
    text = {**TEXT, **vocabulary, "rope_parameters": MROPE}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids, tie_word_embeddings=False)
    images = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    return config, images, {"processor_class": "Qwen2_5_VLProcessor"}


def _qwen3(tokenizer: Any, vocabulary: dict[str, Any]) -> Made:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 16, "spatial_merge_size": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
    }  # fmt: skip
    ids = _ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
               vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")  # fmt: skip
    text = {**TEXT, **vocabulary, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids, tie_word_embeddings=False)
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}
    )
    return config, images, {"processor_class": "Qwen3VLProcessor"}


def _gemma3(tokenizer: Any, vocabulary: dict[str, Any]) -> Made:
    text = {**TEXT, **vocabulary, "query_pre_attn_scalar": 16, "sliding_window": 128}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**TOWER, "image_size": 28, "patch_size": 7}, mm_tokens_per_image=4,
        **_ids(tokenizer, image_token_id="<image_soft_token>", boi_token_id="<start_of_image>",
               eoi_token_id="<end_of_image>"),
    )  # fmt: skip
    images = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return config, images, {"processor_class": "Gemma3Processor", "image_seq_length": 4}


def _llava(tokenizer: Any, vocabulary: dict[str, Any]) -> Made:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, **vocabulary),
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=28, patch_size=7),
        **_ids(tokenizer, image_token_id="<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return config, images, {"processor_class": "LlavaProcessor", **_CLIP_TOKENS}


def _llava_next(tokenizer: Any, vocabulary: dict[str, Any]) -> Made:
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaNextConfig(
        text_config=transformers.LlamaConfig(**TEXT, **vocabulary),
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=28, patch_size=7),
        image_grid_pinpoints=pinpoints, **_ids(tokenizer, image_token_id="<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    return config, images, {"processor_class": "LlavaNextProcessor", **_CLIP_TOKENS}


def _mistral3(tokenizer: Any, vocabulary: dict[str, Any]) -> Made:
    vision = {**TOWER, "head_dim": 16, "image_size": 112, "patch_size": 14}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, **vocabulary),
        vision_config=transformers.PixtralVisionConfig(**vision), spatial_merge_size=2, vision_feature_layer=-1,
        **_ids(tokenizer, image_token_id="[IMG]"),
    )  # fmt: skip
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return config, images, {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}


def _idefics3(tokenizer: Any, vocabulary: dict[str, Any], name: str = "Idefics3") -> Made:
    config = getattr(transformers, f"{name}Config")(
        text_config=transformers.LlamaConfig(**TEXT, **vocabulary),
        vision_config={**TOWER, "image_size": 28, "patch_size": 7}, scale_factor=2,
        **_ids(tokenizer, image_token_id="<image>"), pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    images = getattr(transformers, f"{name}ImageProcessorPil")(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    return config, images, {"processor_class": f"{name}Processor", "image_seq_len": 4}


def _smolvlm(tokenizer: Any, vocabulary: dict[str, Any]) -> Made:
    return _idefics3(tokenizer, vocabulary, "SmolVLM")


def _internvl(tokenizer: Any, vocabulary: dict[str, Any]) -> Made:
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT, **vocabulary),
        vision_config={**TOWER, "image_size": [28, 28], "patch_size": [7, 7]}, downsample_ratio=0.5,
        **_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )  # fmt: skip
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=2
    )
    return config, images, {"processor_class": "InternVLProcessor", "image_seq_length": 4}


def _ids(tokenizer: Any, **tokens: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_IDEFICS_TOKENS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
                   *(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)))  # fmt: skip

FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(_qwen2_5, _VISION_TOKENS, IN_PLACE.format(image=_QWEN_IMAGE)),
    "qwen3_vl": Family(_qwen3, _VISION_TOKENS, IN_PLACE.format(image=_QWEN_IMAGE)),
    "gemma3": Family(
        _gemma3,
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        IN_PLACE.format(image="<start_of_image>"),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    ),
    "llava": Family(_llava, ("<image>",), IMAGES_FIRST.format(image="<image>")),
    "llava_next": Family(_llava_next, ("<image>",), IMAGES_FIRST.format(image="<image>")),
    "mistral3": Family(_mistral3, ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), IN_PLACE.format(image="[IMG]")),
    "idefics3": Family(_idefics3, _IDEFICS_TOKENS, IN_PLACE.format(image="<image>")),
    "smolvlm": Family(_smolvlm, _IDEFICS_TOKENS, IN_PLACE.format(image="<image>")),
    "internvl": Family(
        _internvl,
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        IN_PLACE.format(image="<IMG_CONTEXT>"),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
}
"""By model type."""


def save_family(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a tiny model of a family to a folder, with its tokenizer and its processor's files."""
    family = FAMILIES[name]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": [*family.tokens]}, replace_extra_special_tokens=False)
    for attribute, token in (family.names or {}).items():
        tokenizer._set_model_specific_special_tokens({attribute: token})
    tokenizer.chat_template = family.template
    vocabulary = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
    }
    config, images, processor = family.make(tokenizer, vocabulary)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for name, weight in model.named_parameters():
            if "projection_weight" in name:
                # Gemma 3's projector begins at zero: no image would change anything.
                torch.nn.init.normal_(weight, std=0.1)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    if name.startswith("qwen"):
        videos = {"processor_class": processor["processor_class"], "video_processor_type": "Qwen2VLVideoProcessor"}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(videos), encoding="utf-8")
    return folder
