"""Quantized bases train adapters on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from finetuning.config.sections.model import BitsAndBytes, NewPeft, NoPeft, Quantized, RunConfig, TorchAO
from finetuning.errors import ConfigError, ModelError
from finetuning.model.load import load_model
from finetuning.model.peft.adapters import apply_peft
from finetuning.model.quantization import is_quantized, prepare_quantized_model, to_bitsandbytes_config
from finetuning.model.save import save_model

NF4 = BitsAndBytes(quantization_type="bits-and-bytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
DOUBLE = NF4.model_copy(update={"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"})
INT8 = BitsAndBytes(quantization_type="bits-and-bytes", load_in_8bit=True)
AO_INT8 = TorchAO(quantization_type="torchao")
AO_FLOAT8 = TorchAO(quantization_type="torchao", weight_dtype="float8")
LORA = NewPeft(peft_type="LORA", peft_kwargs={"r": 4, "target_modules": ["all-linear"]})
IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 20, 21], [1, 5, 6, 7, 30, 31, 32, 33]])


def stored_as(layer: torch.nn.Module) -> str:
    """What holds the weights of a layer: bitsandbytes has layers of its own, torchao tensors."""
    weight = type(layer.weight).__name__
    return weight if weight.endswith("Tensor") else type(layer).__name__


def numbers(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a plain tensor, which torchao's are not."""
    return weight.dequantize() if type(weight).__name__.endswith("8Tensor") else weight


@pytest.mark.parametrize(
    ("conf", "kind"),
    [
        (NF4, "Linear4bit"),
        (DOUBLE, "Linear4bit"),
        (INT8, "Linear8bitLt"),
        (AO_INT8, "Int8Tensor"),
        (AO_FLOAT8, "Float8Tensor"),
    ],
    ids=["nf4", "nf4-double", "int8", "torchao-int8", "torchao-float8"],
)
def test_a_quantized_base_trains_an_adapter(conf: Quantized, kind: str, tiny_llama_dir: Path, tmp_path: Path):
    run_conf = RunConfig(model=str(tiny_llama_dir))
    model = load_model(run_conf, conf)
    assert is_quantized(model) and stored_as(model.model.layers[0].self_attn.q_proj) == kind
    assert stored_as(model.lm_head) == "Linear"
    adapted = apply_peft(prepare_quantized_model(model, gradient_checkpointing=True), LORA)
    assert (
        adapted.total_parameters
        == sum(p.numel() for p in load_model(run_conf).parameters()) + adapted.trainable_parameters
    )
    frozen = {name: numbers(p).clone() for name, p in adapted.model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in adapted.model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted.model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    after = {name: numbers(p) for name, p in adapted.model.named_parameters() if name in frozen}
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)
    save_model(adapted.model, AutoTokenizer.from_pretrained(tiny_llama_dir), tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(run_conf, conf), tmp_path / "adapter").eval()
    with torch.no_grad():
        # The casts to float32 in training leave rounding behind, nothing more.
        assert torch.allclose(again(IDS).logits, adapted.model.eval()(IDS).logits, atol=0.05)


def test_quantized_weights_themselves_are_not_trained(tiny_llama_dir: Path):
    model = load_model(RunConfig(model=str(tiny_llama_dir)), NF4)
    with pytest.raises(ModelError, match="quantized weights cannot be trained"):
        apply_peft(model, NoPeft(peft_type="NO_PEFT"))


def test_the_storage_type_changes_under_fsdp_only():
    assert to_bitsandbytes_config(DOUBLE).bnb_4bit_quant_storage == torch.uint8
    assert to_bitsandbytes_config(DOUBLE, sharded_by="deepspeed").bnb_4bit_quant_storage == torch.uint8
    assert to_bitsandbytes_config(DOUBLE, sharded_by="fsdp").bnb_4bit_quant_storage == torch.bfloat16
    asked = DOUBLE.model_copy(update={"bnb_4bit_quant_storage": "float16"})
    assert to_bitsandbytes_config(asked).bnb_4bit_quant_storage == torch.float16


def test_every_field_arrives():
    conf = INT8.model_copy(update={"llm_int8_threshold": 4.5, "llm_int8_skip_modules": ["lm_head", "q_proj"]})
    config = to_bitsandbytes_config(conf)
    assert (config.load_in_8bit, config.llm_int8_threshold, config.llm_int8_skip_modules) == (
        True,
        4.5,
        ["lm_head", "score", "q_proj"],
    )


@pytest.mark.parametrize("conf", [NF4, INT8], ids=["nf4", "int8"])
def test_modules_are_skipped_in_addition_to_the_output_layer(conf: BitsAndBytes, chatml_llama_dir: Path):
    model = load_model(
        RunConfig(model=str(chatml_llama_dir)), conf.model_copy(update={"llm_int8_skip_modules": ["q_proj"]})
    )
    attention = model.model.layers[0].self_attn
    kinds = [stored_as(layer) for layer in (attention.q_proj, model.lm_head, attention.k_proj)]
    assert kinds[:2] == ["Linear", "Linear"] and kinds[2].startswith("Linear") and kinds[2] != "Linear"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_torchao_leaves_modules_out(tiny_llama_dir: Path):
    conf = TorchAO(quantization_type="torchao", skip_modules=["q_proj"])
    model = load_model(RunConfig(model=str(tiny_llama_dir)), conf)
    attention = model.model.layers[0].self_attn
    assert [stored_as(layer) for layer in (attention.q_proj, attention.k_proj, model.lm_head)] == [
        "Linear",
        "Int8Tensor",
        "Linear",
    ]


def test_both_widths_are_a_config_error():
    with pytest.raises(ConfigError, match="both of load_in_4bit and load_in_8bit"):
        to_bitsandbytes_config(NF4.model_copy(update={"load_in_8bit": True}))


def test_16_bit_weights_keep_their_dtype_sharded_or_not(tiny_llama_dir: Path):
    model = load_model(
        RunConfig.model_validate({"model": str(tiny_llama_dir), "model_args": {"dtype": "bfloat16"}}), NF4
    )
    prepared = prepare_quantized_model(model, sharded_by="fsdp")
    assert prepared.model.norm.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in prepared.parameters())
    kept = prepare_quantized_model(model)
    assert kept.model.norm.weight.dtype == kept.lm_head.weight.dtype == torch.bfloat16
    assert not any(weight.requires_grad for weight in kept.parameters())


def gradients_after_an_evaluation(model: PreTrainedModel) -> list[torch.Tensor]:
    """The gradients of two adapters that have frozen layers between them and the loss."""
    lora = NewPeft(peft_type="LORA", peft_kwargs={"r": 4, "target_modules": ["q_proj"]})
    adapted = apply_peft(prepare_quantized_model(model), lora).model
    with torch.no_grad():
        adapted.eval()(input_ids=IDS)
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [weight.grad for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 2
    return gradients


@pytest.mark.parametrize("conf", [NF4, INT8, AO_INT8], ids=["nf4", "int8", "torchao-int8"])
def test_gradients_flow_through_quantized_layers_after_an_evaluation(conf: Quantized, chatml_llama_dir: Path):
    gradients = gradients_after_an_evaluation(load_model(RunConfig(model=str(chatml_llama_dir)), conf))
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_gradients_flow_through_a_gptq_checkpoint_after_an_evaluation(gptq_llama_dir: Path):
    gradients = gradients_after_an_evaluation(load_model(RunConfig(model=str(gptq_llama_dir))))
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_an_adapter_of_a_gptq_checkpoint_loads_in_plain_peft(gptq_llama_dir: Path, tmp_path: Path):
    model = load_model(RunConfig(model=str(gptq_llama_dir)))
    packed = {name: weight.clone() for name, weight in model.named_buffers() if "qweight" in name}
    adapted = apply_peft(prepare_quantized_model(model, gradient_checkpointing=True), LORA).model
    assert len(packed) == 14 == sum("lora_A" in name for name, _ in adapted.named_parameters())
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    after = {name.replace(".base_layer", ""): weight for name, weight in adapted.named_buffers()}
    assert all(torch.equal(weight, after[f"base_model.model.{name}"]) for name, weight in packed.items())
    save_model(adapted, AutoTokenizer.from_pretrained(gptq_llama_dir), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(gptq_llama_dir)
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        # Plain loading computes in bfloat16, by the kernel for inference.
        assert torch.allclose(again(IDS).logits, adapted.eval()(IDS).logits, atol=0.05)
