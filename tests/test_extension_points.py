"""An algorithm, a row format, a tracker and a PEFT option are added by one file each and at most four edits.

The edits are applied to a copy of the package, which then trains with all four at once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import finetuning

PACKAGE = Path(finetuning.__file__).parent
MAX_EDITS = 4


@dataclass(frozen=True)
class Extension:
    """Files of its own, and edits by hand: file, text to insert before, inserted text."""

    files: dict[str, str] = field(default_factory=dict)
    edits: list[tuple[str, str, str]] = field(default_factory=list)


ALGORITHM = Extension(
    files={
        "algorithms/dummy.py": '''
"""An algorithm that trains like sft, on half the loss."""

from dataclasses import replace

from finetuning.algorithms import sft
from finetuning.config.sections.experiment import DummyExperiment


def build_trainer(inputs):
    trainer = sft.build_trainer(inputs)
    base = type(trainer)

    class DummyTrainer(base):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * self.args_scale

    trainer.__class__ = DummyTrainer
    trainer.args_scale = inputs.experiment.dummy_scale
    return trainer


ALGORITHM = replace(sft.ALGORITHM, title="a dummy", experiment=DummyExperiment, build_trainer=build_trainer)
'''
    },
    edits=[
        (
            "config/sections/experiment.py",
            "EXPERIMENTS: dict",
            'class DummyExperiment(SFTExperiment):\n    """A dummy."""\n\n    method_name: ClassVar[str] = "dummy"\n\n'
            '    training_args: TrainingArgs\n    """Arguments."""\n'
            '    dummy_scale: float = 0.5\n    """A factor."""\n\n\n',
        ),
        ("config/sections/experiment.py", "        CPOExperiment,\n    )", "        DummyExperiment,\n"),
        ("algorithms/__init__.py", "from finetuning.algorithms.algorithm", "from finetuning.algorithms import dummy\n"),
        ("algorithms/__init__.py", '    "cpo": ', '    "dummy": dummy.ALGORITHM,\n'),
    ],
)
ROW_FORMAT = Extension(
    files={
        "data/formats/dummy.py": '''
"""Rows with `q` and `a`."""

from finetuning.data.formats.row_format import DEFAULT_OPTIONS, RowFormat
from finetuning.data.samples import Conversation


def parse(row, options=DEFAULT_OPTIONS):
    question, answer = row.values["q"], row.values["a"]
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], row.location)


DUMMY = RowFormat("dummy", ("q", "a"), parse)
'''
    },
    edits=[
        ("config/sections/data.py", '    PROMPT = "prompt"\n', '    DUMMY = "dummy"\n'),
        (
            "data/formats/__init__.py",
            "from finetuning.data.formats.text",
            "from finetuning.data.formats.dummy import DUMMY\n",
        ),
        ("data/formats/__init__.py", '    "prompt": PROMPT,\n', '    "dummy": DUMMY,\n'),
        ("data/formats/__init__.py", "MESSAGES, TOKENS, SEGMENTS, PROMPT_COMPLETION", "DUMMY, "),
    ],
)
TRACKER = Extension(
    files={
        "tracking/dummy.py": '''
"""A tracker that writes what it gets into a file, by the interface of accelerate's."""

import json
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker


class DummyTracker(GeneralTracker):
    name = "dummy"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)

    def start(self):
        pass

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\\n")


LOGGER_TYPE_TO_CLASS["dummy"] = DummyTracker
'''
    },
    edits=[
        ("config/sections/tracking.py", '    "wandb",\n]', '    "dummy",\n'),
        ("config/sections/tracking.py", '    "wandb": TrackerPackage', '    "dummy": TrackerPackage("json", ""),\n'),
        ("tracking/accelerate_trackers.py", "BACKENDS: dict", "from finetuning.tracking import dummy as dummy\n\n"),
        (
            "tracking/accelerate_trackers.py",
            '    "tensorboard": Backend(',
            '    "dummy": Backend(lambda run, identity: {"path": str(run.output_dir / "dummy.jsonl")}),\n',
        ),
    ],
)
PEFT_OPTION = Extension(
    edits=[
        (
            "config/sections/model.py",
            "    alora_invocation_string: str | None",
            '    rank_doubled: bool = False\n    """Twice the rank."""\n',
        ),
        (
            "model/peft/adapters.py",
            "    try:\n        config = config_class(task_type=conf.task_type",
            '    kwargs["r"] *= 1 + conf.rank_doubled\n',
        ),
    ],
)
EXTENSIONS = {"algorithm": ALGORITHM, "row format": ROW_FORMAT, "tracker": TRACKER, "PEFT option": PEFT_OPTION}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_extension_takes_at_most_four_edits(name: str) -> None:
    assert len(EXTENSIONS[name].edits) <= MAX_EDITS
    for file, anchor, _ in EXTENSIONS[name].edits:
        assert (PACKAGE / file).read_text("utf-8").count(anchor) == 1, f"{file}: {anchor!r} is not there once"


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has all extensions."""
    copy = tmp_path / "src" / "finetuning"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for extension in EXTENSIONS.values():
        for name, text in extension.files.items():
            (copy / name).write_text(text.lstrip(), "utf-8")
        for name, anchor, inserted in extension.edits:
            text = (copy / name).read_text("utf-8")
            (copy / name).write_text(text.replace(anchor, inserted + anchor), "utf-8")
    return copy.parent


def test_a_run_uses_all_extensions(
    extended: Path, tmp_path: Path, sft_values: Callable[..., Any], write_config: Callable[..., Path]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{n} + {n}?", "a": str(2 * n)}) + "\n" for n in range(12)))
    lora = {"peft_type": "LORA", "rank_doubled": True, "peft_kwargs": {"r": 2, "target_modules": ["q_proj"]}}
    values = sft_values(
        {
            "data_conf.training_data.datasets": [{"path": str(rows), "format": "dummy"}],
            "peft_conf": lora,
            "tracking": {"trackers": ["dummy"]},
            "dummy_scale": 0.25,
        }
    )
    run = subprocess.run(
        [sys.executable, "-m", "finetuning.cli.main", "dummy", str(write_config(values))],
        env=os.environ | {"PYTHONPATH": str(extended)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    assert (record["method"], record["data"]["statistics"][0]["kept"]) == ("dummy", 12)
    assert json.loads((out / "checkpoint-final" / "adapter_config.json").read_text())["r"] == 4
    logged = [json.loads(line) for line in (out / "dummy.jsonl").read_text().splitlines()]
    assert {entry["step"] for entry in logged if any("loss" in key for key in entry)} == {1, 2, 3}
