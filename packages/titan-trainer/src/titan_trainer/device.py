"""Peak FLOP/s of a device and peak memory of this process."""

from __future__ import annotations

import resource

import torch

GIB = 1024**3

# Dense bf16 peak of the tensor cores in FLOP/s, without sparsity, from the vendors' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bf16 peak in FLOP/s; None if it is unknown (a CPU, an unlisted GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if all(part in name for part in key.split())), None)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: the allocator's on an accelerator, the resident set on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return torch.accelerator.max_memory_allocated(device) / GIB
