"""Several tasksets as one stream in which every task can be found again by its number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any

from openm1.envs.base import stable_hash
from openm1.protocols import Taskset
from openm1.types import Task


class Mixture:
    """Training tasks drawn from tasksets by weight; task i depends on (seed, i) alone."""

    def __init__(
        self, tasksets: Sequence[Taskset], *, weights: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        self.tasksets = list(tasksets)
        self.weights = list(weights) if weights is not None else [1.0] * len(self.tasksets)
        self.seed = seed
        fitting = 0 < len(self.tasksets) == len(self.weights)
        if not fitting or min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise ValueError(
                f"{len(self.tasksets)} tasksets with weights {self.weights}; allowed is at least "
                "one taskset and for each a weight of 0 or more, not all of them 0"
            )

    def task(self, index: int) -> tuple[Taskset, Task]:
        """The task at any place of the endless stream."""
        rng = Random(stable_hash(f"{self.seed}/{index}"))
        taskset = rng.choices(self.tasksets, self.weights)[0]
        return taskset, next(taskset.train(stable_hash(f"{self.seed}/{index}/task")))

    # What follows is for mixtures that change as a run goes on, like a curriculum; this one does
    # not.

    def begin_step(self, step: int) -> None:
        """Tasks are drawn for that step or a later one from now on."""

    def observe(self, task: Task, pass_rate: float) -> None:
        """How a drawn task was passed."""

    def metrics(self) -> dict[str, float]:
        """For the line of a step."""
        return {}

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


class TaskList(Mixture):
    """Given tasks, all of them again and again, each time in another order."""

    def __init__(self, tasks: Sequence[tuple[Taskset, Task]], *, seed: int = 0) -> None:
        self.tasks = list(tasks)
        super().__init__(list({id(taskset): taskset for taskset, _ in tasks}.values()), seed=seed)

    def task(self, index: int) -> tuple[Taskset, Task]:
        turn, place = divmod(index, len(self.tasks))
        return self.tasks[_order(len(self.tasks), self.seed, turn)[place]]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, turn: int) -> list[int]:
    order = list(range(count))
    Random(stable_hash(f"{seed}/{turn}/order")).shuffle(order)
    return order
