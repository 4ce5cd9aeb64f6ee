"""LoRA initialization: each value of PEFT trains and loads again, or is rejected before weights load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError, DataError, ModelError
from finetuning.plan.lora_init import UNSUPPORTED_INITS
from finetuning.plan.plan import make_plan

ASSISTANT = "<|im_start|>assistant"
TRAINS = ("gaussian", "eva", "olora", "pissa", "orthogonal", "mica")
ALONE = {"lora_ga"}
"""Known to PEFT, but not among the values that its annotation lists."""


def lora(**kwargs: Any) -> dict[str, Any]:
    return {
        "peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj", "v_proj"], **kwargs}}
    }


def loaded(base: Path, adapter: Path) -> Any:
    """The adapter on its base, as any user of PEFT loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits


def test_every_init_of_the_installed_peft_is_listed() -> None:
    from peft import LoraConfig

    choices = next(kind for kind in get_args(get_type_hints(LoraConfig)["init_lora_weights"]) if get_args(kind))
    named = {name.partition("[")[0] for name in get_args(choices)}
    assert named | ALONE == {*TRAINS, *(init.prefix for init in UNSUPPORTED_INITS)}


@pytest.mark.parametrize("name", TRAINS)
def test_supported_init_trains_and_loads_again(train: Any, sft_values: Any, chatml_llama_dir: Path, name: str) -> None:
    run = train(sft_values(lora(init_lora_weights=name)))
    ids = [1, 5, 6, 7, 8, 9, 1, 20, 30, 31]
    assert torch.equal(logits(loaded(chatml_llama_dir, run.final), ids), logits(run.trainer.model, ids))
    assert run.losses[-1] < run.losses[0]


def test_eva_is_computed_from_the_rows(train: Any, sft_values: Any, read_tensors: Any, tmp_path: Path) -> None:
    """Whatever the seed, and on the base itself: B is zero."""
    hardly = {"training_args.learning_rate": 1e-7, "training_args.max_steps": 1}

    def begun(name: str, seed: int, init: Any) -> tuple[dict[str, torch.Tensor], float]:
        settings = {"training_args.seed": seed, "training_args.output_dir": str(tmp_path / name)}
        run = train(sft_values({**lora(init_lora_weights=init), **hardly, **settings}))
        return {key: item for key, item in read_tensors(run.final).items() if "lora_A" in key}, run.losses[0]

    weights, first = begun("one", 1, "eva")
    second, _ = begun("other", 2, "eva")
    usual, _ = begun("usual", 1, True)
    assert all(torch.allclose(weights[name], second[name], atol=1e-5) for name in weights)
    assert not any(
        weights[name].shape == usual[name].shape and torch.allclose(weights[name], usual[name]) for name in weights
    )
    assert first == pytest.approx(6.2, abs=0.1)


def test_eva_needs_enough_rows(train: Any, sft_values: Any, write_jsonl: Any, sft_rows: Any) -> None:
    values = sft_values(lora(init_lora_weights="eva", eva_config={"rho": 16.0}))
    write_jsonl(Path(values["data_conf"]["training_data"]["datasets"][0]["path"]), sft_rows(4)[1:3])
    with pytest.raises(
        ModelError, match=r"EVA initialization failed: the rows have fewer trained tokens than directions \(64\)"
    ):
        train(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lora(init_lora_weights="pissa_niter_16"), "pissa_niter_16 is not supported.*exact decomposition"),
        (lora(init_lora_weights="corda"), "corda is not supported.*eva"),
        (lora(init_lora_weights="lora_ga"), "lora_ga is not supported.*eva"),
        (lora(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "loftq is not supported.*nf4"),
        (lora(use_qalora=True), "use_qalora: QALoRA requires a GPTQ checkpoint"),
    ],
)
def test_unsupported_init_is_rejected(sft_values: Any, write_config: Any, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned("sft", write_config(sft_values({**changes, "run_conf.model": "/not/there"})))


def test_eva_is_only_valid_for_sft(dpo_values: Any, write_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"eva is only valid for sft.*not supported for dpo"):
        planned("dpo", write_config(dpo_values(lora(init_lora_weights="eva"))))


def planned(method: str, config: Path) -> None:
    make_plan(validate(read_document(config), EXPERIMENTS[method]).experiment, ProcessTopology())


def alora(text: str) -> dict[str, Any]:
    return {**lora(), "peft_conf.alora_invocation_string": text}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_alora_is_active_from_its_invocation_on(
    train: Any, sft_values: Any, dpo_values: Any, chatml_llama_dir: Path, chatml_tokenizer: Any, method: str
) -> None:
    """Trained, loaded by PEFT, generated with: before the text the model is its base, after it it is not."""
    from transformers import AutoModelForCausalLM

    values = {"sft": sft_values, "dpo": dpo_values}[method](alora(ASSISTANT))
    run = train(values)
    model = loaded(chatml_llama_dir, run.final)
    text = f"<|im_start|>user\nWhat is number 3?<|im_end|>\n{ASSISTANT}\n"
    ids = chatml_tokenizer.encode(text, add_special_tokens=False)
    invocation = chatml_tokenizer.encode(ASSISTANT, add_special_tokens=False)
    assert model.active_peft_config.alora_invocation_tokens == invocation
    begins = next(at for at in range(len(ids)) if ids[at : at + len(invocation)] == invocation)
    base = AutoModelForCausalLM.from_pretrained(chatml_llama_dir)
    tuned, plain = logits(model, ids), logits(base, ids)
    assert torch.equal(tuned[:, :begins], plain[:, :begins])
    assert (tuned[:, begins:] - plain[:, begins:]).abs().max() > 1e-3
    written = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert written.shape[1] > len(ids)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (alora("### Answer:"), DataError, r"24 of 24 rows never activate the adapter.*'### Answer:'"),
        ({**lora(alora_invocation_tokens=[400, 401])}, DataError, "24 of 24 rows never activate the adapter"),
        (
            {**lora(alora_invocation_tokens=[1]), "peft_conf.alora_invocation_string": "a"},
            ConfigError,
            "cannot be combined with peft_kwargs.alora_invocation_tokens",
        ),
        (
            {"peft_conf": {"peft_type": "IA3", "alora_invocation_string": ASSISTANT}},
            ConfigError,
            "alora_invocation_string: is only valid for LORA, not for IA3",
        ),
    ],
)
def test_invocation_that_never_matches_is_rejected(
    train: Any, sft_values: Any, changes: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(sft_values(changes))
