"""The build script, run with a stand-in for the container engine that writes down what it was asked."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docker" / "build-and-push-finetuning-image.sh"

Build = Callable[..., tuple[subprocess.CompletedProcess[str], list[list[str]]]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Runs the script; returns its result and the engine's command lines, which fail where they hold `fails_at`."""
    log = tmp_path / "log"
    engine = tmp_path / "engine"
    engine.write_text(
        f'#!/usr/bin/env bash\nprintf "%q " "$@" >> {log}; echo >> {log}\n[[ -z $FAILS_AT || "$*" != *"$FAILS_AT"* ]]\n'
    )
    engine.chmod(0o755)

    def run(*arguments: str, fails_at: str = "") -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        log.write_text("")
        environment = os.environ | {"DOCKER": str(engine), "FAILS_AT": fails_at}
        result = subprocess.run(
            [str(SCRIPT), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return result, [shlex.split(line) for line in log.read_text().splitlines()]

    return run


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_base_then_worker_then_pushes(build: Build, platform: str) -> None:
    result, calls = build(platform, "--registry", "registry.example.com/team/", "--tag", "v1", "--push")
    assert result.returncode == 0, result.stderr
    base, worker = (f"registry.example.com/team/{platform}-finetuning-{kind}:v1" for kind in ("base", "worker"))
    assert [call[0] for call in calls] == ["build", "build", "push", "push"]
    assert calls[0][calls[0].index("--tag") + 1] == base
    assert calls[1][calls[1].index("--tag") + 1] == worker
    assert f"BASE_IMAGE={base}" in calls[1]
    assert [call[1] for call in calls[2:]] == [base, worker]
    for call, kind in zip(calls, ("base", "worker"), strict=False):
        assert Path(call[call.index("--file") + 1]).samefile(ROOT / "docker" / platform / f"{kind}.Dockerfile")
        assert Path(call[-1]).samefile(ROOT)


def test_nothing_is_pushed_unless_asked_and_nothing_runs_in_a_dry_run(build: Build) -> None:
    _, calls = build("cuda", "--tag", "v1", "--extras", "otlp,liger", "--vendor-image", "torch:mine")
    assert [call[0] for call in calls] == ["build", "build"]
    assert "VENDOR_IMAGE=torch:mine" in calls[0]
    assert "EXTRAS=[otlp,liger]" in calls[1]

    result, calls = build("cuda", "--tag", "v1", "--registry", "r", "--push", "--dry-run")
    assert calls == []
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["build", "build", "push", "push"]


def test_a_failed_build_stops_before_anything_is_pushed(build: Build) -> None:
    result, calls = build("cuda", "--tag", "v1", "--registry", "r", "--push", fails_at="worker.Dockerfile")
    assert result.returncode != 0
    assert [call[0] for call in calls] == ["build", "build"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which platform? cuda or rocm"),
        (["tpu"], "unknown argument tpu"),
        (["cuda", "rocm"], "one platform at a time"),
        (["cuda", "--push"], "--push needs --registry"),
        (["cuda", "--tag"], "--tag needs a value"),
    ],
)
def test_a_wrong_command_line_is_refused(build: Build, arguments: list[str], message: str) -> None:
    result, calls = build(*arguments)
    assert (result.returncode, calls) == (2, [])
    assert message in result.stderr
