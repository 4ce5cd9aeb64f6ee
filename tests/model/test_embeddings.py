"""New tokens: their embedding rows exist, start at the mean, are trained and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuning.config.sections.model import BitsAndBytes, NewPeft, NoPeft, PretrainedPeft, RunConfig
from finetuning.errors import ModelError
from finetuning.model.embeddings import resize_embeddings
from finetuning.model.load import load_model
from finetuning.model.peft.adapters import apply_peft
from finetuning.model.save import save_extended_base, save_model
from finetuning.model.tokenizer import load_tokenizer

LORA = NewPeft(peft_type="LORA", peft_kwargs={"r": 4, "target_modules": ["q_proj", "v_proj"]})
FEW = ("<|a|>", "<|b|>")
MANY = tuple(f"<|new{number}|>" for number in range(10))


def prepare(folder: Path, tokens: tuple[str, ...]):
    loaded = load_tokenizer(str(folder), template_source="x", special_tokens=tokens)
    model = load_model(RunConfig(model=str(folder)))
    return model, loaded, resize_embeddings(model, loaded.tokenizer, loaded.new_tokens)


def step(model, ids: list[int]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batch = torch.tensor([[5, 6, *ids, 7]])
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, *ids, 7]])).logits


def test_nothing_changes_without_new_tokens(tiny_llama_dir: Path):
    model, _, vocabulary = prepare(tiny_llama_dir, ())
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert not vocabulary.is_resized and vocabulary.new_ids == ()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "chatml_llama_dir"])
def test_growth_adds_mean_rows_and_leaves_the_others(fixture: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(fixture)
    before = AutoModelForCausalLM.from_pretrained(folder)
    model, loaded, vocabulary = prepare(folder, MANY)
    assert vocabulary.is_resized and vocabulary.rows == len(loaded.tokenizer) == model.config.vocab_size == 510
    assert vocabulary.is_tied == (fixture == "chatml_llama_dir")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == vocabulary.is_tied
    for new, old in (
        (model.model.embed_tokens.weight, before.model.embed_tokens.weight),
        (model.lm_head.weight, before.lm_head.weight),
    ):
        mean = old[:500].mean(dim=0)
        assert torch.allclose(new[list(vocabulary.new_ids)], mean.expand(10, -1), atol=1e-6)
        assert torch.equal(new[:500], old[:500])
        assert new.isfinite().all()


def test_rows_to_spare_become_the_mean_without_growth(tiny_llama_dir: Path):
    model, _, vocabulary = prepare(tiny_llama_dir, FEW)
    assert vocabulary.new_ids == (500, 501) and not vocabulary.is_resized and vocabulary.rows == 504
    weight = model.model.embed_tokens.weight
    assert torch.allclose(weight[500], weight[:500].mean(dim=0), atol=1e-6)


def test_growth_can_be_rounded_up(tiny_llama_dir: Path):
    loaded = load_tokenizer(str(tiny_llama_dir), template_source="x", special_tokens=MANY)
    model = load_model(RunConfig(model=str(tiny_llama_dir)))
    vocabulary = resize_embeddings(model, loaded.tokenizer, loaded.new_tokens, pad_to_multiple_of=64)
    assert vocabulary.rows == 512 and vocabulary.new_ids == tuple(range(500, 510))
    assert torch.equal(model.lm_head.weight[511], model.lm_head.weight[505])


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["spare", "grown"])
@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "chatml_llama_dir"])
def test_an_adapter_trains_the_new_rows_and_loads_again(
    fixture: str, tokens: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
):
    folder = request.getfixturevalue(fixture)
    model, loaded, vocabulary = prepare(folder, tokens)
    base = save_extended_base(model, loaded.tokenizer, tmp_path / "base") if vocabulary.is_resized else folder
    adapted = apply_peft(model, LORA, embeddings=vocabulary)
    ids = list(vocabulary.new_ids)
    before = logits(adapted.model, ids)
    begin = adapted.model.get_input_embeddings().weight[ids].clone()
    head = adapted.model.get_output_embeddings().weight[ids].clone()
    untouched = adapted.model.get_input_embeddings().weight[:100].clone()
    step(adapted.model, ids)
    assert not torch.equal(logits(adapted.model, ids), before)
    save_model(adapted.model, loaded.tokenizer, tmp_path / "adapter")

    plain = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert list(tokenizer.convert_tokens_to_ids(list(tokens))) == ids
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert again.peft_config["default"].base_model_name_or_path == str(base)
    assert torch.equal(logits(again, ids), logits(adapted.model, ids))
    merged = again.merge_and_unload()
    assert not torch.equal(merged.model.embed_tokens.weight[ids], begin)
    assert not torch.equal(merged.lm_head.weight[ids], head)
    assert torch.equal(merged.model.embed_tokens.weight[:100], untouched)
    # The adapter stays small: no whole embeddings in it, nor in the trainer's rows checkpoints.
    adapted.model.save_pretrained(tmp_path / "checkpoint")
    for saved in ("adapter", "checkpoint"):
        assert (tmp_path / saved / "adapter_model.safetensors").stat().st_size < 60_000


def test_all_weights_train_the_new_rows(tiny_llama_dir: Path):
    model, _, vocabulary = prepare(tiny_llama_dir, MANY)
    adapted = apply_peft(model, NoPeft(peft_type="NO_PEFT"), embeddings=vocabulary)
    ids = list(vocabulary.new_ids)
    begin = model.model.embed_tokens.weight[ids].clone(), model.lm_head.weight[ids].clone()
    step(adapted.model, ids)
    assert not (begin[0] == model.model.embed_tokens.weight[ids]).all(dim=1).any()
    assert not (begin[1] == model.lm_head.weight[ids]).all(dim=1).any()


def test_other_adapter_types_save_whole_embeddings_or_refuse(tiny_llama_dir: Path, chatml_llama_dir: Path):
    ia3 = NewPeft(peft_type="IA3", peft_kwargs={"target_modules": ["k_proj"], "feedforward_modules": []})
    model, _, vocabulary = prepare(tiny_llama_dir, FEW)
    adapted = apply_peft(model, ia3, embeddings=vocabulary)
    assert set(adapted.peft_config.modules_to_save) == {"embed_tokens", "lm_head"}
    begin = adapted.model.get_input_embeddings().weight[500].clone()
    step(adapted.model, [500, 501])
    assert not torch.equal(begin, adapted.model.get_input_embeddings().weight[500])
    tied, _, vocabulary = prepare(chatml_llama_dir, FEW)
    with pytest.raises(ModelError, match=r"IA3 cannot train the rows of 2 new tokens.*tied.*LORA"):
        apply_peft(tied, ia3, embeddings=vocabulary)
    prompt = NewPeft(peft_type="PROMPT_TUNING", peft_kwargs={"num_virtual_tokens": 2})
    model, _, vocabulary = prepare(tiny_llama_dir, FEW)
    with pytest.raises(ModelError, match="PROMPT_TUNING cannot train the rows"):
        apply_peft(model, prompt, embeddings=vocabulary)


def test_what_the_user_lists_is_kept(tiny_llama_dir: Path):
    model, _, vocabulary = prepare(tiny_llama_dir, FEW)
    rows = NewPeft(peft_type="LORA", peft_kwargs={"target_modules": ["q_proj"], "trainable_token_indices": [7]})
    config = apply_peft(model, rows, embeddings=vocabulary).peft_config
    assert config.trainable_token_indices == {"embed_tokens": [7, 500, 501], "lm_head": [500, 501]}
    model, _, vocabulary = prepare(tiny_llama_dir, FEW)
    whole = NewPeft(
        peft_type="LORA", peft_kwargs={"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    )
    assert apply_peft(model, whole, embeddings=vocabulary).peft_config.trainable_token_indices is None


def test_an_old_adapter_does_not_train_new_tokens(tiny_llama_dir: Path, tmp_path: Path):
    model, loaded, vocabulary = prepare(tiny_llama_dir, ())
    save_model(apply_peft(model, LORA).model, loaded.tokenizer, tmp_path / "adapter")
    model, _, vocabulary = prepare(tiny_llama_dir, FEW)
    with pytest.raises(ModelError, match="2 tokens are new"):
        apply_peft(
            model,
            PretrainedPeft(peft_type="PRETRAINED_PEFT", name_or_path=str(tmp_path / "adapter")),
            embeddings=vocabulary,
        )


def test_a_quantized_base_does_not_grow(tiny_llama_dir: Path):
    loaded = load_tokenizer(str(tiny_llama_dir), template_source="x", special_tokens=MANY)
    quantized = BitsAndBytes(quantization_type="bits-and-bytes", load_in_4bit=True)
    model = load_model(RunConfig(model=str(tiny_llama_dir)), quantized)
    with pytest.raises(
        ModelError, match=r"quant_conf: 6 tokens have no embedding row.*quantized model cannot be resized"
    ):
        resize_embeddings(model, loaded.tokenizer, loaded.new_tokens)
