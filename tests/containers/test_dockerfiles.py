"""The Dockerfiles, read as text: no container engine runs here."""

from __future__ import annotations

import os
import re
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted(ROOT.glob("docker/*/*.Dockerfile"))
BASES = [path for path in DOCKERFILES if path.name == "base.Dockerfile"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "docker"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, continuation lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def values_of(path: Path, name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions(path) if instruction == name]


def in_context(path: str, ignore: list[str]) -> bool:
    """Whether a container engine sends this file: the last pattern that matches it, or a parent of it, decides."""
    included = True
    parts = PurePosixPath(path).parts
    ancestors = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    for pattern in ignore:
        bare = pattern.removeprefix("!")
        if bare.startswith("**/"):
            matches = any(fnmatchcase(part, bare[3:]) for part in parts)
        else:
            matches = any(
                len(ancestor.split("/")) == len(bare.split("/")) and fnmatchcase(ancestor, bare)
                for ancestor in ancestors
            )
        if matches:
            included = pattern.startswith("!")
    return included


@pytest.fixture(scope="module")
def context() -> list[str]:
    """The files of the working tree that a build sends."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignore = [line for line in lines if line and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for path in listed.stdout.splitlines() if in_context(path, ignore)]


def test_there_are_two_images_for_each_platform() -> None:
    result = {str(path.relative_to(ROOT / "docker")) for path in DOCKERFILES}
    assert result == {f"{platform}/{kind}.Dockerfile" for platform in ("cuda", "rocm") for kind in ("base", "worker")}


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_the_image_does_not_run_as_root(path: Path) -> None:
    # A number, for Kubernetes' runAsNonRoot. With a group behind it, the engine would leave out all other groups.
    assert values_of(path, "USER")[-1] == "1000"


@pytest.mark.parametrize("path", BASES, ids=name_of)
def test_the_vendor_image_is_pinned_by_digest(path: Path) -> None:
    vendor, client = sorted((value for value in values_of(path, "ARG") if "_IMAGE=" in value), reverse=True)
    assert re.fullmatch(r"VENDOR_IMAGE=(pytorch|rocm)/pytorch:\S+@sha256:[0-9a-f]{64}", vendor)
    assert re.fullmatch(r"MC_IMAGE=quay\.io/minio/mc:\S+@sha256:[0-9a-f]{64}", client)
    assert values_of(path, "FROM") == ["${MC_IMAGE} AS mc", "${VENDOR_IMAGE}"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_what_is_copied_is_in_the_context(path: Path, context: list[str]) -> None:
    copied = [arguments for arguments in values_of(path, "COPY") if not arguments.startswith("--from=")]
    sources = [source for arguments in copied for source in arguments.split()[:-1]]
    assert sources
    for source in sources:
        name = source.removeprefix("./")
        assert any(file == name or file.startswith(f"{name}/") for file in context), f"{name} is not in the context"


def test_the_context_is_small_and_holds_nothing_else(context: list[str]) -> None:
    allowed = {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "docker", "src"}
    assert {file.split("/")[0] for file in context} <= allowed
    assert sum((ROOT / file).stat().st_size for file in context if (ROOT / file).is_file()) < 5_000_000


def test_an_ignored_file_would_be_noticed() -> None:
    ignore = ["*", "!src", "**/__pycache__"]
    assert in_context("src/finetuning/errors.py", ignore)
    assert not in_context("src/finetuning/__pycache__/errors.pyc", ignore)
    assert not in_context("docs/index.md", ignore)


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_every_install_is_held_to_the_vendor_and_checked(path: Path) -> None:
    installs = [run for run in values_of(path, "RUN") if "pip install" in run]
    assert installs
    for run in installs:
        pin, install, check = (run.index(step) for step in ("torch.py pin", "pip install", "torch.py check"))
        assert pin < install < check
        assert run.count("pip install") == run.count("--constraint pins.txt") == 1


@pytest.mark.parametrize("path", BASES, ids=name_of)
def test_the_base_image_installs_what_the_package_needs_and_not_torch(path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {re.split(r"[<>=!~;\[ ]", line)[0] for line in project["project"]["dependencies"]}
    (run,) = values_of(path, "RUN")[:1]
    installed = set(run.split("--constraint pins.txt")[1].split("&&")[0].split())
    build = {re.split(r"[<>=!~;\[ ]", line)[0] for line in project["build-system"]["requires"]}
    assert installed == (needed - {"torch"}) | build


@pytest.mark.parametrize("path", BASES, ids=name_of)
def test_nothing_phones_home_and_caches_can_be_mounted(path: Path) -> None:
    environment = dict(pair.split("=", 1) for line in values_of(path, "ENV") for pair in line.split())
    expected = {"HF_HUB_DISABLE_TELEMETRY": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "USE_HUB_KERNELS": "0"}
    assert expected.items() <= environment.items()
    for name in ("HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME"):
        assert environment[name].startswith("/cache"), name


def test_the_two_platforms_differ_only_where_they_must() -> None:
    """A change of one platform's file that was forgotten in the other's shows here."""

    def neutral(path: Path) -> list[tuple[str, str]]:
        text = [(name, re.sub(r"cuda|rocm|hip|NVIDIA|AMD", "X", arguments)) for name, arguments in instructions(path)]
        return [line for line in text if not line[1].startswith("VENDOR_IMAGE=")]

    for kind in ("base", "worker"):
        cuda, rocm = (neutral(ROOT / "docker" / platform / f"{kind}.Dockerfile") for platform in ("cuda", "rocm"))
        assert cuda == rocm


@pytest.mark.parametrize("path", BASES, ids=name_of)
def test_the_base_image_has_what_the_silogen_engines_chart_calls(path: Path) -> None:
    assert "--from=mc /usr/bin/mc /usr/local/bin/mc" in values_of(path, "COPY")
    assert any("procps" in run for run in values_of(path, "RUN")), "the chart calls ps"
    worker = path.with_name("worker.Dockerfile")
    assert 'EXTRAS="[deepspeed,tensorboard]"' in values_of(worker, "ARG")


CHECKS = """
set -eu
finetuning() { setpriv --reuid 1000 --regid 0 --init-groups "$@"; }
test "$(id --user finetuning):$(id --group finetuning)" = 1000:0
for group in video render; do id --groups --name finetuning | grep --word-regexp --quiet "$group"; done
for folder in /HF_HOME /cache /workspace /workdir/logs /local_resources; do finetuning touch "$folder/file"; done
mkdir /seed && touch /seed/of-the-mount && mount --bind /seed /HF_HOME
test -e "$HF_HOME/of-the-mount"
mkdir /workdir/checkpoints && mount --bind /seed /workdir/checkpoints
cd "$WORKDIR" && test -e ./checkpoints/of-the-mount && test -e ./logs/file
"""
"""A mount at /HF_HOME, as the Silogen engine's documents have it, is what HF_HOME names; one at /workdir/checkpoints,
as its chart has it, is ./checkpoints."""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount and to change the root folder")
@pytest.mark.parametrize("has_user_1000", [True, False])
@pytest.mark.parametrize("path", BASES, ids=name_of)
def test_users_and_folders_of_the_image(path: Path, has_user_1000: bool, tmp_path: Path) -> None:
    """The instructions run on a root folder of their own, with this machine's programs."""
    root = tmp_path / "root"
    etc = root / "etc"
    etc.mkdir(parents=True)
    user = "ubuntu:x:1000:1000::/home/finetuning:/bin/bash\n" if has_user_1000 else ""
    (etc / "passwd").write_text(f"root:x:0:0:root:/:/bin/bash\n{user}")
    (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n" + ("ubuntu:!:19000:0:99999:7:::\n" if user else ""))
    (etc / "group").write_text("root:x:0:\nvideo:x:44:\n" + ("ubuntu:x:1000:\n" if user else ""))
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\n")
    runs = [run for run in values_of(path, "RUN") if "useradd" in run or "/HF_HOME" in run]
    assert len(runs) == 2
    environment = dict(pair.split("=", 1) for line in values_of(path, "ENV") for pair in line.split())
    [workdir] = values_of(path.with_name("worker.Dockerfile"), "WORKDIR")[-1:]
    shared = [name for name in ("bin", "sbin", "lib", "lib32", "lib64", "usr", "dev") if Path("/", name).exists()]
    mounts = [f"mkdir -p {root}/{name} && mount --rbind /{name} {root}/{name}" for name in shared]
    script = tmp_path / "steps.sh"
    script.write_text("\n".join(["set -eu", *mounts, f"chroot {root} /bin/bash -euo pipefail /steps"]))
    (root / "steps").write_text(
        "\n".join([*runs, f"export HF_HOME={environment['HF_HOME']} WORKDIR={workdir}", CHECKS])
    )
    result = subprocess.run(
        ["unshare", "--mount", "bash", str(script)],
        capture_output=True, text=True, check=False, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )  # fmt: skip
    if "unshare failed" in result.stderr:
        pytest.skip("this machine lets nobody mount")
    assert result.returncode == 0, result.stderr
