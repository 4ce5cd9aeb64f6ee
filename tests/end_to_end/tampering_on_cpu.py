"""`sharding_on_cpu.py`, where one value of what FSDP2 saves is changed after it was written.

`TAMPER_WITH` says in what: `gathered` for the file of all weights, `sharded` for the shards of the second process. With
`none` nothing is changed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import transformers.trainer
from sharding_on_cpu import main

_save = transformers.trainer.save_fsdp_model


def _save_and_tamper(plugin: Any, accelerator: Any, model: Any, folder: str, **options: Any) -> None:
    _save(plugin, accelerator, model, folder, **options)
    torch.distributed.barrier()
    if os.environ["TAMPER_WITH"] == "gathered" and accelerator.is_main_process:
        file = Path(folder, "pytorch_model_fsdp.bin")
        weights = torch.load(file)
        weights["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1e-3
        torch.save(weights, file)
    if os.environ["TAMPER_WITH"] == "sharded" and accelerator.is_main_process:
        (file,) = Path(folder, "pytorch_model_fsdp_0").glob("__1_*.distcp")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    torch.distributed.barrier()


transformers.trainer.save_fsdp_model = _save_and_tamper

if __name__ == "__main__":
    sys.exit(main())
