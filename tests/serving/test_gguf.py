"""llama.cpp converts what the engine made, and answers like it.

Run by `make test-serving` where the variable LLAMA_CPP names a folder of llama.cpp with a built llama-server; skipped
without it. LLAMA_CPP_PYTHON names an interpreter for the converter, by default the one of the tests.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML_TEMPLATE, SENTENCES

from finetuning.cli import export

LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
PYTHON = os.environ.get("LLAMA_CPP_PYTHON")
pytestmark = pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP names no folder of llama.cpp")
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer in the manner of Llama 2: llama.cpp knows no home-made byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(spaces)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        min_frequency=1,
    )
    # The texts that the export samples are part of the vocabulary: byte fallback differs in home-made tokenizers.
    backend.train_from_iterator([*SENTENCES, *export._QUESTIONS] * 3, trainer)
    values = json.loads(backend.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(values))
    # llama.cpp adds <s> for every tokenizer of this kind.
    backend.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>", model_max_length=512,
        chat_template=CHATML_TEMPLATE,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, bos_token_id=1)
    folder = tmp_path_factory.mktemp("base") / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("peft", "kind"),
    [
        ({"peft_type": "NO_PEFT"}, "f32"),
        ({"peft_type": "NO_PEFT"}, "q8_0"),
        ({"peft_type": "NO_PEFT"}, "Q4_K_M"),
        ({"peft_type": "LORA", "peft_kwargs": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}}, "f32"),
    ],
    ids=["full", "full, 8 bit", "full, 4 bit", "adapter"],
)
def test_llama_cpp_answers_like_the_model(
    peft: dict[str, Any], kind: str, base_dir: Path, sft_values: Any, write_config: Any, write_jsonl: Any,
    run_cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    rows = write_jsonl(tmp_path / "row.jsonl", [{"messages": messages}] * 4)
    changes = {
        "run_conf.model": str(base_dir),
        "data_conf.training_data.datasets": [{"path": str(rows)}],
        "peft_conf": peft,
        "training_args.max_steps": 40,
    }
    done = run_cli(["sft", write_config(sft_values(changes))])
    assert done.returncode == 0, done.stderr
    arguments = ["gguf", str(tmp_path / "out"), "--llama-cpp", LLAMA_CPP, "--quantize", kind]
    code = export.main(arguments + (["--python", PYTHON] if PYTHON else []))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "3 of 3 prompts are tokenized alike, " in captured.out
    # Four bits may change an answer.
    equal = re.search(r"(\d) of 3 greedy answers have the same text and end", captured.out)
    assert equal is not None and int(equal[1]) >= (1 if kind == "Q4_K_M" else 3), captured.out
    folder = tmp_path / "out" / "checkpoint-final-gguf"
    assert 'PARAMETER stop "<|im_end|>"' in (folder / "Modelfile").read_text()
    assert json.loads((folder / "export.json").read_text())["verified"].startswith("3 of 3")
