"""When the training kernels are taken, and how threads share their work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


def trains_on_cpu(*tensors: Tensor) -> bool:
    """Whether a gradient is wanted of fp32 tensors on the CPU."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return False
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """The memory of contiguous tensors, to be read or written."""
    assert all(x.is_contiguous() for x in tensors)
    return [x.detach().numpy() for x in tensors]


def in_ranges(kernel: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """kernel(first, stop, *arguments) over all of `count` units; what it returned for each range.

    As many at a time as torch has threads. The kernel gives up the GIL and writes nothing for units
    that are not its own.
    """
    return _share_out(kernel, count, arguments, ranges_per_thread=1)


def over_sequences(kernel: Callable[..., Any], count: int, *arguments: Any) -> None:
    """`in_ranges` for units that differ in size: so many that nobody waits long for the largest."""
    _share_out(kernel, count, arguments, ranges_per_thread=4)


def _share_out(
    kernel: Callable[..., Any], count: int, arguments: tuple[Any, ...], *, ranges_per_thread: int
) -> list[Any]:
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        return [kernel(0, count, *arguments)]
    num_ranges = min(threads * ranges_per_thread, count)
    results: list[Any] = [None] * num_ranges
    ranges = enumerate(pairwise([count * i // num_ranges for i in range(num_ranges + 1)]))

    def take() -> None:
        for place, (first, stop) in ranges:
            results[place] = kernel(first, stop, *arguments)

    others = [_pool(threads).submit(take) for _ in range(threads - 1)]
    take()
    for other in others:
        other.result()
    return results


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="openm1-training")
