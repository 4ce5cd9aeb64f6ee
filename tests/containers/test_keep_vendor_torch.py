"""The step that keeps the vendor's torch, run for real: pip, a scratch environment, local wheels, no network."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docker" / "keep_vendor_torch.py"
VENDOR_VERSION = "9.9.9+vendor"

Run = Callable[..., subprocess.CompletedProcess[str]]


def build_wheel(folder: Path, name: str, version: str, requires: Sequence[str] = (), build: str = "vendor") -> Path:
    """A wheel with one package of two files; `build` changes its content and not its name."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}/__init__.py": f"BUILD = {build!r}\n",
        f"{name}/version.py": f"__version__ = {version!r}\ncuda = '99.9'\nhip = None\n",
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {requirement}\n" for requirement in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(path, text)
    return wheel


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An environment as a vendor's image brings it: with a torch of its own, and a triton, and little else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "image")], check=True)
    torch = build_wheel(tmp_path / "vendor", "torch", VENDOR_VERSION, requires=["triton==3.0+vendor", "limited<2"])
    triton = build_wheel(tmp_path / "vendor", "triton", "3.0+vendor")
    limited = build_wheel(tmp_path / "vendor", "limited", "1.0")
    python = tmp_path / "image" / "bin" / "python"
    pip(python, tmp_path / "vendor", str(torch), str(triton), str(limited))

    index = tmp_path / "index"
    build_wheel(index, "torch", "10.0", build="index")
    build_wheel(index, "torch", "9.9.9", build="index")
    build_wheel(index, "triton", "4.0", build="index")
    build_wheel(index, "limited", "2.0")
    build_wheel(index, "trainer", "1.0", requires=["torch>=9", "triton"])
    build_wheel(index, "greedy", "1.0", requires=["torch>=10"])
    (tmp_path / "constraints.txt").write_text("# tested\ntorch==10.0\ntriton==4.0\nlimited==2.0\ntrainer==1.0\n")
    return python


def pip(python: Path, links: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--isolated", "--python", str(python), "install", "--no-index"]
    command += ["--disable-pip-version-check", "--find-links", str(links), *arguments]
    # --isolated still reads the site's pip.conf, where a constraint on torch may stand; the null device turns it off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=check)


@pytest.fixture
def step(image: Path) -> Run:
    """Runs one step of the script with the image's own Python."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(image), str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def build_in(image: Path) -> str:
    command = [str(image), "-c", "import torch.version; print(torch.version.__version__, torch.BUILD)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_without_the_step_pip_replaces_the_vendors_torch(image: Path, tmp_path: Path) -> None:
    pip(image, tmp_path / "index", "--constraint", str(tmp_path / "constraints.txt"), "trainer", "torch")
    assert build_in(image) == "10.0 index"


def test_the_vendors_torch_stays(image: Path, step: Run, tmp_path: Path) -> None:
    assert step("record", tmp_path / "state.json", "--build", "cuda").returncode == 0
    pinned = step("pin", tmp_path / "constraints.txt").stdout
    assert pinned.splitlines() == [f"torch=={VENDOR_VERSION}", "triton==3.0+vendor", "trainer==1.0"]

    (tmp_path / "pins.txt").write_text(pinned)
    pip(image, tmp_path / "index", "--constraint", str(tmp_path / "pins.txt"), "trainer", "torch", "limited")
    assert build_in(image) == f"{VENDOR_VERSION} vendor"
    checked = step("check", tmp_path / "state.json")
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_package_that_needs_another_torch_is_refused_and_changes_nothing(
    image: Path, step: Run, tmp_path: Path
) -> None:
    step("record", tmp_path / "state.json", "--build", "cuda")
    (tmp_path / "pins.txt").write_text(step("pin", tmp_path / "constraints.txt").stdout)
    refused = pip(image, tmp_path / "index", "--constraint", str(tmp_path / "pins.txt"), "greedy", check=False)
    assert refused.returncode != 0
    assert f"torch=={VENDOR_VERSION}" in refused.stdout
    assert step("check", tmp_path / "state.json").returncode == 0


@pytest.mark.parametrize("version", ["10.0", "9.9.9"])
def test_a_replaced_torch_is_noticed(image: Path, step: Run, tmp_path: Path, version: str) -> None:
    step("record", tmp_path / "state.json", "--build", "cuda")
    pip(image, tmp_path / "index", f"torch=={version}", "--force-reinstall", "--no-deps")
    checked = step("check", tmp_path / "state.json")
    assert checked.returncode == 1
    assert f"torch: version was {VENDOR_VERSION}, is {build_in(image).split()[0]}" in checked.stderr


def test_another_build_of_the_same_version_is_noticed(image: Path, step: Run, tmp_path: Path) -> None:
    step("record", tmp_path / "state.json", "--build", "cuda")
    rebuilt = build_wheel(tmp_path / "rebuilt", "torch", VENDOR_VERSION, build="index")
    pip(image, tmp_path / "index", str(rebuilt), "--force-reinstall", "--no-deps")
    checked = step("check", tmp_path / "state.json")
    assert checked.returncode == 1
    assert "torch: record_sha256 was" in checked.stderr


def test_an_overwritten_and_a_removed_file_are_noticed(image: Path, step: Run, tmp_path: Path) -> None:
    step("record", tmp_path / "state.json", "--build", "cuda")
    (package,) = tmp_path.glob("image/lib/*/site-packages/torch")
    (package / "__init__.py").write_text("BUILD = 'somebody else'\n")
    (package.parent / "triton" / "__init__.py").unlink()
    checked = step("check", tmp_path / "state.json")
    assert checked.returncode == 1
    assert f"torch: {package / '__init__.py'} is missing or was overwritten" in checked.stderr
    assert "triton/__init__.py is missing or was overwritten" in checked.stderr


def test_the_wrong_kind_of_build_and_no_torch_are_refused(image: Path, step: Run, tmp_path: Path) -> None:
    wrong = step("record", tmp_path / "state.json", "--build", "hip")
    assert wrong.returncode == 1
    assert "torch is a cuda 99.9 build, this image needs hip" in wrong.stderr
    assert not (tmp_path / "state.json").exists()

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    bare = tmp_path / "bare" / "bin" / "python"
    command = [str(bare), str(SCRIPT), "pin", str(tmp_path / "constraints.txt")]
    empty = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (empty.returncode, empty.stdout) == (1, "")
    assert "no torch is installed here" in empty.stderr
