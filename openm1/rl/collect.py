"""Rollouts for a step: groups taken until enough of them have something to teach."""

from __future__ import annotations

from functools import partial

from openm1.common.errors import RunStopped
from openm1.rl.batch import has_signal
from openm1.rl.config import RLConfig
from openm1.rl.queue import Entry, RolloutQueue


class NoUsableRollouts(RunStopped):
    """Every rollout of a step failed; the message carries the first error."""


async def collect(
    queue: RolloutQueue, config: RLConfig, *, step: int, window_tokens: int
) -> list[Entry]:
    """All groups that a step takes, in order of their start; the tasks move on.

    Dynamic sampling refills what had no signal, so that about `num_prompts` groups teach.
    """
    start = partial(queue.fill, version=step, window_tokens=window_tokens)
    # The last bits of a probability depend on what is computed beside it. So that they are the same
    # in a resumed run, "wait" starts groups only when no others are being played.
    overlap = config.in_flight != "wait"
    entries: list[Entry] = []
    missing = config.num_prompts
    for _ in range(1 + config.max_refills * config.dynamic_sampling):
        start(missing, ahead=overlap)
        new = await queue.take(missing)
        entries += new
        groups = [entry.group for entry in entries]
        if config.retire_pass_rate is not None:
            queue.tasks.retire([entry.group for entry in new], config.retire_pass_rate)
        errors = [r.error for g in groups for r in g.rollouts if r.error is not None]
        if len(errors) == sum(len(g.rollouts) for g in groups):
            raise NoUsableRollouts(f"all {len(errors)} rollouts of step {step} failed: {errors[0]}")
        missing = config.num_prompts - sum(has_signal(group, config.batch) for group in groups)
        if missing <= 0:
            break
    start(0, ahead=True)
    return entries
