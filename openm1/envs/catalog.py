"""Every taskset by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from openm1.envs.base import SingleTurnTaskset
from openm1.envs.calculator import CalculatorTaskset
from openm1.envs.chain import ChainConfig, ChainTaskset
from openm1.envs.hop import HopConfig, HopTaskset
from openm1.envs.logic import REDUCED, THOUGHTS, LogicTaskset
from openm1.envs.unknown import UnknownTaskset
from openm1.envs.wordings import WORDINGS, RewordedTaskset
from openm1.protocols import Taskset

IN_OTHER_WORDS = ":words"


def make_taskset(name: str) -> Taskset:
    """The taskset called `name`, in its default difficulty; `gcd:words` asks in a person's words.

    Raises ValueError for other names.
    """
    family = name.removesuffix(IN_OTHER_WORDS)
    if family not in TASKSETS or (family != name and family not in WORDINGS):
        allowed = f"{', '.join(TASKSETS)}, and with {IN_OTHER_WORDS}: {', '.join(WORDINGS)}"
        raise ValueError(f"taskset is {name!r}; allowed are {allowed}")
    taskset = TASKSETS[family]()
    return taskset if family == name else RewordedTaskset(taskset)


def make_levels(name: str) -> list[Taskset]:
    """The taskset at rising difficulty, where it has one that can be set; else as it is."""
    if name == "chain":
        most = ChainConfig().max_operations
        return [ChainTaskset(ChainConfig(max_operations=n)) for n in range(2, most + 1)]
    if name == "hop":
        most = HopConfig().max_hops
        return [HopTaskset(HopConfig(max_hops=n)) for n in range(1, most + 1)]
    return [make_taskset(name)]


TASKSETS: dict[str, Callable[[], SingleTurnTaskset]] = {
    "chain": ChainTaskset,
    "hop": HopTaskset,
    "unknown": UnknownTaskset,
    "calculator": CalculatorTaskset,
    **{name: partial(LogicTaskset, name, **REDUCED.get(name, {})) for name in THOUGHTS},
}
