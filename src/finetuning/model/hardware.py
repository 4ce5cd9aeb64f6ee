"""What this machine can compute with, found out by trying: devices, number types, memory."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Capability:
    """Whether something can be done here, and how that is known or what is in the way."""

    name: str
    ok: bool
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} {'yes' if self.ok else 'no'}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Device:
    """One device that torch can use: its bytes of memory, and what it computes in."""

    name: str
    kind: str
    """`cpu`, or the kind of accelerator as torch names it."""
    memory: int | None
    free: int | None
    abilities: tuple[Capability, ...]
    capability: tuple[int, int] | None = None
    """Compute capability of NVIDIA's GPUs; None for all else."""

    def can(self, name: str) -> Capability:
        """The ability of this name."""
        return next(ability for ability in self.abilities if ability.name == name)


@dataclass(frozen=True)
class Hardware:
    """The devices, torch's build, and the room there is. Sizes in bytes."""

    python: str
    torch: str
    build: str
    """What torch was built for, such as `CUDA 12.8`, `ROCm 7.0` or `CPU`."""
    cores: int
    memory: int | None
    free: int | None
    disk_free: int
    devices: tuple[Device, ...]


def detect_hardware(folder: Path) -> Hardware:
    """This machine, with the disk that `folder` is on; the accelerators first, the CPU last."""
    memory, free = _system_memory()
    accelerators = [_accelerator(index) for index in range(torch.cuda.device_count())] if _has_cuda_api() else []
    if torch.backends.mps.is_available():
        accelerators.append(_describe("Apple GPU", torch.device("mps"), None, None))
    cpu = _describe(platform.processor() or platform.machine(), torch.device("cpu"), memory, free)
    return Hardware(
        python=platform.python_version(),
        torch=torch.__version__,
        build=_build(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=memory,
        free=free,
        disk_free=shutil.disk_usage(_existing(folder)).free,
        devices=(*accelerators, cpu),
    )


def training_device(use_cpu: bool) -> Device:
    """The device that a run computes on, as the trainer chooses it."""
    if not use_cpu and _has_cuda_api():
        return _accelerator(torch.cuda.current_device())
    if not use_cpu and torch.backends.mps.is_available():
        return _describe("Apple GPU", torch.device("mps"), None, None)
    return _describe(platform.processor() or platform.machine(), torch.device("cpu"), None, None)


def _has_cuda_api() -> bool:
    """True for NVIDIA and AMD alike: torch's ROCm build answers by the same name."""
    return torch.cuda.is_available()


def _accelerator(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return _describe(properties.name, torch.device("cuda", index), total, free)


def _describe(name: str, device: torch.device, memory: int | None, free: int | None) -> Device:
    abilities = (_bf16(device), _fp16(device), _tf32(device))
    has_capability = device.type == "cuda" and not torch.version.hip
    capability = torch.cuda.get_device_capability(device) if has_capability else None
    return Device(name, device.type, memory, free, abilities, capability)


def _multiplies(dtype: torch.dtype, device: torch.device) -> str | None:
    """None when a product of this type comes out right; else what is in the way."""
    try:
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        right = float((ones @ ones)[0, 0]) == 16.0
    except (RuntimeError, TypeError) as error:
        return str(error).splitlines()[0]
    return None if right else "a product comes out wrong"


def _bf16(device: torch.device) -> Capability:
    if trouble := _multiplies(torch.bfloat16, device):
        return Capability("bf16", False, trouble)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Capability("bf16", False, "only emulated")
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        fast = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
        return Capability("bf16", True, "in hardware" if fast else "emulated, slower than float32")
    return Capability("bf16", True)


def _fp16(device: torch.device) -> Capability:
    if device.type == "cpu":
        return Capability("fp16", False, "loss scaling needs an accelerator")
    trouble = _multiplies(torch.float16, device)
    return Capability("fp16", trouble is None, trouble or "")


def _tf32(device: torch.device) -> Capability:
    if device.type != "cuda" or torch.version.hip:
        return Capability("tf32", False, "a number type of NVIDIA's GPUs")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return Capability("tf32", False, f"needs compute capability 8.0, this is {major}.{minor}")
    return Capability("tf32", True)


def _build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _system_memory() -> tuple[int | None, int | None]:
    """Bytes of main memory and how many are available; None where the system does not say, as it does on Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None, None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = sizes.get("MemTotal"), sizes.get("MemAvailable")
    limit, used = (_number_in(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if total is None or free is None or limit is None or limit >= total:
        return total, free
    return limit, min(free, limit - (used or 0))


def _number_in(file: Path) -> int | None:
    """What a file of a container's limits says; None for no limit."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())
