"""Loading a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetuning.config.sections.data import MissingPadTokenStrategy as Pad
from finetuning.errors import ModelError
from finetuning.model.tokenizer import load_tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def test_new_tokens_are_counted_and_the_own_special_tokens_stay(tiny_llama_dir: Path):
    loaded = load_tokenizer(str(tiny_llama_dir), template_source=TEMPLATE, special_tokens=CHATML_TOKENS)
    tokenizer = loaded.tokenizer
    assert loaded.new_tokens == CHATML_TOKENS
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    ids = tokenizer.convert_tokens_to_ids(list(CHATML_TOKENS))
    assert tokenizer.encode("<|im_start|>a<|im_end|>", add_special_tokens=False)[0] == ids[0]
    assert tokenizer.chat_template == TEMPLATE and loaded.warnings == ()
    assert "2 new" in str(loaded)


def test_tokens_of_the_vocabulary_are_not_new_and_extra_ones_are_kept(chatml_llama_dir: Path):
    special_tokens = (*CHATML_TOKENS, "<|extra|>")
    loaded = load_tokenizer(str(chatml_llama_dir), template_source=TEMPLATE, special_tokens=special_tokens)
    assert loaded.new_tokens == ("<|extra|>",)
    assert {*CHATML_TOKENS, "<|extra|>"} <= set(loaded.tokenizer.all_special_tokens)
    assert "keep-original" in loaded.warnings[0]
    assert loaded.pad_description.startswith("<|endoftext|>, its own")


def test_keep_original_keeps_the_template_without_a_warning(chatml_llama_dir: Path, chatml_tokenizer):
    loaded = load_tokenizer(str(chatml_llama_dir), template_source=None)
    assert loaded.tokenizer.chat_template == chatml_tokenizer.chat_template and loaded.warnings == ()


def test_keep_original_without_a_template_says_what_to_set(tiny_llama_dir: Path):
    with pytest.raises(ModelError, match=r"data_conf\.chat_template_name: .*no chat template.*chat-ml"):
        load_tokenizer(str(tiny_llama_dir), template_source=None)
    assert load_tokenizer(str(tiny_llama_dir), template_source=None, needs_template=False).new_tokens == ()


def test_the_default_template_is_for_tokenizers_without_one(tiny_llama_dir: Path, chatml_llama_dir: Path) -> None:
    default = ("mistral-with-system", TEMPLATE)
    shipped = load_tokenizer(str(chatml_llama_dir), template_source=None, default_template=default)
    assert shipped.tokenizer.chat_template != TEMPLATE and "chat template: its own" in str(shipped)
    bare = load_tokenizer(str(tiny_llama_dir), template_source=None, default_template=default)
    assert bare.tokenizer.chat_template == TEMPLATE and bare.warnings == ()
    assert "chat template: mistral-with-system, as it has none" in str(bare)
    configured = load_tokenizer(str(tiny_llama_dir), template_source="{{ messages }}", default_template=default)
    assert "chat template: as configured" in str(configured)


@pytest.mark.parametrize(
    ("strategy", "pad", "replacement"),
    [
        (Pad.BOS_REPURPOSE, "<s>", None),
        (Pad.EOS_REPURPOSE, "</s>", None),
        (Pad.UNK_REPURPOSE, "<unk>", None),
        (Pad.UNK_CONVERT_TO_EOS, "<unk>", "</s>"),
    ],
)
def test_the_four_padding_strategies(tiny_llama_dir: Path, strategy: Pad, pad: str, replacement: str | None):
    loaded = load_tokenizer(str(tiny_llama_dir), template_source=TEMPLATE, missing_pad_token_strategy=strategy)
    assert loaded.tokenizer.pad_token == pad and pad in loaded.pad_description
    expected = None if replacement is None else loaded.tokenizer.convert_tokens_to_ids(replacement)
    assert loaded.pad_input_id == expected
    assert len(loaded.tokenizer) == 500


def _copy_without(source: Path, target: Path, *tokens: str) -> str:
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in tokens}
    path.write_text(json.dumps(config))
    return str(target)


def test_a_missing_source_token_is_replaced_with_a_warning(tiny_llama_dir: Path, tmp_path: Path):
    without = _copy_without(tiny_llama_dir, tmp_path / "a", "bos_token")
    loaded = load_tokenizer(without, template_source=TEMPLATE)
    assert loaded.tokenizer.pad_token == "</s>"
    assert "no beginning-of-sequence token" in loaded.warnings[0] and "</s> pads instead" in loaded.warnings[0]
    nothing = _copy_without(tiny_llama_dir, tmp_path / "b", "bos_token", "eos_token", "unk_token")
    with pytest.raises(ModelError, match="no padding, BOS, EOS or unknown token"):
        load_tokenizer(nothing, template_source=TEMPLATE)
    with pytest.raises(ModelError, match="unk-convert-to-eos needs an end-of-sequence"):
        load_tokenizer(nothing, template_source=TEMPLATE, missing_pad_token_strategy=Pad.UNK_CONVERT_TO_EOS)


def test_padding_side_is_set(tiny_llama_dir: Path):
    loaded = load_tokenizer(str(tiny_llama_dir), template_source=TEMPLATE, padding_side="left")
    assert loaded.tokenizer.padding_side == "left"


def test_a_folder_without_a_tokenizer_is_named(tiny_llama_dir: Path, tmp_path: Path):
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"contains no tokenizer: tokenizer\.json"):
        load_tokenizer(str(tmp_path), template_source=TEMPLATE)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "vocab.txt").write_text("")
    with pytest.raises(ModelError, match="has no vocabulary"):
        load_tokenizer(str(tmp_path), template_source=TEMPLATE)


def test_a_damaged_tokenizer_is_named(tiny_llama_dir: Path, tmp_path: Path):
    broken = Path(_copy_without(tiny_llama_dir, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(broken), template_source=TEMPLATE)
