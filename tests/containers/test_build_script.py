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

    def run(
        *arguments: str, fails_at: str = "", script: str = SCRIPT.name
    ) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        log.write_text("")
        environment = os.environ | {"DOCKER": str(engine), "FAILS_AT": fails_at}
        result = subprocess.run(
            [str(SCRIPT.with_name(script)), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return result, [shlex.split(line) for line in log.read_text().splitlines()]

    return run


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_base_then_worker_then_pushes(build: Build, platform: str) -> None:
    result, calls = build(platform, "--registry", "registry.example.com/team/", "--tag", "v1", "--push")
    assert result.returncode == 0, result.stderr
    base, worker = (f"registry.example.com/team/{platform}-finetuning-{kind}:v1" for kind in ("base", "worker"))
    aliases = [name.replace("-finetuning-", "-silogen-finetuning-") for name in (base, worker)]
    assert [call[0] for call in calls] == ["build"] * 2 + ["push"] * 4
    assert [aliases[index] in call for index, call in enumerate(calls[:2])] == [True, True]
    assert calls[0][calls[0].index("--tag") + 1] == base
    assert calls[1][calls[1].index("--tag") + 1] == worker
    assert f"BASE_IMAGE={base}" in calls[1]
    assert [call[1] for call in calls[2:]] == [base, worker, *aliases]
    for call, kind in zip(calls[:2], ("base", "worker"), strict=True):
        assert Path(call[call.index("--file") + 1]).samefile(ROOT / "docker" / platform / f"{kind}.Dockerfile")
        assert Path(call[-1]).samefile(ROOT)


def test_nothing_is_pushed_unless_asked_and_nothing_runs_in_a_dry_run(build: Build) -> None:
    _, calls = build("cuda", "--tag", "v1", "--extras", "otlp,liger", "--vendor-image", "torch:mine")
    assert [call[0] for call in calls] == ["build", "build"]
    assert "VENDOR_IMAGE=torch:mine" in calls[0]
    assert "EXTRAS=[deepspeed,tensorboard,otlp,liger]" in calls[1]

    result, calls = build("cuda", "--tag", "v1", "--registry", "r", "--push", "--dry-run")
    assert calls == []
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["build"] * 2 + ["push"] * 4


@pytest.mark.parametrize(
    ("environment", "pushed"),
    [({"REGISTRY": "my/registry"}, True), ({"REGISTRY": "my/registry", "SKIP_PUSH": "true"}, False), ({}, False)],
)
def test_the_silogen_engines_command_line_works(
    build: Build, environment: dict[str, str], pushed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`REGISTRY=… build-and-push-silogen-finetuning-image.sh PLATFORM TAG`."""
    monkeypatch.delenv("REGISTRY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result, calls = build("rocm", "v0.3", script="build-and-push-silogen-finetuning-image.sh")
    assert result.returncode == 0, result.stderr
    prefix = "my/registry/" if environment else ""
    assert f"{prefix}rocm-silogen-finetuning-worker:v0.3" in calls[1]
    assert [call[1] for call in calls if call[0] == "push"] == (
        [f"{prefix}rocm-{name}finetuning-{kind}:v0.3" for name in ("", "silogen-") for kind in ("base", "worker")]
        if pushed
        else []
    )


def test_a_failed_build_stops_before_anything_is_pushed(build: Build) -> None:
    result, calls = build("cuda", "--tag", "v1", "--registry", "r", "--push", fails_at="worker.Dockerfile")
    assert result.returncode != 0
    assert [call[0] for call in calls] == ["build", "build"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which platform? cuda or rocm"),
        (["tpu"], "unknown argument tpu"),
        (["cuda", "v1", "v2"], "two tags: v1 and v2"),
        (["cuda", "--tags"], "unknown option --tags"),
        (["cuda", "rocm"], "one platform at a time"),
        (["cuda", "--push"], "--push needs --registry"),
        (["cuda", "--tag"], "--tag needs a value"),
    ],
)
def test_a_wrong_command_line_is_refused(build: Build, arguments: list[str], message: str) -> None:
    result, calls = build(*arguments)
    assert (result.returncode, calls) == (2, [])
    assert message in result.stderr
