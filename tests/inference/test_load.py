"""Models with adapters, and the tokenizer that belongs to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuning.config.sections.experiment import GenerationModel
from finetuning.config.sections.model import NoQuantization
from finetuning.errors import ConfigError, ModelError
from finetuning.inference.load import load_generator, model_conf_of

MakeAdapter = Callable[..., Path]


@pytest.fixture
def make_adapter(tiny_llama_dir: Path, tmp_path: Path) -> MakeAdapter:
    """A function that saves a LoRA adapter of random weights, with a tokenizer that knows some new tokens if asked."""

    def make(name: str = "adapter", new_tokens: tuple[str, ...] = (), with_tokenizer: bool = False) -> Path:
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
        tokenizer.add_tokens(list(new_tokens))
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        saved = ["embed_tokens", "lm_head"] if new_tokens else None
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False, modules_to_save=saved
        )
        wrapped = get_peft_model(model, config)
        wrapped.save_pretrained(tmp_path / name)
        if with_tokenizer:
            tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 30, 40, 50]])).logits


def test_the_adapter_is_on(tiny_llama_dir: Path, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    generator = load_generator(GenerationModel(model=str(tiny_llama_dir), adapter=str(adapter)), NoQuantization())
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    plain = logits_of(base)
    by_hand = logits_of(PeftModel.from_pretrained(base, adapter).eval())
    assert torch.equal(logits_of(generator.model), by_hand)
    assert not torch.allclose(plain, by_hand)
    assert not generator.model.training


def test_the_tokenizer_is_the_adapters_where_it_has_one(tiny_llama_dir: Path, make_adapter: MakeAdapter) -> None:
    bare, with_tokenizer = make_adapter("bare"), make_adapter("own", with_tokenizer=True)
    config = with_tokenizer / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "the adapter's"}))

    def template(**conf: str) -> str | None:
        model = GenerationModel(model=str(tiny_llama_dir), **conf)
        return load_generator(model, NoQuantization()).tokenizer.chat_template

    assert template(adapter=str(with_tokenizer)) == "the adapter's"
    assert template(adapter=str(bare)) is None
    assert template(adapter=str(with_tokenizer), tokenizer=str(tiny_llama_dir)) is None


def test_the_base_grows_for_an_adapter_with_new_tokens(tiny_llama_dir: Path, make_adapter: MakeAdapter) -> None:
    tokens = tuple(f"<new{number}>" for number in range(20))
    adapter = make_adapter(new_tokens=tokens, with_tokenizer=True)
    generator = load_generator(GenerationModel(model=str(tiny_llama_dir), adapter=str(adapter)), NoQuantization())
    assert generator.model.get_input_embeddings().weight.shape[0] == len(generator.tokenizer)
    assert generator.tokenizer.decode(generator.tokenizer("<new3>", add_special_tokens=False).input_ids) == "<new3>"


def test_an_adapter_that_does_not_fit_is_refused(
    tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    conf = GenerationModel(model=str(tiny_llama_dir), adapter=str(adapter))
    with pytest.raises(ModelError, match=r"model_conf\.adapter: .*contains no adapter_model\.safetensors"):
        load_generator(conf, NoQuantization())
    with pytest.raises(ModelError, match=r"model_conf\.adapter: .*no folder"):
        load_generator(conf.model_copy(update={"adapter": str(tmp_path / "none")}), NoQuantization())
    with pytest.raises(ModelError, match=r"model_conf\.model: .*no folder"):
        load_generator(GenerationModel(model=str(tmp_path / "none")), NoQuantization())


def test_an_adapter_folder_selects_its_base_model(
    tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter()
    config = adapter / "adapter_config.json"
    before = config.read_bytes()
    conf = model_conf_of(str(adapter), None)
    assert (conf.model, conf.adapter) == (str(tiny_llama_dir), str(adapter))
    assert model_conf_of(str(adapter), "elsewhere").model == "elsewhere"
    assert config.read_bytes() == before
    config.write_text(json.dumps(json.loads(before) | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not name its base model"):
        model_conf_of(str(adapter), None)


def test_a_model_folder_has_no_adapter(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert model_conf_of(str(tiny_llama_dir), None).adapter is None
    with pytest.raises(ConfigError, match="is not an adapter"):
        model_conf_of(str(tiny_llama_dir), "elsewhere")
    shutil.copytree(tiny_llama_dir, tmp_path / "copy")
    assert model_conf_of(str(tmp_path / "copy"), None).model == str(tmp_path / "copy")


def test_hints_name_the_keys_of_this_tool(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    def reported(**conf: object) -> str:
        with pytest.raises(ModelError) as error:
            load_generator(GenerationModel.model_validate({"model": str(tiny_llama_dir), **conf}), NoQuantization())
        assert "run_conf" not in str(error.value) and "peft_conf" not in str(error.value)
        return str(error.value)

    assert reported(model="/no/model").startswith(
        "model_conf.model: there is no folder /no/model to load the model from"
    )
    assert "the adapter as model_conf.adapter" in reported(model=str(make_adapter(with_tokenizer=True)))
    assert "model_conf.model_args.attention_bais: " in reported(model_args={"attention_bais": True})
    assert reported(model_args={"attn_implementation": "flash"}).startswith(
        "model_conf.model_args.attn_implementation: "
    )
    pickled = shutil.copytree(tiny_llama_dir, tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert "or set model_conf.model_args.use_safetensors: false" in reported(model=str(pickled))
    own_code = shutil.copytree(tiny_llama_dir, tmp_path / "own_code")
    config = json.loads((own_code / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (own_code / "config.json").write_text(json.dumps(config))
    assert "Set model_conf.model_args.trust_remote_code: true" in reported(model=str(own_code))
