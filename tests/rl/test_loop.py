from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from openm1.common.track import read_metrics
from openm1.engine.llm import LLM
from openm1.envs.base import prompt_text
from openm1.envs.chain import ChainTaskset
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.protocols import Policy
from openm1.recipes.runs import load_start
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.rl.batch import BatchConfig, group_samples, has_signal
from openm1.rl.collect import NoUsableRollouts, collect
from openm1.rl.config import RLConfig
from openm1.rl.local import train_rl_locally
from openm1.rl.loop import train_rl
from openm1.rl.losses import CISPO, RatioAnchor
from openm1.rl.monitor import agreement_metrics
from openm1.rl.queue import RolloutQueue, group_player
from openm1.rl.stages import WindowGrowth
from openm1.rl.tasks import NoTasksLeft, TaskStream
from openm1.rl.update import UpdatePlan, recompute_logprobs
from openm1.train.checkpoint import RunFolder, load_trainer_state
from openm1.train.optim import AdamWConfig
from openm1.types import Completion, Message, Rollout, RolloutGroup, SamplingParams, Task

from .play import TINY, OneDigit, WrittenPolicy, nano_format

CONFIG = RLConfig(num_steps=2, num_prompts=6, group_size=4, num_updates=2, max_response_tokens=4)
PLAIN = BatchConfig()

# Two orders of summation in fp32 differ by about 1e-7; bf16 on either side would show as 1e-3.
AGREEMENT = 1e-4


def mixture() -> Mixture:
    return Mixture([OneDigit()], seed=3)


def sometimes(question: str, seed: int) -> str:
    """One question in two is answered right now and then, the others never."""
    return "7" if question[0] in "02468" and seed % 2 else "1"


def collected(policy: WrittenPolicy, config: RLConfig, cursor: int = 0):
    tasks = TaskStream(mixture())
    tasks.cursor = cursor
    return collected_groups(policy, tasks, config, window_tokens=4), tasks.cursor


def collected_groups(
    policy: Policy, tasks: TaskStream, config: RLConfig, window_tokens: int
) -> list[RolloutGroup]:
    async def run() -> list[RolloutGroup]:
        queue = RolloutQueue(tasks, group_player(policy, nano_format(), config), config)
        entries = await collect(queue, config, step=0, window_tokens=window_tokens)
        assert queue.entries == []
        return [entry.group for entry in entries]

    return asyncio.run(run())


def signals(groups) -> int:
    return sum(has_signal(group, PLAIN) for group in groups)


def test_groups_without_signal_are_drawn_again():
    groups, cursor = collected(WrittenPolicy(sometimes), replace(CONFIG, max_refills=50))
    assert signals(groups) >= CONFIG.num_prompts
    # Nothing is drawn twice, and nothing drawn is hidden from the metrics.
    assert cursor == len(groups) > CONFIG.num_prompts
    drawn = [prompt_text(group.task) for group in groups]
    assert drawn == [prompt_text(mixture().task(i)[1]) for i in range(cursor)]
    # The last round was needed, and asked for no more than was missing.
    assert signals(groups) == CONFIG.num_prompts


@pytest.mark.parametrize(
    ("changes", "rounds"),
    [({"max_refills": 0}, 1), ({"max_refills": 2}, 3), ({"dynamic_sampling": False}, 1)],
)
def test_refills_have_an_end(changes: dict, rounds: int):
    groups, cursor = collected(WrittenPolicy(lambda *_: "7"), replace(CONFIG, **changes), 100)
    assert len(groups) == rounds * CONFIG.num_prompts
    assert cursor == 100 + len(groups)


def test_a_prompt_that_has_been_learned_is_not_drawn_again():
    def asked(**changes) -> list[str]:
        policy = WrittenPolicy(lambda question, _: "7" if question[0] in "0123456" else "1")
        config = replace(CONFIG, num_prompts=300, group_size=2, max_refills=3)
        collected(policy, replace(config, **changes))
        return [question for question, _ in policy.asked][:: config.group_size]

    # Of some 900 prompts, 1,200 draws repeat many.
    drawn = Counter(asked())
    assert max(count for question, count in drawn.items() if question[0] in "789") > 1
    # A round is drawn before it is known what it retires, so a repeat comes within one at most.
    learned = {question: count for question, count in drawn.items() if question[0] in "0123456"}
    free = Counter(asked(retire_pass_rate=None))
    free_learned = {question: free[question] for question in learned}
    assert sum(count - 1 for count in learned.values()) < 0.5 * sum(
        count - 1 for count in free_learned.values()
    )


def test_a_stream_retires_at_its_rate_and_remembers_it():
    tasks = TaskStream(mixture())
    first, second = (drawn.task for drawn in tasks.draw(2))
    groups = []
    for task, right in ((first, 9), (second, 8)):
        rollouts = [Rollout(task=task, reward=float(i < right)) for i in range(10)]
        groups.append(RolloutGroup(task=task, rollouts=rollouts))
    tasks.retire(groups, 0.9)
    again = TaskStream(mixture())
    again.load_state(tasks.state() | {"cursor": 0})
    assert [drawn.task for drawn in again.draw(1)] == [second]
    assert again.cursor == 2


class OneTask(OneDigit):
    def draw(self, rng: Random) -> Task:
        return Task(family=self.name, prompt=(Message(role="user", content="1 +1"),), answer="7")


def test_a_stream_that_has_run_dry_says_so():
    tasks = TaskStream(Mixture([OneTask()]))
    task = tasks.draw(1)[0].task
    group = RolloutGroup(task=task, rollouts=[Rollout(task=task, reward=1.0)])
    tasks.retire([group], 0.9)
    with pytest.raises(NoTasksLeft, match="1 prompts are retired"):
        tasks.draw(1)


def test_the_window_grows_in_a_run_and_rollouts_get_it(tmp_path: Path):
    growth = WindowGrowth(later_tokens=(5, 9), horizon_steps=2, near_share=0.5)
    config = replace(CONFIG, num_steps=6, growth=growth)
    policy = WrittenPolicy(sometimes)
    folder, last, _ = train(tmp_path, policy, config)
    windows = [row["rollout/window_tokens"] for row in read_metrics(folder.metrics)]
    # Replies of two tokens are near 4, not near 5; their perplexity never changes.
    assert windows == [4, 4, 5, 5, 5, 5]
    assert {params.max_tokens for _, params in policy.asked} == {4, 5}
    assert load_trainer_state(last)["window"]["index"] == 1


def test_rollouts_are_sampled_from_the_whole_distribution_each_with_its_seed():
    # Top-k or top-p would make the sampler's probabilities others than the trainer's.
    policy = WrittenPolicy(lambda *_: "7")
    collected(policy, replace(CONFIG, max_refills=0, temperature=0.7))
    params = [params for _, params in policy.asked]
    assert {(p.top_p, p.top_k, p.temperature, p.max_tokens) for p in params} == {(1.0, 0, 0.7, 4)}
    assert len({p.seed for p in params}) == CONFIG.num_prompts * CONFIG.group_size
    again = WrittenPolicy(lambda *_: "7")
    collected(again, replace(CONFIG, max_refills=0, temperature=0.7))
    assert again.asked == policy.asked


class BrokenPolicy(WrittenPolicy):
    """Fails for the questions it is told to."""

    def __init__(self, broken: str) -> None:
        super().__init__(sometimes)
        self.broken = broken

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        if self.tokenizer.decode(prompt_ids).split("name=user\n")[1][0] in self.broken:
            raise ConnectionError("the endpoint is gone")
        return await super().generate(prompt_ids, params, session=session)


def test_a_step_whose_rollouts_all_failed_is_an_error_with_its_cause():
    with pytest.raises(NoUsableRollouts, match="24 rollouts of step 0 failed: ConnectionError"):
        collected(BrokenPolicy("0123456789"), CONFIG)


def train(tmp_path: Path, policy: WrittenPolicy, config: RLConfig = CONFIG):
    model = M1ForCausalLM(TINY.config(nano_tokenizer()))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    folder = RunFolder.open(tmp_path, config)
    last = asyncio.run(train_rl(model, nano_format(), mixture(), policy, policy, config, folder))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return folder, last, float((after - before).norm())


def test_some_failed_rollouts_do_not_stop_a_step(tmp_path: Path):
    folder, last, moved = train(tmp_path, BrokenPolicy("13579"))
    rows = read_metrics(folder.metrics)
    assert [row["step"] for row in rows] == [0, 1]
    assert all(0 < row["rollout/error_share"] < 1 for row in rows)
    assert moved > 0
    lines = (folder.path / "rollouts" / "step-000000.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        failed = line["prompt"][0] in "13579"
        assert (line["reward"] is None, line["error"] is not None) == (failed, failed)
    assert load_trainer_state(last)["kept"]["tasks"]["cursor"] == rows_drawn(folder)


def rows_drawn(folder: RunFolder) -> int:
    files = sorted((folder.path / "rollouts").iterdir())
    return sum(len(file.read_text().splitlines()) for file in files) // CONFIG.group_size


@pytest.mark.parametrize(("dynamic", "updates"), [(True, False), (False, True)])
def test_groups_without_signal_are_dropped_only_by_dynamic_sampling(
    tmp_path: Path, dynamic: bool, updates: bool
):
    config = replace(CONFIG, dynamic_sampling=dynamic)
    folder, _, moved = train(tmp_path, WrittenPolicy(lambda *_: "7"), config)
    for row in read_metrics(folder.metrics):
        assert row["rollout/signal_share"] == 0.0
        assert ("rl/num_updates" in row) is updates
        # Agreement is watched in every step, also where nothing is learned.
        assert row["rl/probability_max_difference"] > 0
    assert (moved > 0) is updates


def test_the_policy_is_given_each_new_version(tmp_path: Path):
    policy = WrittenPolicy(sometimes)
    train(tmp_path, policy)
    assert policy.version == CONFIG.num_steps


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_on_probabilities(temperature: float):
    tokenizer = nano_tokenizer()
    shape = replace(TINY, hidden_size=64, num_attention_heads=8, num_hidden_layers=8)
    model = M1ForCausalLM(shape.config(tokenizer), seed=5)
    # The padding rows must be of no account, however likely the model finds them.
    assert model.config.vocab_size > tokenizer.vocab_size
    config = replace(CONFIG, max_response_tokens=40, temperature=temperature, max_refills=0)
    chains = Mixture([ChainTaskset()])
    llm = LLM(model, tokenizer=tokenizer)
    groups = collected_groups(llm.policy, TaskStream(chains), config, window_tokens=40)
    rewarded = [
        replace(group, rollouts=[replace(r, reward=float(i)) for i, r in enumerate(group.rollouts)])
        for group in groups
    ]
    samples = [
        sample for i, group in enumerate(rewarded) for sample in group_samples(group, i, PLAIN, 40)
    ]
    plan = UpdatePlan(
        loss=CISPO(),
        num_updates=1,
        max_tokens=500,
        temperature=temperature,
        learning_rate=0.1,
        max_grad_norm=1.0,
        anchor=RatioAnchor(at="old"),
        vocab_size=tokenizer.vocab_size,
    )
    trainer = torch.cat(recompute_logprobs(model, samples, plan))
    sampler = torch.tensor([p for sample in samples for p in sample.old_logprobs])
    assert len(sampler) > 500
    metrics = agreement_metrics(trainer, sampler)
    assert metrics["rl/probability_corr"] > 0.999
    assert metrics["rl/probability_max_difference"] < AGREEMENT
    assert abs(metrics["rl/sampler_kl_nats"]) < AGREEMENT


def test_cispo_learns_what_is_rewarded(tmp_path: Path, guesser: Path):
    config = RLConfig(
        num_steps=12,
        num_prompts=8,
        group_size=8,
        num_updates=4,
        max_response_tokens=6,
        optimizer=AdamWConfig(learning_rate=3e-3),
        save_every_steps=100,
    )
    model, tokenizer = load_start(guesser)
    folder = RunFolder.open(tmp_path, config)
    train_rl_locally(model, tokenizer, mixture(), config, folder)
    rows = read_metrics(folder.metrics)
    assert rows[0]["rollout/reward"] < 0.35
    assert rows[-1]["rollout/reward"] > 0.9
    updated = [row for row in rows if "rl/num_updates" in row]
    assert all(row["rl/probability_corr"] > 0.999 for row in updated)
    assert all(row["rl/probability_max_difference"] < AGREEMENT for row in updated)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0),
        ("num_updates", 0),
        ("group_size", 1),
        ("temperature", 0.0),
        ("max_refills", -1),
        ("retire_pass_rate", 0.0),
        ("retire_pass_rate", 1.1),
        ("repetition_stop_tokens", -1),
    ],
)
def test_impossible_numbers_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        replace(CONFIG, **{name: value})


def test_tasks_can_be_found_again_by_their_number():
    places = list(range(20))
    Random(0).shuffle(places)
    first, second = mixture(), mixture()
    by_place = {i: prompt_text(first.task(i)[1]) for i in places}
    assert [by_place[i] for i in range(20)] == [prompt_text(second.task(i)[1]) for i in range(20)]
