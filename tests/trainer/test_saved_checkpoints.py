"""A checkpoint or final model holds what is in memory; a file that was changed after it was written is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from finetuning.errors import GuardStopped
from finetuning.model import save
from finetuning.model.peft.adapter_files import is_peft_model
from finetuning.trainer import checkpointing
from finetuning.training.final_model import InitialWeights, save_final_model

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
EMBEDDINGS = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}}

Tensors = dict[str, torch.Tensor]
Tamper = Callable[[Path], None]


def rewrite(change: Callable[[Tensors], Tensors]) -> Tamper:
    """Return a function that changes the tensors in a folder's file of weights."""

    def tamper(folder: Path) -> None:
        (file,) = (path for path in folder.glob("*model.safetensors"))
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return tamper


def edit(name: str, change: Callable[[Any], object]) -> Tamper:
    """Return a function that changes the values of a folder's JSON file in place."""

    def tamper(folder: Path) -> None:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        change(values)
        (folder / name).write_text(json.dumps(values), encoding="utf-8")

    return tamper


def replaced(part: str, value: Callable[[torch.Tensor], torch.Tensor], *, all_of_them: bool = False) -> Tamper:
    """Return a function that replaces the first tensor, or all, with `part` in its name."""

    def change(tensors: Tensors) -> Tensors:
        names = sorted(name for name in tensors if part in name)
        return tensors | {name: value(tensors[name]).contiguous() for name in names[: None if all_of_them else 1]}

    return rewrite(change)


def renamed(old: str, new: str) -> Tamper:
    return rewrite(lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()})


def swapped(first: str, second: str) -> Tamper:
    def change(tensors: Tensors) -> Tensors:
        left, right = (next(name for name in sorted(tensors) if part in name) for part in (first, second))
        return tensors | {left: tensors[right], right: tensors[left]}

    return rewrite(change)


def without(part: str) -> Tamper:
    return rewrite(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def swap_two_tokens(values: Any) -> None:
    vocabulary = values["model"]["vocab"]
    left, right = list(vocabulary)[40:42]
    vocabulary[left], vocabulary[right] = vocabulary[right], vocabulary[left]


def drop_the_last_merge(values: Any) -> None:
    values["model"]["merges"].pop()


def swap_two_merges(values: Any) -> None:
    merges = values["model"]["merges"]
    merges[100], merges[101] = merges[101], merges[100]


def add_a_token_to_texts(values: Any) -> None:
    token = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    pieces = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": token},
    }


def make_a_word_special(values: Any) -> None:
    word = next(text for text, token_id in values["model"]["vocab"].items() if token_id == 300)
    values["added_tokens"].append({**values["added_tokens"][0], "id": 300, "content": word})


def noisy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + torch.randn_like(tensor) * 1e-3


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1).view(torch.uint8)[-1] ^= 1
    return tensor


WEIGHTS: dict[str, tuple[Tamper, str]] = {
    "a zeroed tensor": (replaced("q_proj", torch.zeros_like), "1 of 20 tensors differ .* all values are zero"),
    "swapped tensors": (swapped("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"), "2 of 20 tensors differ"),
    "noise": (replaced("down_proj", noisy), "1 of 20 tensors differ .*values differ, by up to 0.00"),
    "one bit": (replaced("down_proj", one_bit), "1 of 20 tensors differ .*1 of [0-9,]+ values differ"),
    "renamed layers": (renamed("layers.1.", "layers.2."), "tensors are missing, such as model.layers.1.input_layer"),
    "another dtype": (replaced("q_proj", lambda tensor: tensor.bfloat16()), "bfloat16 instead of float32"),
    "another shape": (replaced("q_proj", lambda tensor: tensor.T[:, :8]), r"shape \[\d+, 8\] instead of"),
    "a missing tensor": (without("layers.1.mlp.up_proj"), "1 of 20 tensors are missing, such as model.layers.1.mlp.up"),
    "a config value": (edit("config.json", lambda values: values.update(rms_norm_eps=0.1)), "rms_norm_eps is 0.1"),
    "a config without a value": (
        edit("config.json", lambda values: values.pop("num_hidden_layers")),
        "is null instead",
    ),
}
ADAPTER: dict[str, tuple[Tamper, str]] = {
    "all lora_B are zero": (replaced("lora_B", torch.zeros_like, all_of_them=True), "4 of 8 tensors differ"),
    "one lora_B is zero": (replaced("lora_B", torch.zeros_like), "1 of 8 tensors differ .*all values are zero"),
    "a missing pair": (without("layers.1.self_attn.v_proj"), "2 of 8 tensors are missing"),
    "renamed layers": (renamed("layers.1.", "layers.2."), "4 of 8 tensors are missing.*4 tensors are not the model's"),
    "noise": (replaced("lora_A", noisy), "1 of 8 tensors differ"),
    "lora_A of two layers swapped": (
        swapped("layers.0.self_attn.q_proj.lora_A", "layers.1.self_attn.q_proj.lora_A"),
        "2 of 8 tensors differ",
    ),
    "another dtype": (replaced("lora_A", lambda tensor: tensor.half()), "float16 instead of float32"),
    "lora_alpha": (
        edit("adapter_config.json", lambda values: values.update(lora_alpha=64)),
        "adapter_config.json: lora_alpha is 64 instead of",
    ),
    "target_modules": (
        edit("adapter_config.json", lambda values: values["target_modules"].pop()),
        "adapter_config.json: target_modules is",
    ),
    "no fingerprint": (
        lambda folder: (folder / "adapter_fingerprint.json").unlink(),
        "adapter_fingerprint.json is missing",
    ),
    "no adapter config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json cannot be"),
    "another fingerprint": (
        edit("base_fingerprint.json", lambda values: values.update(samples="0")),
        "base_fingerprint.json: sam",
    ),
}
AUXILIARY: dict[str, tuple[Tamper, str]] = {
    "no chat template": (no_template, "the chat template is missing"),
    "another chat template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        "the chat template is another one",
    ),
    "a wrong end token": (
        edit("generation_config.json", lambda values: values.update(eos_token_id=5)),
        "generation_config.json: eos_token_id is 5 instead of",
    ),
    "another end token of the tokenizer": (
        edit("tokenizer_config.json", lambda values: values.update(eos_token="<|endoftext|>")),
        "tokenizer_config.json: eos_token is '<|endoftext|>' instead of '<|im_end|>'",
    ),
    "swapped tokens": (edit("tokenizer.json", swap_two_tokens), "tokenizer.json: the vocabulary is another"),
    "an added token that takes spaces": (
        edit("tokenizer.json", lambda values: values["added_tokens"][1].update(lstrip=True)),
        "texts are split differently",
    ),
    "another order of merges": (edit("tokenizer.json", swap_two_merges), "texts are split differently"),
    "texts that are cut": (
        edit(
            "tokenizer.json",
            lambda values: values.update(
                truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
            ),
        ),
        "tokenizer.json: texts are cut: .*8",
    ),
    "an end that is text": (
        edit("tokenizer.json", lambda values: values["added_tokens"][1].update(special=False)),
        "tokenizer.json: '<.im_start.>' is not a special token",
    ),
    "two chat templates": (
        edit("tokenizer_config.json", lambda values: values.update(chat_template="{{ messages }}")),
        "it has another chat template than chat_template.jinja",
    ),
    "an end token after each text": (
        edit("tokenizer_config.json", lambda values: values.update(add_eos_token=True)),
        "add_eos_token is True instead of False",
    ),
    "another file of weights": (
        lambda folder: save_file({"a": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors is not the model's",
    ),
    "a token before each text": (
        edit("tokenizer.json", add_a_token_to_texts),
        "'a' is encoded to .*<.im_start.>.* instead of",
    ),
    "a word that is a special token": (
        edit("tokenizer.json", make_a_word_special),
        "is a special token",
    ),
    "a shorter limit": (
        edit("tokenizer_config.json", lambda values: values.update(model_max_length=8)),
        "model_max_length is 8",
    ),
    "a missing merge": (edit("tokenizer.json", drop_the_last_merge), "texts are split differently"),
    "no generation config": (
        lambda folder: (folder / "generation_config.json").unlink(),
        "generation_config.json cannot be read",
    ),
}


@pytest.fixture(params=["checkpoint", "final model"])
def save_tampered(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any, Tamper | None], Path]:
    """A function that saves a trainer's model, and calls `tamper` after the files are written."""
    module = checkpointing if request.param == "checkpoint" else save
    write = module.write_companion_files

    def save_model(trainer: Any, tamper: Tamper | None) -> Path:
        def write_and_tamper(tokenizer: Any, folder: Path, **options: Any) -> None:
            write(tokenizer, folder, **options)
            if tamper is not None:
                tamper(folder)

        monkeypatch.setattr(module, "write_companion_files", write_and_tamper)
        folder = tmp_path / "saved"
        if request.param == "checkpoint":
            trainer._verified_tokenizer = None
            trainer.save_model(str(folder))
        else:
            save_final_model(trainer, trainer.processing_class, folder, initial=InitialWeights({}, {}))
        return folder

    return save_model


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Trainers after a run, by method; filled by `trainer_of`."""
    return {}


@pytest.fixture
def trainer_of(trained: dict[str, Any], train: Any, sft_values: Any) -> Callable[[str, Any], Any]:
    def get(name: str, peft: Any) -> Any:
        if name not in trained:
            trained[name] = train(sft_values({"peft_conf": peft, "training_args.max_steps": 1})).trainer
        return trained[name]

    return get


@pytest.mark.parametrize("fault", WEIGHTS | AUXILIARY)
def test_a_full_model_that_is_not_what_is_in_memory_is_named(fault: str, trainer_of: Any, save_tampered: Any) -> None:
    tamper, message = (WEIGHTS | AUXILIARY)[fault]
    with pytest.raises(GuardStopped, match=message) as caught:
        save_tampered(trainer_of("full", {"peft_type": "NO_PEFT"}), tamper)
    assert caught.value.exit_code == 3 and len(caught.value.problems) == 1


@pytest.mark.parametrize("fault", ADAPTER | AUXILIARY)
def test_an_adapter_that_is_not_what_is_in_memory_is_named(fault: str, trainer_of: Any, save_tampered: Any) -> None:
    tamper, message = (ADAPTER | AUXILIARY)[fault]
    with pytest.raises(GuardStopped, match=message) as caught:
        save_tampered(trainer_of("lora", LORA), tamper)
    assert caught.value.exit_code == 3 and len(caught.value.problems) == 1


def test_the_base_models_weights_in_place_of_the_tuned_ones_are_named(
    trainer_of: Any, save_tampered: Any, chatml_llama_dir: Path
) -> None:
    base = load_file(chatml_llama_dir / "model.safetensors")
    with pytest.raises(GuardStopped, match="20 of 20 tensors differ"):
        save_tampered(trainer_of("full", {"peft_type": "NO_PEFT"}), rewrite(lambda tensors: base))


@pytest.mark.parametrize("peft", [{"peft_type": "NO_PEFT"}, LORA, EMBEDDINGS], ids=["full", "lora", "embeddings"])
def test_what_is_as_it_was_written_passes(
    peft: Any, request: pytest.FixtureRequest, trainer_of: Any, save_tampered: Any
) -> None:
    name = request.node.callspec.id.rpartition("-")[2]
    trainer = trainer_of(name, peft)
    assert list(save_tampered(trainer, None).glob("*.safetensors"))


def test_whole_embeddings_that_are_saved_with_an_adapter_are_compared_too(trainer_of: Any, tmp_path: Path) -> None:
    trainer = trainer_of("embeddings", EMBEDDINGS)
    trainer.save_model(str(tmp_path))
    assert is_peft_model(trainer.model)
    differences = save.compare_with_saved(trainer.model, None, tmp_path)
    assert differences == []
    replaced("embed_tokens.base_layer", torch.zeros_like)(tmp_path)
    (difference,) = save.compare_with_saved(trainer.model, None, tmp_path)
    assert "embed_tokens.base_layer.weight (the first: all values are zero)" in difference


def test_a_tensor_that_peft_leaves_out_of_a_save_is_named(
    trainer_of: Any, save_tampered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that PEFT saves by is no part of the comparison."""
    import peft
    from peft import peft_model

    original = peft.get_peft_model_state_dict

    def without_a_layer(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        tensors = original(*args, **kwargs)
        return {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.v_proj" not in name}

    trainer = trainer_of("lora", LORA)
    monkeypatch.setattr(peft, "get_peft_model_state_dict", without_a_layer)
    monkeypatch.setattr(peft_model, "get_peft_model_state_dict", without_a_layer)
    with pytest.raises(GuardStopped, match=r"2 of 8 tensors are missing, such as .*layers.1.self_attn.v_proj.lora_A"):
        save_tampered(trainer, None)


def tamper_at(step: int, monkeypatch: pytest.MonkeyPatch, tamper: Tamper) -> None:
    """Have the files of the checkpoint of a step changed after they are written."""
    write = checkpointing.write_companion_files

    def write_and_tamper(tokenizer: Any, folder: Path, **options: Any) -> None:
        write(tokenizer, folder, **options)
        if folder.name == f"checkpoint-{step}":
            tamper(folder)

    monkeypatch.setattr(checkpointing, "write_companion_files", write_and_tamper)


@pytest.mark.parametrize("fault", ["a zeroed tensor", "no chat template"])
def test_a_checkpoint_that_fails_is_not_published_and_earlier_ones_stay(
    fault: str, train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = sft_values({"training_args.save_strategy": "steps", "training_args.save_steps": 1})
    tamper_at(2, monkeypatch, (WEIGHTS | AUXILIARY)[fault][0])
    with pytest.raises(GuardStopped, match=r"checkpoint-2: the saved model failed verification: "):
        train(values)
    output_dir = Path(values["training_args"]["output_dir"])
    assert sorted(path.name for path in output_dir.glob("*checkpoint-*")) == ["checkpoint-1"]


def test_a_full_model_that_never_moved_is_not_published(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an optimizer that does nothing. A learning rate of 0 in the config is a warning, as a user may want it."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    values = sft_values()
    with pytest.raises(GuardStopped, match="none of its 20 weights changed in training") as caught:
        train(values)
    assert caught.value.exit_code == 3
    assert not (Path(values["training_args"]["output_dir"]) / "checkpoint-final").exists()


def test_state_that_peft_does_not_save_is_compared(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = sft_values(
        {
            "peft_conf": {"peft_type": "P_TUNING", "peft_kwargs": {"num_virtual_tokens": 4}},
            "training_args.save_strategy": "steps",
            "training_args.save_steps": 1,
        }
    )

    def zero(folder: Path) -> None:
        file = folder / "prompt_encoder.safetensors"
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)

    tamper_at(1, monkeypatch, zero)
    with pytest.raises(GuardStopped, match=r"prompt_encoder.safetensors: \d+ of \d+ tensors differ"):
        train(values)


@pytest.mark.parametrize(
    ("name", "message"),
    [("optimizer.pt", r"optimizer\.pt\[state\]\[0\]\[exp_avg\] differs"), ("scheduler.pt", "scheduler.pt.* differs")],
)
def test_an_optimizer_that_is_not_saved_as_it_is_stops_the_run(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    save = Trainer._save_optimizer_and_scheduler

    def save_and_tamper(trainer: Any, output_dir: str) -> None:
        save(trainer, output_dir)
        file = Path(output_dir) / name
        state = torch.load(file, weights_only=False)
        if name == "optimizer.pt":
            state["state"][0]["exp_avg"].zero_()
        else:
            state["last_epoch"] += 1
        torch.save(state, file)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save_and_tamper)
    with pytest.raises(GuardStopped, match=f"checkpoint-1: the saved model failed verification: {message}"):
        train(sft_values({"training_args.save_strategy": "steps", "training_args.save_steps": 1}))
