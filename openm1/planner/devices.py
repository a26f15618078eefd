"""What a device can do at best: data sheets for GPUs, a measurement for the CPU at hand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

PRODUCT_SIZE = 1024
# Most last-level caches hold less.
STREAM_BYTES = 2**28
REPEATS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    name: str
    memory_bytes: int
    """In decimal GB, as it is sold."""
    peak_flops_per_s: float
    """Dense bf16 products; fp32 for the CPU."""
    peak_bytes_per_s: float
    """Of its own memory."""
    usd_per_hour: float | None = None
    """Rent; None where no source is at hand."""


H800_RUN_USD, H800_RUN_DEVICES, H800_RUN_DAYS = 534_700, 512, 21
"""The M1 report's RL run (arXiv 2506.13585, abstract); the only rent that it gives."""

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # Vendor's data sheets: dense rates, SXM boards.
        Device(name="h800", memory_bytes=80 * 10**9, peak_flops_per_s=989.4e12,
               peak_bytes_per_s=3.35e12,
               usd_per_hour=H800_RUN_USD / (H800_RUN_DEVICES * H800_RUN_DAYS * 24)),
        Device(name="h100", memory_bytes=80 * 10**9, peak_flops_per_s=989.4e12,
               peak_bytes_per_s=3.35e12),
        Device(name="h20", memory_bytes=96 * 10**9, peak_flops_per_s=148e12,
               peak_bytes_per_s=4.0e12),
        Device(name="h200", memory_bytes=141 * 10**9, peak_flops_per_s=989.4e12,
               peak_bytes_per_s=4.8e12),
        Device(name="b200", memory_bytes=180 * 10**9, peak_flops_per_s=2250e12,
               peak_bytes_per_s=7.7e12),
    )
}  # fmt: skip


def find_device(name: str) -> Device:
    """A named device, or "cpu": this one, measured now (a second or so)."""
    if name == "cpu":
        return measure_cpu()
    if name not in DEVICES:
        raise ValueError(f"device is {name!r}; allowed are {', '.join(DEVICES)} and cpu")
    return DEVICES[name]


def measure_cpu(stream_bytes: int = STREAM_BYTES) -> Device:
    """fp32 products as numpy has them, and reading memory on all cores at once: best of five.

    What is read again and again and is not larger than a cache comes from there: `stream_bytes` is
    how much it is.
    """
    import numpy as np

    left = np.ones((PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
    seconds = _best(lambda: left @ left)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = np.array_split(np.ones(stream_bytes // 4, np.float32), cores or 1)
    with ThreadPoolExecutor(len(parts)) as threads:
        stream_s = _best(lambda: list(threads.map(np.max, parts)))
    return Device(
        name="cpu",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        peak_flops_per_s=2 * PRODUCT_SIZE**3 / seconds,
        peak_bytes_per_s=stream_bytes / stream_s,
    )


def _best(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
