from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetuning.cli.replace_tokens import main
from finetuning.errors import ConfigError, ModelError, StorageError
from finetuning.export.rename_tokens import pair_token_names, replace_tokens


def test_ids_stay_and_texts_follow(chatml_llama_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    before = AutoTokenizer.from_pretrained(chatml_llama_dir)
    renames = {"<|im_start|>": "<|start|>", "<|im_end|>": "<|end|>"}
    done = replace_tokens(str(chatml_llama_dir), tmp_path / "out", renames)
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(after) == len(before)
    assert after.eos_token == "<|end|>" and after.eos_token_id == before.eos_token_id
    for old, new in renames.items():
        assert done.ids[new] == before.convert_tokens_to_ids(old) == after.encode(new, add_special_tokens=False)[0]
    assert "<|end|>" in after.all_special_tokens and "<|im_end|>" not in after.get_vocab()
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Paris."}]
    old_ids = before.apply_chat_template(chat)["input_ids"]
    assert after.apply_chat_template(chat)["input_ids"] == old_ids
    assert "<|start|>user" in after.decode(old_ids)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_names_are_swapped_at_once(chatml_llama_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    before = Tokenizer.from_file(str(chatml_llama_dir / "tokenizer.json"))
    first, second = "<|im_start|>", "<|im_end|>"
    replace_tokens(str(chatml_llama_dir), tmp_path / "out", {first: second, second: first})
    after = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert after.token_to_id(first) == before.token_to_id(second) and after.token_to_id(second) == before.token_to_id(
        first
    )
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert template.index(second) < template.index(first)


def test_the_template_can_be_kept(chatml_llama_dir: Path, tmp_path: Path) -> None:
    replace_tokens(str(chatml_llama_dir), tmp_path / "out", {"<|im_end|>": "<|end|>"}, keep_template=True)
    kept = (tmp_path / "out" / "chat_template.jinja").read_bytes()
    assert kept == (chatml_llama_dir / "chat_template.jinja").read_bytes()


def test_the_post_processor_follows(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    replace_tokens(str(tiny_llama_dir), tmp_path / "out", {"<s>": "<bos>"})
    after = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert after.encode("Hello").tokens[0] == "<bos>"
    assert "<s>" not in json.dumps(json.loads((tmp_path / "out" / "tokenizer.json").read_text())["post_processor"])


def test_an_old_name_that_is_missing_gets_the_nearest(chatml_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no token '<\|im_strat\|>'\. Did you mean '<\|im_start\|>'"):
        replace_tokens(str(chatml_llama_dir), tmp_path / "out", {"<|im_strat|>": "<|x|>"})
    assert not list(tmp_path.iterdir())


def test_every_invalid_name_is_reported(chatml_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        replace_tokens(str(chatml_llama_dir), tmp_path / "out", {"<|im_start|>": "<|endoftext|>", "zzz": "<|y|>"})
    assert [problem.message for problem in caught.value.problems] == [
        "'<|endoftext|>' is already a token (id 0)",
        "there is no token 'zzz'",
    ]


def test_a_token_made_of_others_is_refused(chatml_llama_dir: Path, tmp_path: Path) -> None:
    content = json.loads((chatml_llama_dir / "tokenizer.json").read_text())
    pair = content["model"]["merges"][0]
    merged = pair.replace(" ", "") if isinstance(pair, str) else "".join(pair)
    with pytest.raises(ModelError, match="result of a BPE merge"):
        replace_tokens(str(chatml_llama_dir), tmp_path / "out", {merged: "<|y|>"})


def test_an_output_that_is_not_empty_is_refused(chatml_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="not empty"):
        replace_tokens(str(chatml_llama_dir), tmp_path, {"<|im_end|>": "<|end|>"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_go_in_pairs() -> None:
    assert pair_token_names(["a", "b"], ["c", "b"]) == {"a": "c"}
    for old, new in ((["a"], ["b", "c"]), (["a", "a"], ["b", "c"]), (["a", "b"], ["c", "c"]), (["a"], [""])):
        with pytest.raises(ConfigError):
            pair_token_names(old, new)


def test_repeated_options_append(chatml_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--from", "<|im_start|>", "--to", "<|a|>", "--from", "<|endoftext|>", "--to", "<|b|>"]
    assert main([str(chatml_llama_dir), str(tmp_path / "out"), *names]) == 0
    out = capsys.readouterr().out
    assert "<|im_start|> -> <|a|>" in out and "<|endoftext|> -> <|b|>" in out
