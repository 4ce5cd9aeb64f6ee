"""LoRA whose initialization changes the base: converted to a plain one, merged, or refused; never called compatible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.errors import ModelError
from finetuning.export.merge.merge import merge_adapters
from finetuning.export.vllm.convert import make_vllm_compatible
from finetuning.model.peft.lora_support import INITS, OPTIONS, lora_init, support_table
from finetuning.plan.lora_init import UNSUPPORTED_INITS

MakeAdapter = Callable[..., Path]


def lora(**arguments: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **arguments})


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.arange(20).unsqueeze(0)).logits


def adapted_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def train_and_save(base: Path, config: Any, folder: Path) -> torch.Tensor:
    """Saves an adapter before and after its weights were moved, as `initial` and `trained`; returns its logits."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(folder / "initial")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "trained")
    return logits_of(model)


@pytest.mark.parametrize(
    "arguments",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "use_rslora": True, "lora_alpha": 3},
        {"init_lora_weights": "olora", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    ],
    ids=["pissa", "pissa-rslora", "olora-patterns"],
)
def test_the_converted_adapter_gives_the_trained_model_on_the_unchanged_base(
    arguments: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    trained = train_and_save(tiny_llama_dir, lora(**arguments), tmp_path)
    result = make_vllm_compatible(tmp_path / "trained", output=tmp_path / "served")
    assert result.changed
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == 8
    served = adapted_logits(tiny_llama_dir, tmp_path / "served")
    torch.testing.assert_close(served, trained, atol=2e-5, rtol=0)
    merge_adapters(str(tiny_llama_dir), [str(tmp_path / "served")], tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, trained, atol=2e-5, rtol=0)


def test_an_initialization_that_loading_does_not_repeat_needs_the_initial_adapter(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    trained = train_and_save(tiny_llama_dir, lora(init_lora_weights="pissa_niter_2"), tmp_path)
    adapter = tmp_path / "trained"
    with pytest.raises(ModelError, match=r"pissa_niter_2.*which vLLM does not do") as caught:
        make_vllm_compatible(adapter)
    assert "--initial-adapter" in str(caught.value) and "merge_adapter" not in str(caught.value)
    with pytest.raises(ModelError, match="loading the adapter does not repeat the change"):
        merge_adapters(str(tiny_llama_dir), [str(adapter)], tmp_path / "merged")
    make_vllm_compatible(adapter, output=tmp_path / "served", initial_adapter=str(tmp_path / "initial"))
    torch.testing.assert_close(adapted_logits(tiny_llama_dir, tmp_path / "served"), trained, atol=2e-5, rtol=0)


def test_without_its_base_it_is_refused_and_the_remedies_are_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    train_and_save(tiny_llama_dir, lora(init_lora_weights="pissa"), tmp_path)
    adapter = tmp_path / "trained"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(ModelError) as caught:
        make_vllm_compatible(adapter)
    assert "--base" in str(caught.value) and "merge_adapter /gone/base" in str(caught.value)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_another_initial_adapter_is_refused(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    train_and_save(tiny_llama_dir, lora(init_lora_weights="pissa_niter_2"), tmp_path)
    wrong = make_adapter(tiny_llama_dir, lora(r=8), tmp_path / "wrong")
    with pytest.raises(ModelError, match=r"does not belong to .*q_proj.*shape \[8, 64\]"):
        make_vllm_compatible(tmp_path / "trained", initial_adapter=str(wrong))
    plain = make_adapter(tiny_llama_dir, lora(), tmp_path / "plain")
    with pytest.raises(ModelError, match="needs no initial adapter"):
        make_vllm_compatible(plain, initial_adapter=str(wrong))


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_an_adapter_that_peft_would_load_onto_the_wrong_base_is_not_merged(
    init: str, tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
    with pytest.raises(ModelError, match=f"{init}|does not repeat"):
        merge_adapters(str(tiny_llama_dir), [str(adapter)], tmp_path / "merged")
    with pytest.raises(ModelError, match="--initial-adapter"):
        make_vllm_compatible(adapter)


def test_every_initialization_of_peft_is_in_the_table() -> None:
    import typing

    from peft import LoraConfig

    accepted = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    names = {name for kind in typing.get_args(accepted) for name in typing.get_args(kind)}
    assert names
    supported = {init.name for init in INITS}
    assert {"pissa_niter_" if name.startswith("pissa_niter") else name for name in names} <= supported
    assert all(lora_init({"init_lora_weights": init.prefix}).changes_base for init in UNSUPPORTED_INITS)
    assert lora_init({"init_lora_weights": "of a later version"}).changes_base
    assert not any(lora_init({"init_lora_weights": value}).changes_base for value in (True, False, None, "gaussian"))


def test_every_option_is_a_field_of_peft() -> None:
    from peft import LoraConfig

    assert {option.field for option in OPTIONS} <= set(LoraConfig.__dataclass_fields__)


def test_the_documentation_shows_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "vllm.md"
    assert "\n".join(support_table()) in page.read_text(encoding="utf-8")
