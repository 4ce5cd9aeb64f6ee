"""Prompts to answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.config.sections.experiment import GenerationModel
from finetuning.config.sections.model import NoQuantization
from finetuning.errors import DataError, ModelError
from finetuning.inference.batching import plan_batches
from finetuning.inference.generate import Generation, encode_prompts, generate_batches
from finetuning.inference.generation_params import build_parameters
from finetuning.inference.load import LoadedGenerator, load_generator
from finetuning.inference.prompts import GenerationPrompt, text_prompts

TEXTS = [
    "The",
    "What is the capital of France? The capital of",
    "Names of rows are red, green, blue",
    "A conversation has a user who asks a question and an assistant who answers it. What is two plus two? Two plus",
    "Training",
    "user assistant tool role content name question answer",
    '{"name": "Ada", "age":',
]


def generator_of(folder: Path) -> LoadedGenerator:
    return load_generator(GenerationModel(model=str(folder)), NoQuantization())


def answers_of(
    generator: LoadedGenerator, prompts: list[GenerationPrompt], batches: list[list[int]], seed: int = 0, **user: Any
) -> dict[int, list[Generation]]:
    parameters = build_parameters(
        {"max_new_tokens": 24} | user, generator.tokenizer, generator.model, generator.pad_token_id
    )
    encoded = encode_prompts(prompts, generator.tokenizer, parameters.max_prompt_tokens)
    answers: dict[int, list[Generation]] = {}
    for batch in generate_batches(generator, encoded, batches, parameters, seed):
        answers |= batch
    return answers


def stopping_ids(generator: LoadedGenerator) -> list[int]:
    """Tokens at which a random model stops here and there: every ninth of the vocabulary."""
    return [generator.tokenizer.eos_token_id, *range(20, len(generator.tokenizer), 9)]


@pytest.mark.parametrize("model", ["tiny_llama_dir", "chatml_llama_dir"])
def test_a_batch_writes_the_same_as_one_at_a_time(model: str, request: pytest.FixtureRequest) -> None:
    generator = generator_of(request.getfixturevalue(model))
    prompts = text_prompts(TEXTS)
    stops = stopping_ids(generator)
    alone = answers_of(generator, prompts, [[index] for index in range(len(TEXTS))], eos_token_id=stops)
    together = answers_of(generator, prompts, [list(range(len(TEXTS)))], eos_token_id=stops)
    assert {index: answers for index, answers in sorted(together.items())} == alone
    assert len({answers[0].tokens for answers in alone.values()}) > 1, "answers of one length would prove little"


def test_one_at_a_time_writes_the_same_as_plain_transformers(tiny_llama_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    answers = answers_of(generator_of(tiny_llama_dir), text_prompts(TEXTS), [list(range(len(TEXTS)))])
    for index, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt").input_ids
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, pad_token_id=0)[0]
        assert answers[index][0].raw == tokenizer.decode(output)
        assert answers[index][0].text == tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True)


def test_the_bos_token_is_added_once(tiny_llama_dir: Path, chatml_llama_dir: Path) -> None:
    llama, chatml = generator_of(tiny_llama_dir).tokenizer, generator_of(chatml_llama_dir).tokenizer
    bos = llama.bos_token_id
    plain, marked = encode_prompts(text_prompts(["The fox", "<s>The fox"]), llama, 100)
    assert plain.ids == marked.ids
    assert plain.ids.count(bos) == 1 and plain.ids[0] == bos
    assert encode_prompts(text_prompts([""]), llama, 100)[0].ids == (bos,)
    messages = ({"role": "user", "content": "The fox"},)
    assert chatml.bos_token is None
    (chat,) = encode_prompts([GenerationPrompt(id=0, messages=messages)], chatml, 100)
    assert chat.text == "<|im_start|>user\nThe fox<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.decode(chat.ids) == chat.text


def test_a_template_that_writes_the_bos_token(tiny_llama_dir: Path) -> None:
    tokenizer = generator_of(tiny_llama_dir).tokenizer
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    (chat,) = encode_prompts([GenerationPrompt(id=0, messages=({"role": "user", "content": "fox"},))], tokenizer, 100)
    assert chat.text == "<s>[user] fox"
    assert chat.ids.count(tokenizer.bos_token_id) == 1


def test_a_long_prompt_is_truncated_on_the_left(chatml_llama_dir: Path) -> None:
    tokenizer = generator_of(chatml_llama_dir).tokenizer
    messages = ({"role": "user", "content": "fox " * 50},)
    (whole,) = encode_prompts([GenerationPrompt(id=0, messages=messages)], tokenizer, 1000)
    (cut,) = encode_prompts([GenerationPrompt(id=0, messages=messages)], tokenizer, 20)
    assert (whole.truncated, cut.truncated) == (False, True)
    assert cut.ids == whole.ids[-20:]
    assert tokenizer.decode(cut.ids).endswith("<|im_start|>assistant\n")


def test_prompts_that_cannot_be_are_refused(tiny_llama_dir: Path, chatml_llama_dir: Path) -> None:
    chat = GenerationPrompt(id=0, messages=({"role": "user", "content": "fox"},))
    with pytest.raises(ModelError, match="no chat template"):
        encode_prompts([chat], generator_of(tiny_llama_dir).tokenizer, 100)
    tokenizer = generator_of(chatml_llama_dir).tokenizer
    with pytest.raises(DataError, match="the prompt is empty"):
        encode_prompts(text_prompts(["fox", ""]), tokenizer, 100)
    tokenizer.chat_template = "{{ raise_exception('no foxes') }}"
    with pytest.raises(DataError, match="rejects these messages: no foxes"):
        encode_prompts([chat], tokenizer, 100)


def test_several_answers_to_a_prompt_come_with_it(tiny_llama_dir: Path) -> None:
    generator = generator_of(tiny_llama_dir)
    answers = answers_of(
        generator, text_prompts(TEXTS[:3]), [[2, 0, 1]], do_sample=True, num_return_sequences=3, max_new_tokens=12
    )
    assert sorted(answers) == [0, 1, 2]
    for index, batch in answers.items():
        assert len({answer.text for answer in batch}) > 1
        assert all(answer.raw.startswith(f"<s>{TEXTS[index]}") for answer in batch)


def test_a_seed_decides_over_sampled_answers(tiny_llama_dir: Path) -> None:
    generator = generator_of(tiny_llama_dir)
    prompts = text_prompts(TEXTS)
    batches = plan_batches([len(text) for text in TEXTS], 24, max_rows=3)
    first = answers_of(generator, prompts, batches, seed=1, do_sample=True)
    assert first == answers_of(generator, prompts, batches, seed=1, do_sample=True)
    assert first != answers_of(generator, prompts, batches, seed=2, do_sample=True)
    alone = answers_of(generator, prompts, batches[1:], seed=1, do_sample=True)
    assert alone == {index: first[index] for batch in batches[1:] for index in batch}


def test_an_answer_ends_at_a_stop_string(tiny_llama_dir: Path) -> None:
    generator = generator_of(tiny_llama_dir)
    prompts = text_prompts(TEXTS[:3])
    free = answers_of(generator, prompts, [[0, 1, 2]])
    text = free[1][0].text
    stop = text[len(text) // 2 :][:3]
    stopped = answers_of(generator, prompts, [[0, 1, 2]], stop_strings=[stop])
    assert stop in stopped[1][0].text
    assert stopped[1][0].tokens < free[1][0].tokens
    assert text.startswith(stopped[1][0].text)


def test_a_single_answer_is_streamed(tiny_llama_dir: Path) -> None:
    generator = generator_of(tiny_llama_dir)
    parameters = build_parameters({"max_new_tokens": 24}, generator.tokenizer, generator.model, generator.pad_token_id)
    encoded = encode_prompts(text_prompts(TEXTS[1:2]), generator.tokenizer, 100)
    pieces: list[str] = []
    (answers,) = generate_batches(generator, encoded, [[0]], parameters, 0, pieces.append)
    assert "".join(pieces) == answers[0][0].text
    assert len(pieces) > 1


def test_a_batch_that_does_not_fit_is_halved(tiny_llama_dir: Path) -> None:
    generator = generator_of(tiny_llama_dir)

    def refuse_more_than_two(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("three rows are too many")

    prompts = text_prompts(TEXTS)
    expected = answers_of(generator, prompts, [[index] for index in range(len(TEXTS))])
    handle = generator.model.register_forward_pre_hook(refuse_more_than_two, with_kwargs=True)
    try:
        assert dict(sorted(answers_of(generator, prompts, [list(range(len(TEXTS)))]).items())) == expected
    finally:
        handle.remove()


def test_a_quantized_model_generates(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from finetuning.config.sections.model import BitsAndBytes

    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    conf = BitsAndBytes(quantization_type="bits-and-bytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    generator = load_generator(GenerationModel(model=str(tmp_path / "model")), conf)
    answers = answers_of(generator, text_prompts(TEXTS[:2]), [[0, 1]], max_new_tokens=8)
    assert all(batch[0].tokens for batch in answers.values())
