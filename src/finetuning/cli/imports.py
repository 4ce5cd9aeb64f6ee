"""Which installed packages a run can do without."""

from __future__ import annotations

import sys

from finetuning.config.pretrained_config import read_pretrained_config
from finetuning.config.sections.experiment import Experiment, SFTExperiment
from finetuning.config.sections.model import NewPeft, NoPeft, NoQuantization

_OPTIMIZERS_OF_BITSANDBYTES = ("8bit", "bnb", "paged", "ademamix")
_OPTIMIZERS_OF_TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")


def leave_out_unused(experiment: Experiment) -> list[str]:
    """Names of packages that this process will not import; a third of the time before the first step goes to them.

    transformers and PEFT import whatever they find installed. An entry of None in `sys.modules` is the import
    system's way to say that a module is not to be had (Python's reference, "The module cache"): the libraries then
    take the paths that they have for its absence. Only for a process of our own, before a library is imported.
    """
    names = []
    optimizer = experiment.training_args.optim
    if not _is_quantised(experiment):
        if not any(part in optimizer for part in _OPTIMIZERS_OF_BITSANDBYTES):
            names.append("bitsandbytes")
        if not optimizer.startswith(_OPTIMIZERS_OF_TORCHAO):
            names.append("torchao")
    if _is_plain(experiment):
        names += ["scipy", "sklearn"]
    if isinstance(experiment, SFTExperiment) and isinstance(experiment.peft_conf, NoPeft):
        names.append("peft")
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    return names


def _is_quantised(experiment: Experiment) -> bool:
    """True unless the weights are known to be plain numbers, by the config and the model's own."""
    if not isinstance(experiment.quant_conf, NoQuantization):
        return True
    config = read_pretrained_config(experiment.run_conf.model)
    return config is None or "quantization_config" in config


def _is_plain(experiment: Experiment) -> bool:
    """Full training or LoRA with an ordinary beginning: what else PEFT has may want scipy."""
    peft_conf = experiment.peft_conf
    if isinstance(peft_conf, NoPeft):
        return True
    ordinary = (None, True, False, "gaussian")
    return (
        isinstance(peft_conf, NewPeft)
        and peft_conf.peft_type == "LORA"
        and peft_conf.peft_kwargs.get("init_lora_weights") in ordinary
    )
