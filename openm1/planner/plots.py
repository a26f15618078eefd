"""Plans as drawings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openm1.planner.figure import figure_points, report_flops
from openm1.planner.flops import generation_flops, total_flops
from openm1.planner.models import read_shape, with_absorbed_latent

LENGTHS = tuple(1024 * n for n in range(4, 132, 4))


def _axes(**settings: Any) -> tuple[Any, Any]:
    # Half a second, for those who draw.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(**settings)
    axes.grid(alpha=0.3)
    return figure, axes


def draw_figure(path: Path) -> None:
    """The report's Figure 1 (right): its points, its convention as recovered, the exact counts."""
    figure, axes = _axes(
        xlabel="generation length [tokens]", ylabel="FLOPs", title="FLOPs of a reply"
    )
    colours = {"deepseek-r1": "C0", "qwen3-235b-a22b": "C1", "minimax-m1": "C3"}
    for name, points in figure_points().items():
        shape, colour = read_shape(name), colours[name]
        axes.plot(*zip(*points, strict=True), "o", color=colour, label=f"{name}, the report's")
        drawn = [report_flops(shape, length) for length in LENGTHS]
        axes.plot(LENGTHS, drawn, "-", color=colour, label="ours in its convention")
        axes.plot(LENGTHS, _exact(shape), "--", color=colour, label="exact")
    absorbed = with_absorbed_latent(read_shape("deepseek-r1"))
    axes.plot(LENGTHS, _exact(absorbed), ":", color="C0", label="exact, MLA absorbed")
    axes.set_ylim(0, 8e16)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _exact(shape: Any) -> list[int]:
    return [
        total_flops(generation_flops(shape, prompt_tokens=0, generated_tokens=length))
        for length in LENGTHS
    ]


def draw_memory(path: Path, title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Bytes of all devices together against the context."""
    figure, axes = _axes(
        xscale="log", yscale="log", xlabel="context [tokens]", ylabel="GB, one sequence",
        title=title,
    )  # fmt: skip
    for name, points in curves.items():
        contexts, sizes = zip(*points, strict=True)
        axes.plot(contexts, [size / 1e9 for size in sizes], "o-", label=name)
    axes.legend()
    figure.savefig(path, dpi=150)


def draw_thoughts(path: Path, title: str, points: Sequence[tuple[int, float]]) -> None:
    """Dollars of one thought against its length."""
    figure, axes = _axes(
        xscale="log", yscale="log", xlabel="thought [tokens]", ylabel="USD a thought", title=title
    )
    axes.plot(*zip(*points, strict=True), "o-")
    figure.savefig(path, dpi=150)
