"""Groups of rollouts under way: started ahead of their step, taken nearly in the order of their
start, and never too stale.

With a staleness of S versions, groups are started while up to S batches are still to be learned
from. Admission alone keeps the bound: a group that is started now, when `missing` groups of this
step are still to be taken, has at most S * P + missing - 1 taken before it, P being the prompts of
a step, since at most W - 1 may overtake it. None is ever thrown away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any

from openm1.chat.template import ChatFormat
from openm1.common.config import from_jsonable, to_jsonable
from openm1.protocols import Policy
from openm1.rl.config import RLConfig
from openm1.rl.tasks import Drawn, TaskStream
from openm1.rollout.run import run_group
from openm1.types import Rollout, RolloutGroup, SamplingParams, Task

Start = Callable[[Drawn, int], Coroutine[Any, Any, RolloutGroup]]
"""Plays a drawn task with a window of that many tokens."""


def group_player(policy: Policy, chat_format: ChatFormat, config: RLConfig) -> Start:
    """The rollouts of a task depend on (seed, index) and the weights alone."""

    async def start(drawn: Drawn, window_tokens: int) -> RolloutGroup:
        rng = Random(f"{config.seed}/{drawn.index}/sample")
        return await run_group(
            policy,
            drawn.taskset,
            drawn.task,
            chat_format,
            SamplingParams(
                max_tokens=window_tokens,
                temperature=config.temperature,
                repetition_stop_tokens=config.repetition_stop_tokens,
            ),
            seeds=[rng.getrandbits(63) for _ in range(config.group_size)],
            env_timeout_s=config.env_timeout_s,
        )

    return start


@dataclass(kw_only=True, eq=False)
class Entry:
    """A group from its start until it is taken."""

    number: int
    """In order of their start, from 0."""
    drawn: Drawn
    version: int
    """Of the weights when it was started."""
    window_tokens: int
    job: asyncio.Task[RolloutGroup]

    @property
    def group(self) -> RolloutGroup:
        return self.job.result()


class RolloutQueue:
    """Its state is part of a checkpoint: finished groups as they are, unfinished ones by what they
    start from."""

    def __init__(self, tasks: TaskStream, start: Start, config: RLConfig) -> None:
        self.tasks, self.config, self._start = tasks, config, start
        self.entries: list[Entry] = []
        self._next = 0

    @property
    def window(self) -> int:
        """W: only the oldest group that is under way and the W - 1 after it may be taken."""
        if self.config.in_flight == "wait":
            return 1
        share = self.config.take_window_share
        batches = (self.config.max_staleness + 1) * self.config.num_prompts
        return max(1, int(share * batches / (1 + share)))

    def fill(self, missing: int, *, ahead: bool, version: int, window_tokens: int) -> None:
        """Starts groups until `missing` are under way, and with `ahead` as many more as may be."""
        config = self.config
        more = config.max_staleness * config.num_prompts - (self.window - 1)
        # Past the last step nothing is learned from.
        more = min(more, (config.num_steps - 1 - version) * config.num_prompts)
        count = missing + max(0, more) * ahead - len(self.entries)
        for drawn in self.tasks.draw(max(0, count)):
            self._enter(drawn, version, window_tokens)

    def _enter(self, drawn: Drawn, version: int, window_tokens: int) -> None:
        job = asyncio.ensure_future(self._start(drawn, window_tokens))
        self._append(drawn, version, window_tokens, job)

    def _append(
        self, drawn: Drawn, version: int, window_tokens: int, job: asyncio.Task[RolloutGroup]
    ) -> None:
        entry = Entry(
            number=self._next, drawn=drawn, version=version, window_tokens=window_tokens, job=job
        )
        self._next += 1
        self.entries.append(entry)

    async def take(self, count: int) -> list[Entry]:
        """The first `count` groups to finish inside the window, in order of their start.

        First come, first served among all would favour short and easy tasks.
        """
        assert count <= len(self.entries), "more groups are asked for than are under way"
        taken: list[Entry] = []
        while len(taken) < count:
            last = self.entries[0].number + self.window
            visible = [entry for entry in self.entries if entry.number < last]
            done = [entry for entry in visible if entry.job.done()]
            if not done:
                await asyncio.wait(
                    [entry.job for entry in visible], return_when=asyncio.FIRST_COMPLETED
                )
                continue
            self.entries.remove(done[0])
            taken.append(done[0])
        return sorted(taken, key=lambda entry: entry.number)

    async def settle(self) -> None:
        """Waits until nothing is unfinished."""
        if jobs := [entry.job for entry in self.entries]:
            await asyncio.wait(jobs)

    async def close(self) -> None:
        """Stops what is under way."""
        for entry in self.entries:
            entry.job.cancel()
        await asyncio.gather(*(entry.job for entry in self.entries), return_exceptions=True)

    def state(self) -> list[dict[str, Any]]:
        return [self._entry_state(entry) for entry in self.entries]

    def _entry_state(self, entry: Entry) -> dict[str, Any]:
        finished = entry.job.done() and not entry.job.cancelled()
        rollouts = [to_jsonable(r) for r in entry.group.rollouts] if finished else None
        return {
            "index": entry.drawn.index,
            "taskset": self.tasks.mixture.tasksets.index(entry.drawn.taskset),
            "task": to_jsonable(entry.drawn.task),
            "version": entry.version,
            "window_tokens": entry.window_tokens,
            "rollouts": rollouts,
        }

    def load_state(self, state: list[dict[str, Any]], *, version: int) -> None:
        """Unfinished groups start anew, under the weights of now."""
        for saved in state:
            drawn = Drawn(
                index=saved["index"],
                taskset=self.tasks.mixture.tasksets[saved["taskset"]],
                task=from_jsonable(Task, saved["task"]),
            )
            if saved["rollouts"] is None:
                self._enter(drawn, version, saved["window_tokens"])
                continue
            rollouts = [from_jsonable(Rollout, rollout) for rollout in saved["rollouts"]]
            group = RolloutGroup(task=drawn.task, rollouts=rollouts)
            job = asyncio.ensure_future(_at_once(group))
            self._append(drawn, saved["version"], saved["window_tokens"], job)


async def _at_once(group: RolloutGroup) -> RolloutGroup:
    return group
