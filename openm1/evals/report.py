"""Evaluation results as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from rich.table import Table

from openm1.evals.metrics import TaskMetrics


def eval_json(results: Mapping[str, TaskMetrics], **about: Any) -> dict[str, Any]:
    """`{"tasks": {name: {"accuracy": .., "num_samples": .., ..}}, "mean_accuracy": .., ..}`."""
    return {
        "tasks": {name: asdict(metrics) for name, metrics in results.items()},
        "mean_accuracy": fmean(metrics.accuracy for metrics in results.values()),
        **about,
    }


def eval_table(results: Mapping[str, TaskMetrics], title: str) -> Table:
    table = Table(title=title)
    for column in ("task", "accuracy", "95 % interval", "commonest answer", "thought tokens", "n"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, m in results.items():
        table.add_row(
            name,
            f"{m.accuracy:.1%}",
            f"{m.accuracy_low:.1%} - {m.accuracy_high:.1%}",
            f"{m.majority_accuracy:.1%}",
            f"{m.mean_reasoning_tokens:.1f}",
            str(m.num_samples),
        )
    return table
