"""What a run suggests at its end works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.training.final import Artifact
from finetuning.training.observer import next_commands


@pytest.mark.parametrize(
    ("quantisation", "suggested"),
    [
        (None, "merge_adapter {base} /out/a /out/a-merged"),
        ({"quant_method": "bitsandbytes"}, "merge_adapter {base} /out/a /out/a-merged"),
        ({"quant_method": "gptq"}, "merge_adapter --force UNQUANTISED_BASE /out/a /out/a-merged"),
    ],
)
def test_an_adapter_is_merged_into_a_base_that_takes_it(
    tmp_path: Path, quantisation: dict[str, Any] | None, suggested: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantisation} if quantisation else {}))
    artifact = Artifact("adapter", "/out/a", str(tmp_path), 1, (), "stops")
    commands = [one.command for one in next_commands(artifact)]
    assert suggested.format(base=tmp_path) in commands
