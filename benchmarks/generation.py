"""Tokens per second of `generate`'s batches against one prompt at a time, and whether the greedy text is the same.

    python benchmarks/generation.py [--size small] [--prompts 48] [--new-tokens 128] [--dtype float32] [--repeats 3]
    python benchmarks/generation.py --size 1b

The model is a Llama of random weights. Prompts have 16 to 256 tokens, of `1b` 16 to 64, and it is measured once; every
answer has the full length, so that both ways write the same number of tokens. Reading the prompts is told apart: it is
the same work both ways, which bounds the ratio. Prints the median of the repeats as one line of JSON. `--continuous`
adds transformers' continuous batching.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetuning.inference.batching import DEFAULT_BATCH_TOKENS, max_useful_padding, plan_batches
from finetuning.inference.generate import EncodedPrompt, generate_batches
from finetuning.inference.generation_params import GenerationParameters, build_parameters
from finetuning.inference.load import LoadedGenerator

SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "medium": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}
VOCABULARY = 8192
DEFAULTS = {"prompts": 48, "new_tokens": 128, "longest": 256, "dtype": "float32", "repeats": 3}
OF_1B = {"prompts": 16, "new_tokens": 24, "longest": 64, "dtype": "bfloat16", "repeats": 1}
"""Few and short enough that one at a time ends within minutes on two cores."""


def make_generator(size: str, dtype: torch.dtype, device: str) -> LoadedGenerator:
    """A Llama of random weights with a tokenizer whose words are numbers."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, **SIZES[size]))
    words = {str(number): number for number in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="1", padding_side="left")
    model.generation_config = GenerationConfig()
    return LoadedGenerator(model.to(dtype).eval(), tokenizer, pad_token_id=0)


def make_prompts(count: int, longest: int) -> list[EncodedPrompt]:
    """Prompts of random tokens, 16 and more of them."""
    rng = random.Random(0)
    ids = [[rng.randrange(2, VOCABULARY) for _ in range(rng.randint(16, longest))] for _ in range(count)]
    return [EncodedPrompt(" ".join(map(str, row)), tuple(row), False) for row in ids]


def ours(
    generator: LoadedGenerator,
    prompts: list[EncodedPrompt],
    parameters: GenerationParameters,
    max_rows: int | None,
    budget: int,
) -> Callable[[], list[str]]:
    """A function that answers all prompts and gives back the texts in order."""
    lengths = [len(prompt.ids) for prompt in prompts]
    batches = plan_batches(
        lengths,
        parameters.max_new_tokens,
        max_rows=max_rows,
        budget=budget,
        max_padding=max_useful_padding(generator.device.type, parameters.max_new_tokens),
    )

    def answer() -> list[str]:
        answers: dict[int, Any] = {}
        for given in generate_batches(generator, prompts, batches, parameters, seed=0):
            answers |= given
        return [answers[index][0].text for index in range(len(prompts))]

    return answer


def continuous(
    generator: LoadedGenerator, prompts: list[EncodedPrompt], parameters: GenerationParameters
) -> Callable[[], list[str]]:
    """The same by transformers' continuous batching."""

    def answer() -> list[str]:
        given = generator.model.generate_batch(
            [list(prompt.ids) for prompt in prompts], generation_config=parameters.config
        )
        outputs = sorted(given.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[-1]))
        return [generator.tokenizer.decode(output.generated_tokens) for output in outputs]

    return answer


def median_seconds(function: Callable[[], list[str]], repeats: int) -> tuple[float, list[str]]:
    """The median time of a call, and what the last one gave back.

    On the CPU the time is this process's own, so that others on the machine do not count.
    """
    clock = time.monotonic if torch.cuda.is_available() else time.process_time
    times, result = [], []
    for _ in range(repeats):
        started = clock()
        result = function()
        times.append(clock() - started)
    return statistics.median(times), result


def seconds_of_reading(generator: LoadedGenerator, prompts: list[EncodedPrompt], repeats: int) -> float:
    """The time of reading all prompts, one by one: an answer of a single token each."""
    wanted = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False}
    parameters = build_parameters(wanted, generator.tokenizer, generator.model, generator.pad_token_id)
    return median_seconds(ours(generator, prompts, parameters, 1, DEFAULT_BATCH_TOKENS), repeats)[0]


def same(left: Sequence[str], right: Sequence[str]) -> int:
    """How many texts are equal."""
    return sum(one == other for one, other in zip(left, right, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure batched generation.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--longest", type=int, help="most tokens of a prompt")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--batch-tokens", type=int, default=DEFAULT_BATCH_TOKENS)
    parser.add_argument("--continuous", action="store_true", help="measure transformers' continuous batching, too")
    options = parser.parse_args()
    for name, value in (OF_1B if options.size == "1b" else DEFAULTS).items():
        if getattr(options, name) is None:
            vars(options)[name] = value
    generator = make_generator(options.size, getattr(torch, options.dtype), options.device)
    prompts = make_prompts(options.prompts, options.longest)
    wanted = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}
    parameters = build_parameters(wanted, generator.tokenizer, generator.model, generator.pad_token_id)
    # Once through everything that is compiled or allocated at the first call.
    ours(generator, prompts[:2], parameters, None, options.batch_tokens)()
    one_by_one, texts = median_seconds(ours(generator, prompts, parameters, 1, options.batch_tokens), options.repeats)
    batched, batched_texts = median_seconds(
        ours(generator, prompts, parameters, None, options.batch_tokens), options.repeats
    )
    reading = seconds_of_reading(generator, prompts, options.repeats)
    tokens = options.prompts * options.new_tokens
    result: dict[str, Any] = {
        **{
            key: getattr(options, key)
            for key in ("size", "dtype", "device", "prompts", "new_tokens", "longest", "repeats")
        },
        "weights": generator.model.num_parameters(),
        "one_by_one_tokens_per_s": round(tokens / one_by_one, 1),
        "batched_tokens_per_s": round(tokens / batched, 1),
        "ratio": round(one_by_one / batched, 2),
        "reading_prompts_s": round(reading, 1),
        "one_by_one_s": round(one_by_one, 1),
        "batched_s": round(batched, 1),
        "same_text": f"{same(texts, batched_texts)} of {len(texts)}",
    }
    if options.continuous:
        seconds, continuous_texts = median_seconds(continuous(generator, prompts, parameters), options.repeats)
        result["continuous_tokens_per_s"] = round(tokens / seconds, 1)
        result["continuous_same_text"] = f"{same(texts, continuous_texts)} of {len(texts)}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
