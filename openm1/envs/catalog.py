"""Every taskset by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from openm1.envs.chain import ChainConfig, ChainTaskset
from openm1.envs.hop import HopConfig, HopTaskset
from openm1.envs.logic import THOUGHTS, LogicTaskset
from openm1.protocols import Taskset


def make_taskset(name: str) -> Taskset:
    """The taskset called `name`, in its default difficulty. Raises ValueError for other names."""
    if name not in TASKSETS:
        raise ValueError(f"taskset is {name!r}; allowed are {', '.join(TASKSETS)}")
    return TASKSETS[name]()


def make_levels(name: str) -> list[Taskset]:
    """The taskset at rising difficulty, where it has one that can be set; else as it is."""
    if name == "chain":
        most = ChainConfig().max_operations
        return [ChainTaskset(ChainConfig(max_operations=n)) for n in range(2, most + 1)]
    if name == "hop":
        most = HopConfig().max_hops
        return [HopTaskset(HopConfig(max_hops=n)) for n in range(1, most + 1)]
    return [make_taskset(name)]


TASKSETS: dict[str, Callable[[], Taskset]] = {
    "chain": ChainTaskset,
    "hop": HopTaskset,
    **{name: partial(LogicTaskset, name) for name in THOUGHTS},
}
