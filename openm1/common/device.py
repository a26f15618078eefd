"""Which device and number type, and how fast fp32 products may be. Nothing is chosen at import."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

# float16 is left out: a lightning head's output is not normalised before it is rounded, and can
# pass 65,504, the largest float16.
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

# An fp32 product of this size has a relative error of 2e-7 to 5e-7, one that rounds its inputs to
# bf16 of 2e-3.
PROBE_SIZE = 256
PROBE_MAX_ERROR = 1e-6
PROBE_REPEATS = 20
# Two timings of the same thing differ by a few percent.
TIMING_SLACK = 1.05

# Limit and use of memory, of control groups version 2 and 1.
CONTROL_GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """The type called `name`; raises ValueError for one the model does not compute in."""
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise ValueError(f"dtype is {name!r}; allowed are {', '.join(DTYPES)}")
    return dtype


def default_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def available_memory_bytes(device: torch.device) -> int:
    """What a process may still take: on the CPU without swapping, and within its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _meminfo_available()
    if free is None:
        # Systems other than Linux tell only how much there is in all.
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in CONTROL_GROUP_FILES:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            # No control group of this kind, or one without a limit ("max").
            continue
    return max(free, 0)


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:")), None)


def enable_fast_fp32_matmul() -> str:
    """Sets, for the whole process, the fastest fp32 product that is still fp32; returns its name.

    "medium" doubles the speed of some CPUs at no loss, and on others (those with bf16 tiles)
    rounds inputs to bf16 without a word, so each setting is measured here before it is kept:
    "medium", then "high", else "highest".
    """
    devices = list(dict.fromkeys([torch.device("cpu"), default_device()]))
    torch.set_float32_matmul_precision("highest")
    baseline = [_probe(device)[1] for device in devices]
    for setting in ("medium", "high"):
        torch.set_float32_matmul_precision(setting)
        probes = [_probe(device) for device in devices]
        if all(
            error < PROBE_MAX_ERROR and seconds <= TIMING_SLACK * before
            for (error, seconds), before in zip(probes, baseline, strict=True)
        ):
            return setting
    torch.set_float32_matmul_precision("highest")
    return "highest"


def _probe(device: torch.device) -> tuple[float, float]:
    """Relative error against fp64, and best seconds, of one fp32 product as now set."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, PROBE_SIZE, PROBE_SIZE)
    exact_a, exact_b = torch.randn(shape, generator=generator).double()
    a, b = exact_a.float().to(device), exact_b.float().to(device)
    exact = exact_a @ exact_b
    seconds = []
    product = a @ b
    for _ in range(PROBE_REPEATS):
        start = time.perf_counter()
        product = a @ b
        # Reading one number back waits for a device that computes on its own.
        product[0, 0].item()
        seconds.append(time.perf_counter() - start)
    error = (product.double().cpu() - exact).norm() / exact.norm()
    return float(error), min(seconds)
