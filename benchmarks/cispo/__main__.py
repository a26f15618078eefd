"""`python -m benchmarks.cispo`: runs what is missing, then writes tables and pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.cispo.arms import ARMS, GRID, RATES
from benchmarks.cispo.report import (
    THRESHOLDS,
    best_rates,
    draw_comparison,
    draw_mechanism,
    mechanism_table,
    rates_table,
    thresholds_table,
)
from benchmarks.cispo.sweep import Job, sweep
from benchmarks.run import machine

FINAL_SEEDS = range(10, 15)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to run. Runs that the folder has are not run again."""

    folder: Path = Path("runs/cispo")
    tasks: tuple[str, ...] = ("recheck", "ladder")
    """Of recheck, ladder and chain."""
    tune: bool = False
    """Run the grid of learning rates, and name each arm's best, instead of the comparison."""
    tuning_seeds: tuple[int, ...] = (100, 101, 102, 103)
    """Learning rates are chosen on other seeds than they are reported on."""
    num_processes: int = 2
    out: Path | None = None
    """Where to write the results as JSON as well."""

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - set(RATES):
            raise ValueError(f"tasks are {sorted(unknown)}; allowed are {', '.join(RATES)}")
        if taken := set(self.tuning_seeds) & set(FINAL_SEEDS):
            raise ValueError(f"tuning_seeds have {sorted(taken)}, which results are reported on")


def tune(config: CompareConfig) -> None:
    for task in config.tasks:
        jobs = [
            Job(task=task, arm=arm, learning_rate=rate, seed=seed)
            for seed in config.tuning_seeds
            for arm in RATES[task]
            for rate in GRID[task][ARMS[arm].num_updates]
        ]
        results = sweep(jobs, config.folder, config.num_processes)
        print(f"\n{task}, area by learning rate\n\n{rates_table(results)}\n")
        print(f"best: {best_rates(results)}")


def final_jobs(task: str) -> list[Job]:
    return [
        Job(task=task, arm=arm, learning_rate=rate, seed=seed)
        for arm, rate in RATES[task].items()
        for seed in FINAL_SEEDS
    ]


def compare(config: CompareConfig) -> None:
    began = time.perf_counter()
    results: dict[str, Sequence[dict[str, Any]]] = {
        task: sweep(final_jobs(task), config.folder, config.num_processes) for task in config.tasks
    }
    parts = []
    for task, runs in results.items():
        parts.append(f"## {task}\n\n{thresholds_table(runs, THRESHOLDS[task])}\n")
        if task == "recheck":
            parts.append(f"While the mark is rare:\n\n{mechanism_table(runs)}\n")
            draw_mechanism(runs, config.folder / "mechanism.png")
    draw_comparison(results, config.folder / "comparison.png")
    text = "\n".join(parts)
    (config.folder / "tables.md").write_text(text)
    print(f"\n{text}\nwritten to {config.folder} after {time.perf_counter() - began:.0f} s")
    if config.out is not None:
        whole = {"machine": machine(), "results": results}
        config.out.write_text(json.dumps(whole) + "\n")


if __name__ == "__main__":
    chosen = tyro.cli(CompareConfig, prog="python -m benchmarks.cispo")
    if chosen.tune:
        tune(chosen)
    else:
        compare(chosen)
