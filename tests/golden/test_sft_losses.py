"""SFT runs log the committed losses and save the committed weights, bit for bit.

Two files, so that pytest-xdist can run them side by side; `test_preference_losses.py` is the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden.golden_runs import SFT_CASES, differences, run_case


@pytest.mark.parametrize("case", SFT_CASES)
def test_losses_and_weights_are_bit_identical(
    case: str, golden_inputs: Path, golden_values: dict[str, Any], run_portably: Any
) -> None:
    assert differences(run_case(case, golden_inputs, run_portably), golden_values[case]) == []
