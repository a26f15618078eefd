"""What is learned when: tasks that a rule verifies first, general ones mixed in, harder with skill.

M1 began with reasoning tasks whose answers a rule verifies and mixed general ones in gradually
(arXiv 2506.13585, section 4). It gave no schedule: the numbers here are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from openm1.envs.mixture import Mixture
from openm1.protocols import Taskset
from openm1.types import Task

Verifier = Literal["rule", "general"]
"""Who says what is right: a rule, or a judge whose word can be gamed."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """One skill, from easy to hard."""

    levels: Sequence[Taskset]
    """The same family at rising difficulty; one level is no ladder."""
    verifier: Verifier = "rule"
    weight: float = 1.0
    """Among the courses of its kind."""

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a course has no levels; allowed is at least one")
        if self.verifier not in get_args(Verifier):
            allowed = ", ".join(get_args(Verifier))
            raise ValueError(f"verifier is {self.verifier!r}; allowed are {allowed}")
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}; allowed is above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumConfig:
    """When general tasks come in, and when a course gets harder."""

    general_from_step: int = 20
    """Until then there are none."""
    general_until_step: int = 60
    """Their share grows in a straight line until then."""
    general_share: float = 0.3
    """Of all tasks, in the end."""
    raise_at: float = 0.75
    """A course goes one level up when so much of its level's last rollouts was right."""
    horizon_groups: int = 32
    """Groups over which that is looked at; a new level starts with none."""
    review_share: float = 0.2
    """Of a course's tasks, those from the levels below the one it is at."""

    def __post_init__(self) -> None:
        if not 0 <= self.general_from_step <= self.general_until_step:
            raise ValueError(
                f"general tasks come in from step {self.general_from_step} to "
                f"{self.general_until_step}; allowed is 0 <= from <= until"
            )
        for name in ("general_share", "review_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is 0 to below 1")
        if not 0 < self.raise_at <= 1:
            raise ValueError(f"raise_at is {self.raise_at}; allowed is above 0 to 1")
        if self.horizon_groups < 1:
            raise ValueError(f"horizon_groups is {self.horizon_groups}; allowed is at least 1")


@dataclass
class _Progress:
    level: int = 0
    rates: list[float] = field(default_factory=list)
    """Of the level's last groups, oldest first."""


class Curriculum(Mixture):
    """A mixture whose weights depend on the step and on what was passed; task i depends on those
    and on (seed, i).

    Courses are told apart by their tasks' family, so each needs its own.
    """

    def __init__(
        self, courses: Sequence[Course], config: CurriculumConfig | None = None, *, seed: int = 0
    ) -> None:
        self.courses, self.config = list(courses), config or CurriculumConfig()
        names = [course.levels[0].name for course in self.courses]
        if len(set(names)) < len(names) or not any(c.verifier == "rule" for c in self.courses):
            raise ValueError(
                f"courses are {names}; allowed are different families, at least one with a rule"
            )
        self._by_family = {name: number for number, name in enumerate(names)}
        self._progress = [_Progress() for _ in self.courses]
        self._step = 0
        tasksets = [level for course in self.courses for level in course.levels]
        super().__init__(tasksets, weights=self._weights(), seed=seed)

    @property
    def general_share(self) -> float:
        """Of this step's tasks."""
        config = self.config
        if not any(course.verifier == "general" for course in self.courses):
            return 0.0
        if self._step < config.general_from_step:
            return 0.0
        span = config.general_until_step - config.general_from_step
        grown = (self._step - config.general_from_step) / span if span else 1.0
        return config.general_share * min(1.0, grown)

    def _weights(self) -> list[float]:
        shares = {"general": self.general_share, "rule": 1 - self.general_share}
        totals = {
            kind: sum(c.weight for c in self.courses if c.verifier == kind) for kind in shares
        }
        weights: list[float] = []
        for course, progress in zip(self.courses, self._progress, strict=True):
            share = shares[course.verifier] * course.weight / totals[course.verifier]
            review = self.config.review_share if progress.level else 0.0
            below = review / progress.level if progress.level else 0.0
            for level in range(len(course.levels)):
                at = 1 - review if level == progress.level else 0.0
                weights.append(share * (below if level < progress.level else at))
        return weights

    def begin_step(self, step: int) -> None:
        self._step = step
        self.weights = self._weights()

    def observe(self, task: Task, pass_rate: float) -> None:
        """A level is passed by the groups drawn since it began, reviews among them."""
        number = self._by_family[task.family]
        progress, levels = self._progress[number], self.courses[number].levels
        progress.rates = [*progress.rates, pass_rate][-self.config.horizon_groups :]
        full = len(progress.rates) == self.config.horizon_groups
        passed = full and sum(progress.rates) / len(progress.rates) >= self.config.raise_at
        if passed and progress.level + 1 < len(levels):
            self._progress[number] = _Progress(progress.level + 1)

    def metrics(self) -> dict[str, float]:
        levels = zip(self._by_family, self._progress, strict=True)
        return {"curriculum/general_share": self.general_share} | {
            f"curriculum/level_{name}": progress.level for name, progress in levels
        }

    def state(self) -> dict[str, Any]:
        return {"progress": [{"level": p.level, "rates": p.rates} for p in self._progress]}

    def load_state(self, state: dict[str, Any]) -> None:
        self._progress = [_Progress(saved["level"], saved["rates"]) for saved in state["progress"]]
