"""Random bits from a seed and a place alone. Torch-free."""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def child_seed(seed: int, index: int) -> int:
    """An independent seed for the index-th of several samples."""
    start = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return int(mix(mix(start) ^ np.uint64(index))[0])


def mix(x: np.ndarray) -> np.ndarray:
    """One round of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); arrays of uint64 wrap."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
