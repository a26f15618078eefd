"""Runs cases side by side: contestants take turns; medians, ratios, a machine header."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.contestant import OURS
from benchmarks.registry import CASES, Race


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to run."""

    only: tuple[str, ...] = ()
    """Run cases whose name contains one of these; nothing runs all."""
    repeats: int = 5
    threads: int = 0
    """0 keeps torch's choice."""
    out: Path | None = None
    """Where to write the JSON; results of cases that are not run now stay in it."""
    plot: Path | None = None
    """Where to draw time per token against context (case "long")."""


def measure(race: Race, repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn; contestants take turns, so noise hits all alike. The first of a round
    is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in race.contestants}
    for number in range(race.num_rounds):
        race.begin_round(number)
        for turn in range(math.ceil(repeats / race.num_rounds) + 1):
            for name, work in race.contestants.items():
                # OpenMP's threads spin for a while after their work, on cores that the next needs.
                time.sleep(0.1)
                took = work()
                if turn:
                    seconds[name].append(took)
    return seconds


def machine() -> dict[str, object]:
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run_race(race: Race, repeats: int) -> dict[str, Any]:
    """Median tokens per second of each, how far the turns spread, and how we stand to the goals."""
    try:
        seconds = measure(race, repeats)
    finally:
        race.close()
    rates = {name: race.num_tokens / statistics.median(times) for name, times in seconds.items()}
    return {
        "tokens_per_s": rates,
        "slowest_over_fastest": {name: max(t) / min(t) for name, t in seconds.items()},
        "openm1_over": {name: rates[OURS] / rate for name, rate in rates.items() if name != OURS},
        "goals": race.goals,
    }


def show(console: Console, name: str, about: str, result: dict[str, Any]) -> None:
    if "tokens_per_s" not in result:
        console.print(f"[bold]{name}[/bold] {about}")
        console.print_json(json.dumps(result))
        return
    table = Table(
        "contestant", "tokens/s", "spread", "openm1 : it", "goal", title=f"{name}: {about}"
    )
    for contestant, rate in result["tokens_per_s"].items():
        ratio = result["openm1_over"].get(contestant)
        goal = result["goals"].get(contestant)
        table.add_row(
            contestant,
            f"{rate:,.0f}",
            f"{result['slowest_over_fastest'][contestant]:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if goal is None else f"{goal:g} {'met' if ratio >= goal else 'missed'}",
        )
    console.print(table)


def draw_long(result: dict[str, Any], path: Path) -> None:
    """Time per token against context, measured and as the planner has it."""
    from matplotlib.figure import Figure

    curve = result["curve"]
    contexts = [row["context"] for row in curve]
    predicted = [1e3 * row["predicted_s"] for row in curve]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(contexts, [1e3 * row["seconds_per_token"] for row in curve], "o-", label="measured")
    axes.plot(contexts, predicted, "--", label="predicted: bytes moved at the machine's bandwidth")
    axes.set(
        xscale="log", yscale="log", xlabel="context [tokens]", ylabel="time per token [ms]",
        title="decode, nano fp32, one sequence",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    config = tyro.cli(BenchConfig, prog="python -m benchmarks.run")
    chosen = {
        name: case
        for name, case in CASES.items()
        if not config.only or any(part in name for part in config.only)
    }
    if not chosen:
        raise SystemExit(f"no case contains {config.only}; there are {', '.join(CASES)}")
    if config.threads:
        torch.set_num_threads(config.threads)
    console, about = Console(), machine()
    console.print_json(json.dumps(about))
    results: dict[str, Any] = {}
    if config.out is not None and config.out.is_file():
        results = json.loads(config.out.read_text())["results"]
    for name, case in chosen.items():
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("highest")
        if case.race is not None:
            result = run_race(case.race(torch.get_num_threads()), config.repeats)
        else:
            assert case.report is not None
            result = case.report(torch.get_num_threads())
        results[name] = result
        show(console, name, case.about, result)
        if name == "long" and config.plot is not None:
            draw_long(result, config.plot)
        if config.out is not None:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": about, "results": results}, indent=2)
            config.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
