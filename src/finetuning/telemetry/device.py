"""What a device can do at most, and how much of its memory was used."""

from __future__ import annotations

import re
import resource
import sys
from typing import Any

# Dense TFLOP/s in bfloat16 or float16 with float32 accumulation, from the vendors' data sheets. The first pattern that
# is found in the device's name counts. No sparsity, no boost beyond the sheet.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 2250.0),
    (r"\bGH200\b", 989.4),
    (r"\bH200\b(?!.*NVL)", 989.4),
    (r"\bH100\b.*NVL", 835.0),
    (r"\bH100\b.*PCIe", 756.0),
    (r"\bH100\b", 989.4),
    (r"\bA100\b", 312.0),
    (r"\bA30\b", 165.0),
    (r"\bA40\b", 149.7),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.05),
    (r"\bL40\b", 181.05),
    (r"\bL4\b", 121.0),
    (r"\bMI325X\b", 1307.4),
    (r"\bMI300X\b", 1307.4),
    # A device is one of the two dies of a card.
    (r"\bMI250X\b", 191.5),
    (r"\bMI250\b", 181.05),
    (r"\bMI210\b", 181.0),
)


def peak_tflops(name: str) -> float | None:
    """Peak dense TFLOP/s of a device in 16 bit; None for one that is not known.

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("NVIDIA GeForce RTX 9999")
    (989.4, None)
    """
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, name)), None)


def device_name(device: Any) -> str:
    """The name of a torch device's hardware; `cpu` for a processor."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: Any) -> dict[str, int]:
    """The most bytes that were in use at once since the job began, by attribute name: of the device, if it is a GPU,
    and of this process on the host."""
    import torch

    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    told = {"peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        told["peak_memory_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        told["peak_memory_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        told["memory_total_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return told
