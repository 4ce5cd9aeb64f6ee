"""One of two processes that evaluate the same rules: it writes the actions it ran as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import TrainerControl, TrainerState

from finetuning.callbacks.controller.callback import make_controllers
from finetuning.callbacks.controller.metrics import Event
from finetuning.config.sections.controller import TrainerController

SECTION = {
    "controller_metrics": [{"name": "process", "class": "PerProcessState"}],
    "operations": [
        {"name": "say", "class": "LogControl", "arguments": {"log_format": "{process[rank]}", "log_level": "info"}}
    ],
    "controllers": [
        {
            "name": "stop",
            "triggers": ["on_log"],
            "rule": "process.rank == 1",
            "operations": ["hfcontrols.should_training_stop"],
            "patience": {"patience_threshold": 1},
        },
        {"name": "talk", "triggers": ["on_log"], "rule": "process.rank == 0", "operations": ["say.should_log"]},
    ],
}


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    args = SimpleNamespace(world_size=2, device=torch.device("cpu"), process_index=rank)
    controllers = make_controllers(TrainerController.model_validate(SECTION))
    control, stops = TrainerControl(), []
    controllers.handle(Event("on_init_end", args, TrainerState(), control))
    for step in (1, 2, 3):
        controllers.handle(Event("on_log", args, TrainerState(global_step=step), control))
        stops.append(control.should_training_stop)
    result = {"stops": stops, "talked": sum(action.controller == "talk" for action in controllers.actions)}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
