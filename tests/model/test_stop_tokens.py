"""The end of a turn: the same in all that is saved, and a plain process stops at it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetuning.model.embeddings import resize_embeddings
from finetuning.model.save import save_model
from finetuning.model.stop_tokens import align_stop_tokens, compare_tokenizer, save_tokenizer
from finetuning.model.tokenizer import load_tokenizer


def test_end_of_turn_becomes_the_end_token_and_the_base_keeps_its_own(tiny_llama_dir: Path):
    loaded = load_tokenizer(str(tiny_llama_dir), template_source="x", special_tokens=["<|im_end|>"])
    base = GenerationConfig(eos_token_id=1)
    stop = align_stop_tokens(loaded.tokenizer, base, "<|im_end|>\n")
    assert stop.eos_token == "<|im_end|>" and stop.eos_token_ids == (500, 1)
    assert stop.generation_config.eos_token_id == [500, 1]
    assert stop.generation_config.pad_token_id == stop.pad_token_id == loaded.tokenizer.bos_token_id
    assert stop.adds_bos and "was '</s>'" in stop.report
    assert base.eos_token_id == 1 and base.pad_token_id is None and loaded.tokenizer.eos_token == "</s>"


def test_nothing_changes_where_all_agree(chatml_llama_dir: Path, chatml_tokenizer):
    stop = align_stop_tokens(chatml_tokenizer, GenerationConfig.from_pretrained(chatml_llama_dir), "<|im_end|>")
    assert stop.changes == () and stop.eos_token_ids == (2,) and not stop.adds_bos


def test_without_an_end_of_turn_the_tokenizers_own_counts(tiny_tokenizer):
    stop = align_stop_tokens(tiny_tokenizer, None, None)
    assert stop.eos_token_ids == (1,) and stop.generation_config.eos_token_id == 1 and stop.pad_token_id == 1


def test_an_end_that_is_no_token_is_said_not_guessed(tiny_tokenizer):
    stop = align_stop_tokens(tiny_tokenizer, GenerationConfig(eos_token_id=[1, 7]), "END OF ANSWER")
    assert stop.eos_token == "</s>" and set(stop.eos_token_ids) == {1, 7}
    assert "not one token" in stop.report


def test_sampling_settings_that_could_not_be_saved_are_repaired(tiny_tokenizer, tmp_path: Path):
    base = GenerationConfig(eos_token_id=1, pad_token_id=1)
    base.temperature, base.top_p = 0.6, 0.9
    stop = align_stop_tokens(tiny_tokenizer, base, None)
    stop.generation_config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).do_sample is True
    assert "temperature, top_p" in stop.report and not base.do_sample


def test_how_a_text_was_last_cut_and_padded_is_not_saved(chatml_tokenizer, tmp_path: Path):
    chatml_tokenizer(["one two three", "four"], padding=True, truncation=True, max_length=2)
    save_tokenizer(chatml_tokenizer, tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (saved["truncation"], saved["padding"]) == (None, None)
    assert compare_tokenizer(chatml_tokenizer, tmp_path) == []


def test_the_saved_tokenizer_differs_and_the_one_in_use_does_not(tiny_llama_dir: Path, tmp_path: Path):
    tokenizer = load_tokenizer(str(tiny_llama_dir), template_source="T", special_tokens=["<|im_end|>"]).tokenizer
    before = tokenizer.encode("hello world")
    save_tokenizer(tokenizer, tmp_path, align_stop_tokens(tokenizer, None, "<|im_end|>"))
    assert tokenizer.eos_token == "</s>" and tokenizer.encode("hello world") == before
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.eos_token == "<|im_end|>" and again.encode("hello world") == before and again.chat_template == "T"
    assert again.pad_token == "<s>" and "</s>" in again.get_vocab()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    assert str(tiny_llama_dir) not in (tmp_path / "tokenizer_config.json").read_text()


def test_an_end_token_is_no_longer_put_after_each_text(tiny_tokenizer, tmp_path: Path):
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    save_tokenizer(tiny_tokenizer, tmp_path, align_stop_tokens(tiny_tokenizer, None, None))
    assert tiny_tokenizer.encode("a")[-1] == 1
    again = AutoTokenizer.from_pretrained(tmp_path).encode("a")
    assert again[0] == 0 and again[-1] != 1


def test_no_bos_is_added_where_the_tokenizer_has_none(chatml_tokenizer, tmp_path: Path):
    save_tokenizer(chatml_tokenizer, tmp_path, align_stop_tokens(chatml_tokenizer, None, "<|im_end|>"))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is False


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
made = model.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=20, do_sample=False)
print("TOKENS", tokenizer.convert_ids_to_tokens(made[0].tolist()))
"""


def test_a_plain_process_stops_at_the_end_of_turn(tiny_llama_dir: Path, tmp_path: Path):
    loaded = load_tokenizer(str(tiny_llama_dir), template_source="x", special_tokens=["<|im_end|>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    (end,) = resize_embeddings(model, loaded.tokenizer, loaded.new_tokens).new_ids
    with torch.no_grad():
        # Whatever the model has read, the last hidden state points along the head's row of the end of a turn.
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        hidden = model.model(torch.tensor([loaded.tokenizer.encode("hello")])).last_hidden_state[0, -1]
        model.lm_head.weight[:] = 0
        model.lm_head.weight[end, 0] = 10 * hidden[0].sign()
    stop = align_stop_tokens(loaded.tokenizer, model.generation_config, "<|im_end|>")
    save_model(model, loaded.tokenizer, tmp_path / "tuned", stop_tokens=stop)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "tuned")], capture_output=True, text=True, check=False, timeout=400
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")] or [done.stderr]
    assert line.endswith("'<|im_end|>']") and line.count("im_end") == 1
