"""Plans as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.table import Table

from openm1.planner.cost import PriceTier, RunCost, ThoughtCost, TokenCost
from openm1.planner.devices import Device
from openm1.planner.figure import report_flops
from openm1.planner.fleet import Fit, usable_bytes
from openm1.planner.flops import FlopLine, generation_flops, total_flops
from openm1.planner.memory import DeviceMemory
from openm1.planner.models import read_shape, with_absorbed_latent
from openm1.planner.shape import ModelShape

_PREFIXES = ("", "K", "M", "G", "T", "P", "E", "Z")


def short(value: float) -> str:
    """Four digits and a prefix: 6.911 P."""
    step = 0
    while abs(value) >= 999.95 and step < len(_PREFIXES) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.4g} {_PREFIXES[step]}".rstrip()


def billions(num_params: int) -> str:
    """Parameters are counted in B, not in G."""
    return short(num_params).replace("G", "B")


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
    columns = ["model", "exact", "M1 : it"]
    if not prompt_tokens:
        columns += ["report's figure", "M1 : it"]
    table = plain_table(*columns, title=f"The same {generated_tokens:,} tokens elsewhere")
    rows = compared(prompt_tokens, generated_tokens)
    _, own_exact, own_drawn = rows[0]
    for name, exact, drawn in rows:
        cells = [name, short(exact), f"{own_exact / exact:.3f}"]
        if drawn is not None and own_drawn is not None:
            cells += [short(drawn), f"{own_drawn / drawn:.3f}"]
        table.add_row(*cells)
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


def memory_table(title: str, memory: DeviceMemory, device: Device, usable: float) -> Table:
    """What lies on the fullest device."""
    table = plain_table("on the fullest device", "GB", "share of it", title=title)
    for field in fields(memory):
        count = getattr(memory, field.name)
        if count:
            name = field.name.removesuffix("_bytes")
            table.add_row(name, f"{count / 1e9:,.2f}", f"{count / device.memory_bytes:.1%}")
    table.add_section()
    total = memory.total_bytes
    verdict = "fits" if total <= usable_bytes(device, usable) else "does not fit"
    table.add_row(
        f"[bold]{verdict}[/bold] in {usable:.0%} of {device.memory_bytes / 1e9:g} GB",
        f"{total / 1e9:,.2f}",
        f"{total / device.memory_bytes:.1%}",
    )
    return table


def fleet_table(title: str, fits: Sequence[tuple[str, str, Fit | None]]) -> Table:
    """The smallest fleet for each kind of weights and device."""
    table = plain_table(
        "weights", "device", "smallest fleet", "GB on each", "longest sequence", title=title
    )
    before = None
    for weights, device, fit in fits:
        if before not in (None, weights):
            table.add_section()
        name, before = "" if weights == before else weights, weights
        if fit is None:
            table.add_row(name, device, "none up to 256", "", "")
            continue
        room = "any" if fit.room_tokens is None else f"{fit.room_tokens:,}"
        each = f"{fit.memory.total_bytes / 1e9:.1f}"
        memory = f"{fit.device.memory_bytes / 1e9:g}"
        table.add_row(name, device, f"{fit.layout.num_devices} x {memory} GB", each, room)
    return table


def run_table(title: str, run: RunCost, reply_tokens: int) -> Table:
    """A training run, line by line."""
    table = plain_table("", "", title=title)
    table.show_header = False
    hours = run.device_hours
    for name, value in (
        ("device-hours (devices x days x 24)", f"{hours:,.0f}"),
        ("paid", f"${run.usd:,.0f}"),
        ("a device-hour", f"${run.usd_per_hour:.3f}"),
        ("FLOPs at the peak of all devices", short(run.peak_flops)),
        ("one rollout engine", f"{run.engine_devices} devices, {run.batch} replies at a time"),
        ("device-time to write a token", f"{1e3 * run.rollout_device_s_per_token:.3f} ms"),
        ("device-time to train on it", f"{1e3 * run.training_device_s_per_token:.3f} ms"),
        ("share of the time that goes to writing", f"{run.rollout_share:.0%}"),
        ("at most written and trained on", f"{short(run.num_tokens)} tokens"),
        (f"as replies of {reply_tokens:,} tokens", short(run.num_replies)),
        ("a million tokens", f"${1e6 * run.usd / run.num_tokens:.2f}"),
    ):
        table.add_row(name, value)
    return table


def thought_table(title: str, thoughts: Sequence[ThoughtCost]) -> Table:
    table = plain_table("thought", "at a time", "tokens/s each", "minutes", "USD each", title=title)
    for thought in thoughts:
        table.add_row(
            f"{thought.generated_tokens:,} tokens",
            str(thought.batch),
            f"{thought.tokens_per_s:.1f}",
            f"{thought.seconds / 60:.1f}",
            f"{thought.usd:.3f}",
        )
    return table


def price_table(title: str, rows: Sequence[tuple[PriceTier, TokenCost, TokenCost]]) -> Table:
    """Launch prices against our cost at both ends of a tier, yuan for a million tokens."""
    table = plain_table("input", "in: price", "cost", "out: price", "cost", "batch", title=title)
    for tier, low, high in rows:
        table.add_row(
            f"{tier.least_input_tokens // 1024}K-{tier.most_input_tokens // 1024}K",
            f"{tier.input_cny:g}",
            f"{low.input_cny:.2f}-{high.input_cny:.2f}",
            f"{tier.output_cny:g}",
            f"{low.output_cny:.1f}-{high.output_cny:.1f}",
            f"{low.batch}-{high.batch}",
        )
    return table
