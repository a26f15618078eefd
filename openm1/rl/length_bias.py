"""Watches whether a judge pays for length, or for brevity, while a run goes on.

M1 recalibrated its reward model when the policy wrote longer without getting better (arXiv
2506.13585, section 4). Long answers may earn more because they are right more often, so rewards are
compared with lengths only among answers to one question that the rule finds equally correct.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from openm1.envs.genrm import Judgement


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBiasConfig:
    """When to raise the alarm. M1 gave no thresholds; these are ours."""

    horizon_steps: int = 8
    """Steps whose judgements are looked at together. There is no alarm before as many have been
    seen: a slope from few answers overcorrects."""
    alarm_correlation: float = 0.2
    """Least correlation of reward with length, of either sign, that matters."""
    alarm_deviations: float = 4.0
    """Least distance from 0 in standard deviations, so that few judgements raise no alarm."""

    def __post_init__(self) -> None:
        if self.horizon_steps < 1:
            raise ValueError(f"horizon_steps is {self.horizon_steps}; allowed is 1 or more")
        if not 0 < self.alarm_correlation < 1:
            raise ValueError(
                f"alarm_correlation is {self.alarm_correlation}; allowed is between 0 and 1"
            )
        if not self.alarm_deviations > 0:
            raise ValueError(f"alarm_deviations is {self.alarm_deviations}; allowed is above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBias:
    """Reward against length at equal correctness."""

    correlation: float
    """Positive where longer answers earn more; 0 where nothing can be compared."""
    deviations: float
    """Of its Fisher transform from 0."""
    reward_per_char: float
    """The slope of the straight line of least squares."""
    mean_chars: float

    def metrics(self) -> dict[str, float]:
        return {
            "genrm/length_corr": self.correlation,
            "genrm/length_corr_deviations": self.deviations,
            "genrm/length_mean_chars": self.mean_chars,
        }


Recalibrate = Callable[[LengthBias], None]


class LengthBiasMonitor:
    """`observe` is a `JudgedTaskset`'s watcher; `end_step` belongs in the `on_step` of `train_rl`.

    On an alarm `recalibrate` is called once, and what was seen under the old judge is forgotten.
    """

    def __init__(self, config: LengthBiasConfig, recalibrate: Recalibrate) -> None:
        self.config, self.recalibrate = config, recalibrate
        self._steps: deque[list[Judgement]] = deque(maxlen=config.horizon_steps)
        self._now: list[Judgement] = []
        self.num_alarms = 0

    def observe(self, judgement: Judgement) -> None:
        self._now.append(judgement)

    def end_step(self) -> LengthBias:
        """What the last steps show; raises the alarm where it is too much."""
        self._steps.append(self._now)
        self._now = []
        bias = length_bias(self._steps)
        config = self.config
        large = abs(bias.correlation) >= config.alarm_correlation
        sure = abs(bias.deviations) >= config.alarm_deviations
        if large and sure and len(self._steps) == config.horizon_steps:
            self.num_alarms += 1
            self._steps.clear()
            self.recalibrate(bias)
        return bias

    def state(self) -> dict[str, Any]:
        """For a checkpoint. Judgements of a step that has not ended are not kept: it is redone."""
        steps = [[asdict(judgement) for judgement in step] for step in self._steps]
        return {"steps": steps, "num_alarms": self.num_alarms}

    def load_state(self, state: dict[str, Any]) -> None:
        self._steps.clear()
        self._steps.extend(
            [Judgement(**judgement) for judgement in step] for step in state["steps"]
        )
        self._now = []
        self.num_alarms = state["num_alarms"]


def length_bias(steps: Iterable[Iterable[Judgement]]) -> LengthBias:
    """Pooled within groups of one step, one question and one rule reward, each about its means."""
    groups: dict[tuple[int, str, float], list[Judgement]] = defaultdict(list)
    for number, step in enumerate(steps):
        for judgement in step:
            groups[number, judgement.question, judgement.rule_reward].append(judgement)
    squares_length = squares_reward = products = 0.0
    freedom = 0
    for group in groups.values():
        lengths = [float(judgement.length_chars) for judgement in group]
        rewards = [judgement.reward for judgement in group]
        length, reward = fmean(lengths), fmean(rewards)
        squares_length += sum((x - length) ** 2 for x in lengths)
        squares_reward += sum((y - reward) ** 2 for y in rewards)
        products += sum((x - length) * (y - reward) for x, y in zip(lengths, rewards, strict=True))
        freedom += len(group) - 1
    everyone = [float(j.length_chars) for group in groups.values() for j in group]
    mean = fmean(everyone) if everyone else 0.0
    # Rounding can leave a spread of 1e-32 where all are equal.
    if min(squares_length, squares_reward) < 1e-12:
        return LengthBias(correlation=0.0, deviations=0.0, reward_per_char=0.0, mean_chars=mean)
    correlation = products / math.sqrt(squares_length * squares_reward)
    inside = max(-0.999999, min(0.999999, correlation))
    return LengthBias(
        correlation=correlation,
        deviations=math.atanh(inside) * math.sqrt(max(freedom - 2, 0)),
        reward_per_char=products / squares_length,
        mean_chars=mean,
    )
