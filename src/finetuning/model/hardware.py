"""Detect the hardware of this machine: devices, the dtypes they support, memory and disk space.

Dtype support is probed with a small matrix product: the properties that a driver reports are not always true.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetuning.errors import ConfigError, Location

DEVICES = Path("/dev")
_PLACED_BY_SIZE = (None, "auto", "balanced", "balanced_low_0", "sequential", "disk")


@dataclass(frozen=True)
class DtypeSupport:
    """Whether a device supports a dtype for training, and why not."""

    name: str
    is_supported: bool
    note: str = ""
    """The reason it is not supported, or a remark on its speed."""

    def __str__(self) -> str:
        return f"{self.name} {'yes' if self.is_supported else 'no'}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Device:
    """A device that torch can use. Sizes in bytes."""

    name: str
    kind: str
    """Device type in torch: `cpu`, `cuda` (ROCm too) or `mps`."""
    memory: int | None
    free: int | None
    dtypes: tuple[DtypeSupport, ...]
    capability: tuple[int, int] | None = None
    """Compute capability of an NVIDIA GPU; None for any other device."""

    def support_for(self, name: str) -> DtypeSupport:
        """Return the support for `bf16`, `fp16` or `tf32`."""
        return next(support for support in self.dtypes if support.name == name)


@dataclass(frozen=True)
class Hardware:
    """The devices, torch's build, memory and disk space. Sizes in bytes."""

    python: str
    torch: str
    build: str
    """The backend torch was built for, such as `CUDA 12.8`, `ROCm 7.0` or `CPU`."""
    cores: int
    memory: int | None
    free: int | None
    disk_free: int
    devices: tuple[Device, ...]


def detect_hardware(folder: Path) -> Hardware:
    """Return the hardware of this machine: accelerators first, the CPU last; disk space is that of `folder`'s disk."""
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
        disk_free=shutil.disk_usage(_nearest_existing(folder)).free,
        devices=(*accelerators, cpu),
    )


def training_device(use_cpu: bool) -> Device:
    """Return the device that this process trains on, by the same order as the trainer: CUDA or ROCm, MPS, CPU."""
    if not use_cpu and _has_cuda_api():
        return _accelerator(torch.cuda.current_device())
    if not use_cpu and torch.backends.mps.is_available():
        return _describe("Apple GPU", torch.device("mps"), None, None)
    return _describe(platform.processor() or platform.machine(), torch.device("cpu"), None, None)


def explain_missing_gpu() -> str | None:
    """Return why a build of torch for GPUs sees none, as far as it is known; None if it sees one, or is for CPUs."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip and f"ROCm {torch.version.hip}"
    if not build or _has_cuda_api():
        return None
    return f"torch is built for {build} but sees no GPU: {_why_no_gpu(bool(torch.version.hip))}"


def _why_no_gpu(is_rocm: bool) -> str:
    hiding = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    for name in hiding if is_rocm else hiding[-1:]:
        if os.environ.get(name) in ("", "-1"):
            return f"{name} hides all of them"
    if not is_rocm:
        if not list(DEVICES.glob("nvidia[0-9]*")):
            return "there is no /dev/nvidia0. Start the container with --gpus all, or check the driver"
        return "the driver may be too old for it; nvidia-smi shows up to which CUDA release it works"
    devices = [DEVICES / "kfd", *sorted(DEVICES.glob("dri/renderD*"))]
    if not devices[0].exists() or len(devices) == 1:
        return "there is no /dev/kfd or no /dev/dri. Start the container with --device /dev/kfd --device /dev/dri"
    for device in devices:
        if not os.access(device, os.R_OK | os.W_OK):
            group = device.stat().st_gid
            return (
                f"user {os.getuid()} may not open {device}, which belongs to group {group}. Start the container with"
                f" --group-add {group}"
            )
    return "rocminfo shows what the driver reports"


def _has_cuda_api() -> bool:
    """Whether torch.cuda works: for AMD GPUs too, as ROCm builds of torch use the same API."""
    return torch.cuda.is_available()


def _accelerator(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return _describe(properties.name, torch.device("cuda", index), total, free)


def _describe(name: str, device: torch.device, memory: int | None, free: int | None) -> Device:
    dtypes = (_bf16(device), _fp16(device), _tf32(device))
    has_capability = device.type == "cuda" and not torch.version.hip
    capability = torch.cuda.get_device_capability(device) if has_capability else None
    return Device(name, device.type, memory, free, dtypes, capability)


def _matmul_error(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a matrix product in this dtype fails on the device; None if its result is correct."""
    try:
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        is_correct = float((ones @ ones)[0, 0]) == 16.0
    except (RuntimeError, TypeError) as error:
        return str(error).splitlines()[0]
    return None if is_correct else "a matrix product gives a wrong result"


def _bf16(device: torch.device) -> DtypeSupport:
    if error := _matmul_error(torch.bfloat16, device):
        return DtypeSupport("bf16", False, error)
    # torch computes bf16 on older GPUs by emulation, which is slower than float32.
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return DtypeSupport("bf16", False, "only emulated")
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        is_native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
        return DtypeSupport("bf16", True, "in hardware" if is_native else "emulated, slower than float32")
    return DtypeSupport("bf16", True)


def _fp16(device: torch.device) -> DtypeSupport:
    if device.type == "cpu":
        return DtypeSupport("fp16", False, "loss scaling needs an accelerator")
    error = _matmul_error(torch.float16, device)
    return DtypeSupport("fp16", error is None, error or "")


def _tf32(device: torch.device) -> DtypeSupport:
    if device.type != "cuda" or torch.version.hip:
        return DtypeSupport("tf32", False, "only NVIDIA GPUs have it")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:  # Ampere is the first generation with TF32 tensor cores.
        return DtypeSupport("tf32", False, f"needs compute capability 8.0, this device has {major}.{minor}")
    return DtypeSupport("tf32", True)


def _build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _system_memory() -> tuple[int | None, int | None]:
    """Return total and available main memory in bytes, within the container's limit; None outside of Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None, None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = sizes.get("MemTotal"), sizes.get("MemAvailable")
    # /proc/meminfo shows the host. A container is limited by its cgroup (v2).
    limit, used = (_read_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if total is None or free is None or limit is None or limit >= total:
        return total, free
    return limit, min(free, limit - (used or 0))


def _read_number(file: Path) -> int | None:
    """Return the number in a cgroup file; None if the file does not exist or says `max` (no limit)."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _nearest_existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_device_map(device_map: str | Mapping[str, int | str] | None, location: Location) -> None:
    """Raise ConfigError if a device in the map does not exist on this machine."""
    for device in device_map.values() if isinstance(device_map, Mapping) else [device_map]:
        if device in _PLACED_BY_SIZE:
            continue
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"cannot use {device!r}: {' '.join(str(error).splitlines()[:2])}",
                location=location,
                hint="Use cpu, auto, or a device of this machine, such as cuda:0.",
            ) from error
