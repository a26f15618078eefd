"""The demo's result as PNG plots and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from openm1.common.page import html_page, html_table, reply_line
from openm1.common.track import read_metrics
from openm1.evals.metrics import TaskMetrics
from openm1.types import Message

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Stage:
    """A checkpoint and what it can do."""

    name: str
    checkpoint: Path
    metrics: TaskMetrics
    accuracy_by_budget: dict[int, float]


@dataclass(frozen=True)
class Trace:
    question: str
    answer: str
    before: Message
    after: Message


@dataclass(frozen=True)
class Answer:
    question: str
    expected: str
    reply: Message


@dataclass(frozen=True)
class DemoResult:
    folder: Path
    """With the run folders pretrain, sft, rl and rl-capped."""
    stages: list[Stage]
    traces: list[Trace]
    answers: list[Answer]


def write_report(path: Path, result: DemoResult, seconds: float) -> None:
    """Writes the plots beside `path`, and `path` with the plots inside it."""
    plots = write_plots(path.parent, result)
    before, after = result.stages[1], result.stages[2]
    images = "".join(
        f'<p><img alt="{escape(plot.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(plot.read_bytes()).decode()}"></p>'
        for plot in plots
    )
    body = f"""<h1>A nano M1 learns to think</h1>
<p>From random weights, in {seconds:.0f} seconds: pretraining, a cold start on hasty thoughts, and
CISPO, which was told only right or wrong. On held-out chains the greedy accuracy went from
{before.metrics.accuracy:.1%} to {after.metrics.accuracy:.1%}, the thought from
{before.metrics.mean_reasoning_tokens:.1f} to {after.metrics.mean_reasoning_tokens:.1f} tokens.</p>
{_table(result)}
{images}
<h2>Before and after</h2>
{"".join(_trace(trace) for trace in result.traces)}
<h2>The shipped nano</h2>
{"".join(_answer(answer) for answer in result.answers)}"""
    path.write_text(html_page("OpenM1 demo", body), encoding="utf-8")


def _table(result: DemoResult) -> str:
    budgets = list(result.stages[0].accuracy_by_budget)
    samples = result.stages[0].metrics.num_samples
    head = [f"{samples} held-out chains", "accuracy", "thought tokens"]
    rows = [
        [
            stage.name,
            f"{stage.metrics.accuracy:.1%}",
            f"{stage.metrics.mean_reasoning_tokens:.1f}",
            *(f"{stage.accuracy_by_budget[budget]:.0%}" for budget in budgets),
        ]
        for stage in result.stages
    ]
    return html_table([*head, *(f"budget {budget}" for budget in budgets)], rows)


def _trace(trace: Trace) -> str:
    lines = "".join(
        f"{name}: {_reply(reply, trace.answer)}<br>"
        for name, reply in (("before", trace.before), ("after", trace.after))
    )
    return f"<p><b>{escape(trace.question)}</b><br>{lines}</p>"


def _answer(answer: Answer) -> str:
    return f"<p><b>{escape(answer.question)}</b><br>{_reply(answer.reply, answer.expected)}</p>"


def _reply(reply: Message, expected: str) -> str:
    return reply_line(reply.reasoning or "", reply.content, is_right=reply.content == expected)


def write_plots(folder: Path, result: DemoResult) -> list[Path]:
    """budget.png: accuracy against thinking budget; cispo.png: reward and length by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for stage in result.stages:
        curve = stage.accuracy_by_budget
        axes.plot(list(curve), list(curve.values()), marker="o", label=stage.name)
    axes.axhline(0.1, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="thinking budget (tokens)", ylabel="held-out accuracy", ylim=(0, 1.03))
    axes.legend()
    budget = folder / "budget.png"
    figure.savefig(budget, dpi=120)

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in (("rl", "CISPO"), ("rl-capped", "CISPO, window capped")):
        lines = read_metrics(folder / name / "metrics.jsonl")
        _curve(left, lines, "rollout/reward", label)
        _curve(right, lines, "rollout/length_mean_tokens", label)
    left.set(xlabel="step", ylabel="mean reward of the samples", ylim=(0, 1.03))
    right.set(xlabel="step", ylabel="mean response length (tokens)")
    left.legend()
    cispo = folder / "cispo.png"
    figure.savefig(cispo, dpi=120)
    pyplot.close("all")
    return [budget, cispo]


def _curve(axes: Axes, lines: list[dict[str, float]], metric: str, label: str) -> None:
    axes.plot([line["step"] for line in lines], [line[metric] for line in lines], label=label)
