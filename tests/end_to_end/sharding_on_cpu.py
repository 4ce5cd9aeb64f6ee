"""`finetuning`, where FSDP2 shares the model out over processes of the CPU.

torch does that with gloo. accelerate knows it, but asks for FSDP on GPUs alone and quietly trains by DDP elsewhere; so
its state reports that the processes have devices of their own while it decides. All else is what a GPU would run.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from finetuning.cli.main import main

_decide = AcceleratorState.__init__


def _decide_as_on_gpus(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    state = PartialState._shared_state
    if not AcceleratorState._shared_state and state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU
    _decide(self, *args, **kwargs)


AcceleratorState.__init__ = _decide_as_on_gpus

if __name__ == "__main__":
    code = main()
    print(f"shared out by FSDP2: {AcceleratorState._shared_state['distributed_type'] == DistributedType.FSDP}")
    sys.exit(code)
