"""Rollouts ahead of their step: how stale they may be, in what order they are taken, none lost."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from openm1.common.track import read_metrics
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.runs import load_start
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.rl.config import RLConfig
from openm1.rl.local import train_rl_locally
from openm1.rl.loop import train_rl
from openm1.rl.queue import Entry, RolloutQueue
from openm1.rl.tasks import Drawn, TaskStream
from openm1.train.checkpoint import RunFolder
from openm1.train.optim import AdamWConfig
from openm1.types import Completion, Rollout, RolloutGroup, SamplingParams, Task

from .play import TINY, WrittenPolicy, nano_format
from .test_loop import mixture, sometimes

CONFIG = RLConfig(num_steps=40, num_prompts=8, group_size=2, max_refills=3, in_flight="keep")


def played(task: Task, *, right: bool = True) -> RolloutGroup:
    rollouts = [Rollout(task=task, reward=float(right)), Rollout(task=task, reward=0.0)]
    return RolloutGroup(task=task, rollouts=rollouts)


class Lanes:
    """Plays groups that end when they are told to."""

    def __init__(self) -> None:
        self.ends: dict[int, asyncio.Event] = {}
        self.started: list[int] = []

    async def start(self, drawn: Drawn, window_tokens: int) -> RolloutGroup:
        self.started.append(drawn.index)
        event = self.ends.setdefault(drawn.index, asyncio.Event())
        await event.wait()
        return played(drawn.task)

    def end(self, *indices: int) -> None:
        for index in indices:
            self.ends.setdefault(index, asyncio.Event()).set()


def queue_of(lanes: Lanes, config: RLConfig) -> RolloutQueue:
    return RolloutQueue(TaskStream(mixture()), lanes.start, config)


def indices(entries: list[Entry]) -> list[int]:
    return [entry.drawn.index for entry in entries]


@pytest.mark.parametrize("in_flight", ["wait", "recompute", "keep"])
@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_whoever_is_slow_the_bound_holds_and_none_is_lost(
    in_flight: str, staleness: int, seed: int
):
    """Groups take random times, now and then very long ones; steps refill at random."""
    rng = Random(seed)
    config = replace(CONFIG, max_staleness=staleness, in_flight=in_flight)  # pyright: ignore

    async def start(drawn: Drawn, window_tokens: int) -> RolloutGroup:
        for _ in range(rng.choice([0, 1, 2, 3, 60])):
            await asyncio.sleep(0)
        return played(drawn.task)

    async def run() -> list[tuple[int, Entry]]:
        queue = RolloutQueue(TaskStream(mixture()), start, config)
        taken: list[tuple[int, Entry]] = []
        for step in range(config.num_steps):
            missing = config.num_prompts
            for _ in range(rng.choice([1, 1, 2, 4])):
                ahead = in_flight != "wait"
                queue.fill(missing, ahead=ahead, version=step, window_tokens=4)
                taken += [(step, entry) for entry in await queue.take(missing)]
                missing = rng.randint(1, config.num_prompts)
            queue.fill(0, ahead=True, version=step, window_tokens=4)
            for _ in range(rng.randrange(20)):
                await asyncio.sleep(0)
        assert queue.entries == []
        return taken

    taken = asyncio.run(run())
    ages = [step - entry.version for step, entry in taken]
    assert min(ages) >= 0
    # What is allowed is used, all but a version where refills hurry the queue on, and no more.
    assert max(staleness - 1, 0) <= max(ages) <= staleness
    assert sorted(entry.drawn.index for _, entry in taken) == list(range(len(taken)))
    order = [entry.number for _, entry in taken]
    in_order = all(a < b for a, b in pairwise(order))
    assert in_order or (in_flight != "wait" and staleness > 0)


def test_the_quick_may_overtake_only_inside_the_window():
    lanes = Lanes()

    async def run() -> None:
        queue = queue_of(lanes, replace(CONFIG, max_staleness=3, take_window_share=0.3))
        # 0.3 / 1.3 of the 32 groups of four steps.
        assert queue.window == 7
        queue.fill(8, ahead=True, version=0, window_tokens=4)
        assert len(queue.entries) == 32 - 6
        lanes.end(*range(2, 26))
        taken = await queue.take(5)
        # 0 and 1 are slow; 7 and later are outside although they are done.
        assert indices(taken) == [2, 3, 4, 5, 6]
        waiting = asyncio.ensure_future(queue.take(2))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        lanes.end(1)
        for _ in range(10):
            await asyncio.sleep(0)
        # The window begins at the oldest that is under way, which is still 0.
        assert not waiting.done()
        lanes.end(0)
        assert indices(await waiting) == [0, 1]
        await queue.close()

    asyncio.run(run())


def test_nothing_is_started_that_no_step_will_learn_from():
    lanes = Lanes()

    async def run() -> None:
        queue = queue_of(lanes, replace(CONFIG, max_staleness=3, num_steps=10, in_flight="wait"))
        lanes.end(*range(1000))
        for step in range(10):
            queue.fill(8, ahead=False, version=step, window_tokens=4)
            await queue.take(8)
            queue.fill(0, ahead=True, version=step, window_tokens=4)
        assert queue.entries == []

    asyncio.run(run())
    assert len(lanes.started) == 10 * 8


def test_the_state_keeps_what_is_done_and_starts_the_rest_anew():
    lanes, again = Lanes(), Lanes()

    async def run() -> None:
        queue = queue_of(lanes, replace(CONFIG, max_staleness=1))
        queue.fill(8, ahead=True, version=4, window_tokens=6)
        lanes.end(1, 3)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        state = json.loads(json.dumps(queue.state()))
        before = indices(queue.entries)
        await queue.close()

        other = queue_of(again, replace(CONFIG, max_staleness=1))
        other.tasks.load_state(queue.tasks.state())
        other.load_state(state, version=5)
        again.end(*before)
        assert indices(other.entries) == before
        versions = {entry.drawn.index: entry.version for entry in other.entries}
        assert [versions[i] for i in (0, 1, 2, 3)] == [5, 4, 5, 4]
        assert all(entry.window_tokens == 6 for entry in other.entries)
        first, second = (await other.take(2)), queue.entries[1]
        assert sorted(again.started) == [i for i in before if i not in (1, 3)]
        done = next(entry for entry in first if entry.drawn.index == 1)
        assert done.group.rollouts == second.group.rollouts
        assert done.drawn.task == second.drawn.task
        await other.close()

    asyncio.run(run())


def train(path: Path, guesser: Path, **changes: object) -> tuple[list[dict[str, float]], bytes]:
    config = replace(
        RLConfig(
            num_steps=4,
            num_prompts=8,
            group_size=8,
            num_updates=4,
            max_response_tokens=6,
            optimizer=AdamWConfig(learning_rate=1e-3),
            save_every_steps=100,
        ),
        **changes,  # pyright: ignore[reportArgumentType]
    )
    model, tokenizer = load_start(guesser)
    folder = RunFolder.open(path, config)
    last = train_rl_locally(model, tokenizer, mixture(), config, folder)
    rows = read_metrics(folder.metrics)
    untimed = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return untimed, (last / "model.safetensors").read_bytes()


def test_without_staleness_every_mode_is_the_run_in_turns(tmp_path: Path, guesser: Path):
    expected = train(tmp_path / "wait", guesser)
    assert {row["rl/staleness_max"] for row in expected[0]} == {0.0}
    for mode in ("recompute", "keep"):
        assert train(tmp_path / mode, guesser, in_flight=mode) == expected


@pytest.mark.parametrize("mode", ["wait", "recompute", "keep"])
def test_rollouts_run_ahead_and_the_policy_still_learns(tmp_path: Path, guesser: Path, mode: str):
    rows, _ = train(tmp_path, guesser, in_flight=mode, max_staleness=1, num_steps=12)
    assert max(row["rl/staleness_max"] for row in rows) == 1.0
    assert 0 < max(row["rl/staleness_mean"] for row in rows) <= 1.0
    assert rows[-1]["rollout/reward"] > 0.7


class Slow(WrittenPolicy):
    """Takes some turns of the event loop, and remembers which weights it was given."""

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        assert params.seed is not None
        for _ in range(params.seed % 7):
            await asyncio.sleep(0)
        return await super().generate(prompt_ids, params, session=session)


class Killed(Exception):
    pass


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_a_run_that_breaks_off_loses_no_prompt(tmp_path: Path, mode: str):
    config = RLConfig(
        num_steps=9,
        num_prompts=6,
        group_size=4,
        num_updates=2,
        max_response_tokens=4,
        save_every_steps=1,
        max_staleness=2,
        in_flight=mode,  # pyright: ignore[reportArgumentType]
        retire_pass_rate=None,
    )

    def go(break_after: int) -> None:
        model = M1ForCausalLM(TINY.config(nano_tokenizer()))
        policy = Slow(sometimes)
        folder = RunFolder.open(tmp_path, config)

        def maybe_break(step: int, _: object) -> None:
            if step == break_after:
                raise Killed

        job = train_rl(
            model, nano_format(), mixture(), policy, policy, config, folder, on_step=maybe_break
        )
        asyncio.run(job)

    for step in (2, 3, 6):
        with pytest.raises(Killed):
            go(step)
    go(-1)
    drawn = Counter[str]()
    for file in sorted((tmp_path / "rollouts").iterdir()):
        drawn.update(json.loads(line)["prompt"] for line in file.read_text().splitlines())
    taken = sum(drawn.values()) // config.group_size
    expected = Counter(mixture().task(i)[1].prompt[0].content for i in range(taken))
    assert drawn == Counter(
        {prompt: count * config.group_size for prompt, count in expected.items()}
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(config.num_steps))
    assert max(row["rl/staleness_max"] for row in rows) <= 2
