"""Writes what the training benchmarks share into a folder: a random Llama, its tokenizer, chats, our config.

    python benchmarks/training/make_inputs.py FOLDER [--hidden 256] [--layers 8] [--vocabulary 8192] [--rows 2000]
        [--size 1b|8b]

`--size` makes a model of random bfloat16 weights in the shape of Llama 3's of about that many parameters.
The chats have 30 to 400 tokens, about two fifths of them the assistant's.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
LARGE = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}


def words(count: int, generator: random.Random) -> str:
    """Made-up words of two or three syllables."""
    syllables = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va")
    return " ".join("".join(generator.choices(syllables, k=generator.randint(2, 3))) for _ in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--size", choices=list(SHAPES))
    options = parser.parse_args()
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    generator = random.Random(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        (words(200, generator) for _ in range(300)),
        trainers.BpeTrainer(
            vocab_size=options.vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    set_seed(0)
    tiny = {
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "intermediate_size": options.hidden * 8 // 3,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    shape = {**LARGE, **SHAPES[options.size]} if options.size else tiny
    torch.set_default_dtype(torch.bfloat16 if options.size else torch.float32)
    with torch.device("cuda" if options.size and torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(
            LlamaConfig(**shape, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        )
    torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    options.folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.folder / "model")
    tokenizer.save_pretrained(options.folder / "model")
    with open(options.folder / "train.jsonl", "w", encoding="utf-8") as stream:
        for _ in range(options.rows):
            length = generator.choice((20, 40, 60, 100, 150, 220))
            answer = max(5, length * 2 // 5)
            messages = [
                {"role": "user", "content": words(length - answer, generator)},
                {"role": "assistant", "content": words(answer, generator)},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    (options.folder / "sft.yaml").write_text(
        f"""data_conf:
  training_data: {{type: CONCATENATION, datasets: [{{path: {options.folder}/train.jsonl}}]}}
  validation_data: {{type: NONE}}
  chat_template_name: keep-original
training_args: {{output_dir: {options.folder}/out, max_steps: 20, logging_steps: 1, save_strategy: "no", use_cpu: true}}
batchsize_conf: {{total_train_batch_size: 8, max_per_device_train_batch_size: 8}}
peft_conf: {{peft_type: NO_PEFT}}
run_conf: {{model: {options.folder}/model}}
sft_args: {{max_seq_length: 1024, train_on_completions_only: true}}
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
