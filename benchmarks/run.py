"""Runs cases side by side: contestants take turns; medians, ratios, a machine header."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.registry import CASES, OURS, Case


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to run."""

    only: str = ""
    """Run cases whose name contains this."""
    repeats: int = 5
    threads: int = 0
    """0 keeps torch's choice."""
    out: Path | None = None
    """Where to write the JSON."""


def measure(case: Case, repeats: int) -> dict[str, float]:
    """Median tokens per second of each contestant; they take turns, so noise hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in case.contestants}
    for name, work in case.contestants.items():
        work()
        seconds[name].clear()
    for _ in range(repeats):
        for name, work in case.contestants.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return {name: case.num_tokens / statistics.median(times) for name, times in seconds.items()}


def machine() -> dict[str, object]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    config = tyro.cli(BenchConfig, prog="python -m benchmarks.run")
    chosen = {name: make for name, make in CASES.items() if config.only in name}
    if not chosen:
        raise SystemExit(f"no case contains {config.only!r}; there are {', '.join(CASES)}")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    about = machine()
    table = Table("case", "contestant", "tokens/s", "openm1 : it", title=json.dumps(about))
    results = {}
    for name, make in chosen.items():
        rates = results[name] = measure(make(), config.repeats)
        for contestant, rate in rates.items():
            table.add_row(name, contestant, f"{rate:,.0f}", f"{rates[OURS] / rate:.2f}")
    Console().print(table)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
