"""`openm1 plan flops|memory|run|price`: what a thought costs, before it is paid. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    from openm1.planner.flops import FlopLine
    from openm1.planner.shape import ModelShape

DESCRIPTION = """What a thought, a context or a training run costs: counted from a config, torch-free.

MODEL is minimax-m1, m1-40k, m1-80k, nano, deepseek-r1, qwen3-235b-a22b, or a config.json of these families."""

Json = Annotated[bool, arg(name="json")]
Mla = Literal["expanded", "absorbed"]
DEFAULT_GENERATE = 65_536


def _shape(model: str, mla: Mla) -> ModelShape:
    from openm1.planner.models import read_shape, with_absorbed_latent

    shape = read_shape(model)
    return with_absorbed_latent(shape) if mla == "absorbed" else shape


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content))


def flops(
    *,
    model: str = "minimax-m1",
    prompt: int = 0,
    generate: int | None = None,
    train: int | None = None,
    batch: int = 1,
    recompute: bool = False,
    convention: Literal["exact", "report"] = "exact",
    mla: Mla = "expanded",
    json_: Json = False,
    plot: Path | None = None,
) -> None:
    """FLOPs of a reply of --generate tokens (65,536) to --prompt tokens, or of a training step.

    --train TOKENS is the length of a training sequence, --batch how many there are, --recompute
    with activation checkpointing. --convention report is how the M1 report's Figure 1 counts.
    --plot FILE draws that figure, ours over its points.
    """
    from openm1.planner.figure import report_flops
    from openm1.planner.flops import generation_flops, total_flops, training_flops

    shape = _shape(model, mla)
    if train is not None and (generate is not None or prompt or convention == "report"):
        raise ValueError("--train goes with --batch and --recompute only; a reply is counted apart")
    if train is None and (batch != 1 or recompute):
        raise ValueError("--batch and --recompute are of a training step; give --train TOKENS")
    length = DEFAULT_GENERATE if generate is None else generate
    about: dict[str, Any] = {"model": model, "convention": convention}
    lines: list[FlopLine] = []
    if train is not None:
        about |= {"train_tokens": train, "batch": batch, "recompute": recompute}
        lines = training_flops(
            shape, num_sequences=batch, sequence_tokens=train, recompute=recompute
        )
    else:
        about |= {"prompt_tokens": prompt, "generated_tokens": length}
        lines = generation_flops(shape, prompt_tokens=prompt, generated_tokens=length)
    total = total_flops(lines)
    if convention == "report":
        if prompt or mla == "absorbed":
            raise ValueError("the report's figure has no prompt and one curve for MLA")
        total, lines = report_flops(shape, length), []
    if plot is not None:
        from openm1.planner.plots import draw_figure

        draw_figure(plot)
    if json_:
        _print_json(about | {"total_flops": total, "lines": [_line(line) for line in lines]})
        return
    _show_flops(shape, about, total, lines)


def _line(line: FlopLine) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(line)


def _show_flops(
    shape: ModelShape, about: dict[str, Any], total: int, lines: list[FlopLine]
) -> None:
    from rich.console import Console

    from openm1.planner.tables import comparison_table, flops_table, short

    console = Console()
    console.print(
        f"[bold]{shape.name}[/bold]: {shape.num_params / 1e9:,.4g} B parameters, "
        f"{shape.num_active_params / 1e9:,.4g} B active; one multiply-add is 2 FLOPs"
    )
    if "train_tokens" in about:
        title = f"One training step on {about['batch']} x {about['train_tokens']:,} tokens"
        console.print(flops_table(title, lines))
        return
    prompt, length = about["prompt_tokens"], about["generated_tokens"]
    if lines:
        title = f"{length:,} tokens thought" + (f" after {prompt:,} of prompt" if prompt else "")
        console.print(flops_table(title, lines))
    else:
        console.print(f"{length:,} tokens as the report's Figure 1 counts: {short(total)}FLOPs")
    if length:
        console.print(comparison_table(prompt, length))


PLANS: dict[str, Callable[..., Any]] = {"flops": flops}
