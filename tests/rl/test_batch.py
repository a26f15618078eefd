from __future__ import annotations

import pytest
import torch

from openm1.rl import batch
from openm1.rl.batch import has_signal, pack_samples
from openm1.types import Completion, Message, Rollout, RolloutGroup, Task, Turn

TASK = Task(family="any", prompt=(Message(role="user", content="?"),), answer="!")


def turn(prompt: list[int], reply: list[int], forced: tuple[bool, ...] | None = None) -> Turn:
    logprobs = tuple(-token / 100 for token in reply)
    flags = (False,) * len(reply) if forced is None else forced
    completion = Completion(token_ids=tuple(reply), logprobs=logprobs, forced=flags)
    return Turn(prompt_ids=tuple(prompt), completion=completion)


def group_samples(group: RolloutGroup):
    return batch.group_samples(group, prompt=0)


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
    assert has_signal(group(*rollouts)) is signal


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
