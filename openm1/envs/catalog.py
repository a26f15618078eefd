"""Every taskset by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from openm1.envs.chain import ChainTaskset
from openm1.envs.hop import HopTaskset
from openm1.envs.logic import REDUCED, THOUGHTS, LogicTaskset
from openm1.envs.unknown import UnknownTaskset
from openm1.protocols import Taskset


def make_taskset(name: str) -> Taskset:
    """The taskset called `name`, in its default difficulty. Raises ValueError for other names."""
    if name not in TASKSETS:
        raise ValueError(f"taskset is {name!r}; allowed are {', '.join(TASKSETS)}")
    return TASKSETS[name]()


TASKSETS: dict[str, Callable[[], Taskset]] = {
    "chain": ChainTaskset,
    "hop": HopTaskset,
    "unknown": UnknownTaskset,
    **{name: partial(LogicTaskset, name, **REDUCED.get(name, {})) for name in THOUGHTS},
}
