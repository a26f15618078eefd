"""From results to tables and pictures."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cispo.arms import ARMS
from benchmarks.cispo.tasks import TASKS

THRESHOLDS = {
    "recheck": (0.8, 0.9, 0.95),
    "ladder": (1.0, 1.5, 2.0, 3.0),
    "chain": (0.5, 0.6, 0.7),
}
"""Of what `progress` counts, by task."""
Result = dict[str, Any]
RARE_UNTIL = 0.5
"""The mean probability up to which the mark is called rare."""


def steps_to(curve: Sequence[float], threshold: float) -> float:
    """Batches of updates until the curve first reaches the threshold, between two batches on the
    straight line; infinite if it never does."""
    for step, value in enumerate(curve):
        if value >= threshold:
            if step == 0:
                return 0.0
            before = curve[step - 1]
            return step - 1 + (threshold - before) / (value - before)
    return math.inf


def area(result: Result) -> float:
    """The mean reward of all steps, levels passed counted as 1 each."""
    return fmean(progress(result))


def progress(result: Result) -> list[float]:
    """Per step, the reward; in a curriculum the levels passed and the reward on the next."""
    curves = result["curves"]
    levels = curves.get("level", [0] * len(curves["reward"]))
    return [level + reward for level, reward in zip(levels, curves["reward"], strict=True)]


def growth(result: Result) -> list[float]:
    """Per batch while the mark is rare, by what its probability was multiplied."""
    curve = result["curves"]["recheck"]
    return [after / before for before, after in pairwise(curve) if 0 < before < RARE_UNTIL]


def while_rare(result: Result, name: str) -> float:
    """The mean of a curve over the batches in which the mark is rare."""
    curves = result["curves"]
    kept = [v for v, p in zip(curves[name], curves["recheck"], strict=True) if p < RARE_UNTIL]
    return fmean(kept) if kept else math.nan


def by_arm(results: Iterable[Result]) -> dict[str, list[Result]]:
    grouped: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        grouped[result["arm"]].append(result)
    return dict(grouped)


def best_rates(results: Iterable[Result]) -> dict[str, float]:
    """Each arm's learning rate with the largest mean area."""
    areas: dict[tuple[str, float], list[float]] = defaultdict(list)
    for result in results:
        areas[result["arm"], result["learning_rate"]].append(area(result))
    best: dict[str, float] = {}
    for arm, rate in sorted(areas, key=lambda key: -fmean(areas[key])):
        best.setdefault(arm, rate)
    return best


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`6.2 (5.1-7.0)`: the mean, and the least and the greatest; runs that never got there are
    counted."""
    reached = [value for value in values if math.isfinite(value)]
    if not reached:
        return "never"
    text = f"{fmean(reached):.{digits}f} ({min(reached):.{digits}f}-{max(reached):.{digits}f})"
    missed = len(values) - len(reached)
    return f"{text}, {missed} of {len(values)} never" if missed else text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def thresholds_table(results: Sequence[Result], thresholds: Sequence[float]) -> str:
    header = ["arm", "learning rate", *(f"steps to {t:g}" for t in thresholds), "area", "last 5"]
    rows = []
    for arm, runs in by_arm(results).items():
        curves = [progress(run) for run in runs]
        rates = sorted({run["learning_rate"] for run in runs})
        rows.append(
            [
                ARMS[arm].about,
                ", ".join(f"{rate:g}" for rate in rates),
                *(spread([steps_to(curve, t) for curve in curves]) for t in thresholds),
                f"{fmean(map(area, runs)):.2f}",
                f"{fmean(fmean(curve[-5:]) for curve in curves):.2f}",
            ]
        )
    return table(header, rows)


def mechanism_table(results: Sequence[Result]) -> str:
    """Of the mark that checks, over the batches in which it is rare."""
    header = [
        "arm",
        "net upward weight",
        "positive dropped",
        "negative dropped",
        "growth a batch",
        "greatest growth",
        "weight is not the ratio",
        "entropy at forks [nats]",
    ]
    rows = []
    for arm, runs in by_arm(results).items():
        growths = [growth(run) for run in runs]
        mean_growth = [math.exp(fmean(map(math.log, g))) for g in growths if g]
        rows.append(
            [
                ARMS[arm].about,
                f"{100 * fmean(while_rare(run, 'rare_net') for run in runs):.0f} %",
                f"{100 * fmean(while_rare(run, 'rare_up_dropped') for run in runs):.0f} %",
                f"{100 * fmean(while_rare(run, 'rare_down_dropped') for run in runs):.0f} %",
                spread(mean_growth, 2),
                f"{max(max(g) for g in growths if g):.1f}",
                f"{100 * fmean(while_rare(run, 'clipped') for run in runs):.2f} %",
                f"{fmean(while_rare(run, 'fork_entropy') for run in runs):.2f}",
            ]
        )
    return table(header, rows)


def rates_table(results: Sequence[Result], value: Callable[[Result], float] = area) -> str:
    """Mean of `value` by arm and learning rate."""
    rates = sorted({result["learning_rate"] for result in results})
    rows = []
    for arm, runs in by_arm(results).items():
        cells = []
        for rate in rates:
            values = [value(run) for run in runs if run["learning_rate"] == rate]
            cells.append(f"{fmean(values):.2f}" if values else "")
        rows.append([ARMS[arm].about, *cells])
    return table(["arm", *(f"{rate:g}" for rate in rates)], rows)


def figure2() -> dict[str, list[tuple[int, float]]]:
    """(step, accuracy on AIME 2024 in percent) of each algorithm: Figure 2 of the M1 report (arXiv
    2506.13585), Qwen2.5-32B, read off its drawing."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    text = files("benchmarks.cispo").joinpath("figure2_aime.csv").read_text()
    for row in csv.DictReader(text.splitlines()):
        points[row["algorithm"]].append((int(row["step"]), float(row["aime2024_avg32"])))
    return dict(points)


COLOURS = {
    "cispo": "C3",
    "dapo": "C0",
    "grpo": "C2",
    "dapo-4": "C9",
    "symmetric": "C1",
    "gradient": "C7",
    "praise": "C4",
    "praise-0": "C6",
    "cispo-2": "salmon",
    "dapo-2": "navy",
    "cispo-1": "tan",
}


def _band(axes: Any, arm: str, curves: Sequence[Sequence[float]]) -> None:
    """The mean of the seeds, and from the least to the greatest."""
    columns = list(zip(*curves, strict=True))
    steps, colour = range(len(columns)), COLOURS.get(arm)
    axes.plot(steps, [fmean(c) for c in columns], color=colour, label=arm)
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_comparison(results: Mapping[str, Sequence[Result]], path: Path) -> None:
    """The report's Figure 2, and the same for each task of ours."""
    from matplotlib.figure import Figure

    count = 1 + len(results)
    figure = Figure(figsize=(4.6 * count, 4), layout="constrained")
    first, *others = figure.subplots(1, count)
    for name, points in figure2().items():
        first.plot(*zip(*points, strict=True), ".-", color=COLOURS[name], label=name)
    first.set(xlabel="step", ylabel="AIME 2024 [%]", title="M1 report, Figure 2 (Qwen2.5-32B)")
    for axes, (task, runs) in zip(others, results.items(), strict=True):
        for arm, seeds in by_arm(runs).items():
            _band(axes, arm, [progress(run) for run in seeds])
        in_levels = task in TASKS and TASKS[task].curriculum is not None
        label = "levels passed + reward" if in_levels else "reward"
        axes.set(xlabel="step", ylabel=label, title=f"{task}, each arm at its best rate")
    for axes in (first, *others):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_mechanism(results: Sequence[Result], path: Path) -> None:
    """The rare mark's probability and net upward weight, batch by batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, runs in by_arm(results).items():
        _band(left, arm, [run["curves"]["recheck"] for run in runs])
        _band(right, arm, [run["curves"]["rare_net"] for run in runs])
    left.set(xlabel="step", ylabel="probability of the mark that checks", yscale="log")
    right.set(xlabel="step", ylabel="net upward weight of these marks")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
