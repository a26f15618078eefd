"""Plans as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from openm1.planner.figure import report_flops
from openm1.planner.flops import FlopLine, generation_flops, total_flops
from openm1.planner.models import read_shape, with_absorbed_latent
from openm1.planner.shape import ModelShape

_PREFIXES = ("", "K", "M", "G", "T", "P", "E", "Z")


def short(value: float) -> str:
    """Four digits and a prefix: 6.911 P."""
    step = 0
    while abs(value) >= 999.95 and step < len(_PREFIXES) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.4g} {_PREFIXES[step]}".rstrip()


def plain_table(*columns: str, title: str = "") -> Table:
    """First column to the left, the others are numbers."""
    table = Table(title=title or None, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def flops_table(title: str, lines: Sequence[FlopLine]) -> Table:
    """Where the FLOPs go: by kind of layer and operation."""
    table = plain_table("layers", "operation", "FLOPs", "share", title=title)
    table.columns[1].justify = "left"
    whole, before = total_flops(lines), None
    for line in lines:
        name = f"{line.num_layers} {line.layers}" if line.layers != "head" else "head"
        share = line.flops / whole if whole else 0.0
        if before is not None and name != before:
            table.add_section()
        table.add_row("" if name == before else name, line.operation, short(line.flops),
                      f"{share:.1%}")  # fmt: skip
        before = name
    table.add_section()
    table.add_row("[bold]all", "", f"[bold]{short(whole)}", "")
    return table


def comparison_table(prompt_tokens: int, generated_tokens: int) -> Table:
    """The same reply by the three models of the report's figure, in both conventions."""
    table = plain_table(
        "model", "exact", "M1 : it", "report's figure", "M1 : it",
        title=f"The same {generated_tokens:,} tokens elsewhere",
    )  # fmt: skip
    rows = compared(prompt_tokens, generated_tokens)
    first = rows[0]
    for name, exact, drawn in rows:
        table.add_row(
            name,
            short(exact),
            f"{first[1] / exact:.3f}",
            "" if drawn is None else short(drawn),
            "" if drawn is None or first[2] is None else f"{first[2] / drawn:.3f}",
        )
    return table


def compared(prompt_tokens: int, generated_tokens: int) -> list[tuple[str, int, int | None]]:
    """Name, exact FLOPs, and FLOPs as in the figure, which has no prompt and one curve for R1."""
    latent = read_shape("deepseek-r1")
    shapes: dict[str, tuple[ModelShape, bool]] = {
        "minimax-m1": (read_shape("minimax-m1"), True),
        "deepseek-r1, MLA expanded": (latent, True),
        "deepseek-r1, MLA absorbed": (with_absorbed_latent(latent), False),
        "qwen3-235b-a22b": (read_shape("qwen3-235b-a22b"), True),
    }
    rows: list[tuple[str, int, int | None]] = []
    for name, (shape, is_drawn) in shapes.items():
        exact = total_flops(
            generation_flops(shape, prompt_tokens=prompt_tokens, generated_tokens=generated_tokens)
        )
        drawn = report_flops(shape, generated_tokens) if is_drawn and not prompt_tokens else None
        rows.append((name, exact, drawn))
    return rows
