from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openm1.rl import batch
from openm1.rl.batch import BatchConfig, has_signal, pack_samples, pass_rate, signal_metrics
from openm1.types import Completion, FinishReason, Message, Rollout, RolloutGroup, Task, Turn

TASK = Task(family="any", prompt=(Message(role="user", content="?"),), answer="!")
PLAIN = BatchConfig()


def turn(prompt: list[int], reply: list[int], forced: tuple[bool, ...] | None = None) -> Turn:
    logprobs = tuple(-token / 100 for token in reply)
    flags = (False,) * len(reply) if forced is None else forced
    completion = Completion(token_ids=tuple(reply), logprobs=logprobs, forced=flags)
    return Turn(prompt_ids=tuple(prompt), completion=completion)


def group_samples(group: RolloutGroup, config: BatchConfig = PLAIN, window_tokens: int = 1000):
    return batch.group_samples(group, 0, config, window_tokens)


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(task=TASK, rollouts=rollouts)


def scored(reward: float, *turns: Turn) -> Rollout:
    return Rollout(task=TASK, turns=turns or (turn([1, 2], [50, 60]),), reward=reward)


FAILED = Rollout(
    task=TASK, turns=(turn([1, 2], [51]),), error="Timeout: too slow", error_source="grader"
)


def test_only_what_the_policy_chose_is_learned():
    forced = turn([1, 2, 3], [50, 60, 70, 80], forced=(False, True, True, False))
    sample = group_samples(group(scored(1.0, forced), scored(0.0)))[0]
    assert sample.token_ids == (1, 2, 3, 50, 60, 70, 80)
    assert sample.loss_mask == (False, False, False, True, False, False, True)
    assert sample.old_logprobs == (-0.5, -0.8)
    assert sample.num_loss_tokens == 2


def test_a_policy_that_forces_nothing_may_say_nothing_about_it():
    sample = group_samples(group(scored(1.0, turn([1], [50, 60], forced=())), scored(0.0)))[0]
    assert sample.loss_mask == (False, True, True)


def test_turns_are_one_sequence_of_the_very_tokens():
    first = turn([1, 2], [50, 60])
    second = turn([1, 2, 50, 60, 3, 4], [70])
    sample = group_samples(group(scored(1.0, first, second), scored(0.0)))[0]
    assert sample.token_ids == (1, 2, 50, 60, 3, 4, 70)
    assert sample.loss_mask == (False, False, True, True, False, False, True)
    assert sample.old_logprobs == (-0.5, -0.6, -0.7)


def test_turns_that_were_written_anew_are_no_sample():
    first = turn([1, 2], [50, 60])
    second = turn([1, 2, 50, 61, 3], [70])
    with pytest.raises(AssertionError, match="does not extend"):
        group_samples(group(scored(1.0, first, second), scored(0.0)))


def test_failed_rollouts_are_left_out_and_are_no_zero():
    samples = group_samples(group(scored(1.0), FAILED, scored(0.5), FAILED))
    # As zeros, the failures would lift the others to 1.2 and 0.2.
    assert [sample.advantage for sample in samples] == pytest.approx([1.0, -1.0])
    assert all(51 not in sample.token_ids for sample in samples)
    assert group_samples(group(FAILED, FAILED)) == []


@pytest.mark.parametrize(
    ("rollouts", "signal"),
    [
        ((scored(1.0), scored(0.0)), True),
        ((scored(1.0), scored(1.0)), False),
        ((scored(0.0), scored(0.0)), False),
        ((scored(1.0), FAILED), False),
        ((FAILED, FAILED), False),
        ((scored(1.0), FAILED, scored(0.0)), True),
    ],
)
def test_signal_is_a_difference_between_scored_rollouts(rollouts, signal: bool):
    assert has_signal(group(*rollouts), PLAIN) is signal


def test_per_token_tensors_stand_in_packed_order():
    short = turn([1], [50])
    long = turn([1, 2], [60, 70, 80], forced=(False, True, False))
    samples = group_samples(group(scored(1.0, short), scored(0.0, long)))
    packed = pack_samples(samples)
    chosen = packed.packed.targets[packed.packed.loss_mask]
    assert chosen.tolist() == [50, 60, 80]
    torch.testing.assert_close(packed.old_logprobs, -chosen / 100)
    assert packed.sample_index.tolist() == [0, 1, 1]
    assert packed.advantages.tolist() == [1.0, -1.0, -1.0]


def cut(reward: float, reason: FinishReason) -> Rollout:
    ended = turn([1, 2], [70, 80])
    completion = replace(ended.completion, finish_reason=reason)
    return scored(reward, replace(ended, completion=completion))


@pytest.mark.parametrize("name", ["truncated", "repetition"])
@pytest.mark.parametrize(
    ("policy", "advantages"),
    [
        ("keep", [0.5**0.5, 0.5**0.5, -(2**0.5)]),
        # Its 0 still lowers the mean, but only the others are learned.
        ("mask", [0.5**0.5, 0.5**0.5]),
        ("drop", [0.0, 0.0]),
    ],
)
def test_what_was_cut_short_is_kept_masked_or_dropped(name: str, policy, advantages):
    reason, other = ("length", "repetition") if name == "truncated" else ("repetition", "length")
    config = BatchConfig(**{name: policy})
    samples = group_samples(group(scored(1.0), scored(1.0), cut(0.0, reason)), config)
    assert [sample.advantage for sample in samples] == pytest.approx(advantages)
    # The other kind of cut is another choice.
    samples = group_samples(group(scored(1.0), scored(1.0), cut(0.0, other)), config)
    assert len(samples) == 3


def test_a_dropped_rollout_is_no_signal():
    mixed = group(scored(1.0), cut(0.0, "length"))
    assert has_signal(mixed, BatchConfig(truncated="mask"))
    assert not has_signal(mixed, BatchConfig(truncated="drop"))


def of_length(num_tokens: int) -> Rollout:
    return scored(1.0, turn([1], [50] * num_tokens))


@pytest.mark.parametrize(
    ("num_tokens", "punishment"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0)]
)
def test_the_overlong_punishment_falls_over_the_last_part(num_tokens: int, punishment: float):
    config = BatchConfig(overlong_share=0.2, overlong_cost=1.0)
    found = config.overlong_punishment(of_length(num_tokens), 100)
    assert found == pytest.approx(punishment)
    half = replace(config, overlong_cost=0.5).overlong_punishment(of_length(num_tokens), 100)
    assert half == pytest.approx(punishment / 2)
    assert replace(config, overlong_share=0.0).overlong_punishment(of_length(num_tokens), 100) == 0


def test_the_overlong_punishment_is_of_the_longest_reply_not_of_all_together():
    first, second = turn([1], [50] * 60), turn([1, *[50] * 60, 2], [50] * 90)
    both = scored(1.0, first, second)
    assert PLAIN.overlong_punishment(both, 100) == pytest.approx(-0.25)
    assert PLAIN.overlong_punishment(scored(1.0, first), 100) == 0


def test_length_costs_within_a_group_but_is_no_signal():
    both_right = group(of_length(10), of_length(95))
    assert not has_signal(both_right, PLAIN)
    assert [s.advantage for s in group_samples(both_right, window_tokens=100)] == [1.0, -1.0]
    assert [s.advantage for s in group_samples(both_right, window_tokens=1000)] == [0.0, 0.0]


def test_every_group_of_a_step_is_accounted_for():
    groups = [
        group(scored(1.0), scored(0.0), FAILED),
        group(scored(1.0), scored(1.0)),
        group(scored(1.0), cut(0.0, "length")),
        group(scored(0.0), FAILED),
        group(FAILED, FAILED),
    ]
    assert signal_metrics(groups, BatchConfig(truncated="drop"), 1000) == pytest.approx(
        {
            "rollout/signal_share": 0.2,
            "rollout/all_right_share": 0.4,
            "rollout/all_wrong_share": 0.2,
            "rollout/unscored_share": 0.2,
            "rollout/overlong_punishment": 0.0,
        }
    )
    metrics = signal_metrics([group(of_length(10), of_length(100))], PLAIN, 100)
    assert metrics["rollout/overlong_punishment"] == -0.25


def test_only_a_full_reward_passes():
    assert pass_rate(group(scored(1.0), scored(0.0), scored(0.9), FAILED)) == 0.25
    assert pass_rate(group(FAILED)) == 0.0


def test_a_rollout_without_a_chosen_token_is_no_sample():
    forced = turn([1], [50, 60], forced=(True, True))
    (sample,) = group_samples(group(scored(1.0, forced), scored(0.0)))
    assert sample.advantage == -1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("truncated", "skip"),
        ("repetition", ""),
        ("overlong_share", 1.5),
        ("overlong_share", -0.1),
        ("overlong_cost", -1.0),
    ],
)
def test_impossible_batches_are_refused(name: str, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; allowed"):
        BatchConfig(**{name: value})
