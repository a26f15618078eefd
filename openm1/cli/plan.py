"""`openm1 plan flops|memory|run|price`: what a thought costs, before it is paid. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    from openm1.planner.cost import PriceTier, Service, ThoughtCost, TokenCost
    from openm1.planner.flops import FlopLine
    from openm1.planner.shape import ModelShape

DESCRIPTION = """What a thought, a context or a training run costs: counted from a config.

MODEL is minimax-m1, m1-40k, m1-80k, nano, deepseek-r1, qwen3-235b-a22b, a folder with a
config.json of one of these families, or that file."""

Json = Annotated[bool, arg(name="json")]
Mla = Literal["expanded", "absorbed"]
Weights = Literal["bfloat16", "float32", "int8", "int8-experts", "fp8"]
Shard = Literal["nothing", "optimizer", "all"]
DEFAULT_GENERATE = 65_536
PRICED_MODELS = ("minimax-m1", "m1-40k", "m1-80k")
PLOTTED_LENGTHS = tuple(2**n for n in range(10, 21))


def _shape(model: str, mla: Mla | None) -> ModelShape:
    """Engines keep the latent of MLA, so where nothing is said it is absorbed."""
    from openm1.planner.models import has_latent, read_shape, with_absorbed_latent

    shape = read_shape(model)
    absorbed = has_latent(shape) if mla is None else mla == "absorbed"
    return with_absorbed_latent(shape) if absorbed else shape


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
        _print_json(about | {"total_flops": total, "lines": [asdict(line) for line in lines]})
        return
    _show_flops(shape, about, total, lines)


def _show_flops(
    shape: ModelShape, about: dict[str, Any], total: int, lines: list[FlopLine]
) -> None:
    from rich.console import Console

    from openm1.planner.tables import billions, comparison_table, flops_table, short

    console = Console()
    console.print(
        f"[bold]{shape.name}[/bold]: {billions(shape.num_params)} parameters, "
        f"{billions(shape.num_active_params)} active; one multiply-add is 2 FLOPs"
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


def memory(
    *,
    model: str = "minimax-m1",
    weights: Weights | None = None,
    context: int = 1_048_576,
    sequences: int = 1,
    device: str | None = None,
    tensor: int = 8,
    expert: int = 1,
    pipeline: int = 1,
    data: int = 1,
    shard: Shard = "nothing",
    train: int | None = None,
    recompute: bool = False,
    usable: float = 0.9,
    mla: Mla | None = None,
    json_: Json = False,
    plot: Path | None = None,
) -> None:
    """The smallest fleet for --sequences of --context tokens; with --device what lies on each one.

    --tensor, --expert, --pipeline, --data and --shard (what data copies divide) say how the model
    is laid over devices. --train TOKENS is training with so many tokens on each data copy at a
    time, --recompute with activation checkpointing. --plot FILE draws caches against the context.
    """
    from openm1.planner.devices import find_device
    from openm1.planner.memory import FORMATS, Layout, serving_memory, training_memory

    shape = _shape(model, mla)
    if plot is not None:
        _plot_memory(plot)
    if recompute and train is None:
        raise ValueError("--recompute is of training; give --train TOKENS")
    if device is None:
        if train is not None or (tensor, expert, pipeline, data, shard) != (8, 1, 1, 1, "nothing"):
            raise ValueError("--train and a layout need a --device")
        _show_fleets(shape, weights, sequences, context, usable, json_)
        return
    layout = Layout(tensor=tensor, expert=expert, pipeline=pipeline, data=data, shard=shard)
    format_, where = FORMATS[weights or "bfloat16"], find_device(device)
    if train is not None:
        result = training_memory(shape, format_, layout, num_tokens=train, recompute=recompute)
        what = f"training on {train:,} tokens on each of {data} copies"
    else:
        result = serving_memory(
            shape, format_, layout, num_sequences=sequences, context_tokens=context
        )
        what = f"{sequences} x {context:,} tokens"
    if json_:
        about = {"model": model, "device": where.name, "num_devices": layout.num_devices}
        _print_json(about | asdict(result) | {"total_bytes": result.total_bytes})
        return
    from rich.console import Console

    from openm1.planner.tables import memory_table

    title = f"{shape.name}, {weights or 'bfloat16'}, {layout.num_devices} x {where.name}: {what}"
    Console().print(memory_table(title, result, where, usable))


def _show_fleets(
    shape: ModelShape,
    weights: Weights | None,
    sequences: int,
    context: int,
    usable: float,
    as_json: bool,
) -> None:
    from openm1.planner.devices import DEVICES
    from openm1.planner.fleet import smallest_fleet
    from openm1.planner.memory import FORMATS

    formats = [weights] if weights else ["bfloat16", "fp8", "int8-experts"]
    fits = [
        (
            name,
            device.name,
            smallest_fleet(
                shape,
                FORMATS[name],
                device,
                num_sequences=sequences,
                context_tokens=context,
                usable=usable,
            ),
        )
        for name in formats
        for device in DEVICES.values()
    ]
    if as_json:
        rows = [
            {"weights": name, "device": device, "fit": None if fit is None else asdict(fit)}
            for name, device, fit in fits
        ]
        _print_json({"model": shape.name, "fleets": rows})
        return
    from rich.console import Console

    from openm1.planner.tables import fleet_table

    title = f"{shape.name}: {sequences} x {context:,} tokens in {usable:.0%} of the memory"
    Console().print(fleet_table(title, fits))


def _plot_memory(path: Path) -> None:
    from openm1.planner.memory import FORMATS, Layout, serving_memory
    from openm1.planner.plots import draw_memory

    curves = {}
    for name in ("minimax-m1", "deepseek-r1", "qwen3-235b-a22b"):
        shape, points = _shape(name, None), []
        for context in PLOTTED_LENGTHS:
            one = serving_memory(
                shape, FORMATS["bfloat16"], Layout(), num_sequences=1, context_tokens=context
            )
            points.append((context, one.cache_bytes + one.state_bytes))
        curves[name] = points
    draw_memory(path, "keys, values, latents and states in bf16", curves)


def run(
    *,
    model: str = "minimax-m1",
    device: str = "h800",
    devices: int = 512,
    days: float = 21.0,
    usd: float = 534_700.0,
    reply: int = 20_000,
    weights: Weights = "bfloat16",
    compute_utilisation: float = 0.4,
    bandwidth_utilisation: float = 0.6,
    mla: Mla | None = None,
    json_: Json = False,
) -> None:
    """An RL run checked line by line; as it stands that of M1: 512 H800, three weeks, $534,700.

    --reply is the mean length of what is written and trained on (not published: an assumption), the
    utilisations are the shares of the devices' peaks that are reached.
    """
    from openm1.planner.cost import run_cost
    from openm1.planner.devices import find_device
    from openm1.planner.memory import FORMATS
    from openm1.planner.roofline import Utilisation

    result = run_cost(
        _shape(model, mla),
        FORMATS[weights],
        find_device(device),
        num_devices=devices,
        days=days,
        usd=usd,
        reply_tokens=reply,
        utilisation=Utilisation(compute=compute_utilisation, bandwidth=bandwidth_utilisation),
    )
    if json_:
        _print_json({"model": model, "device": device, "reply_tokens": reply, **asdict(result)})
        return
    from rich.console import Console

    from openm1.planner.tables import run_table

    title = (
        f"RL of {model} on {devices} x {device} for {days:g} days; "
        f"{compute_utilisation:.0%} of compute, {bandwidth_utilisation:.0%} of bandwidth reached"
    )
    Console().print(run_table(title, result, reply))


def price(
    *,
    model: str = "minimax-m1",
    device: str = "h800",
    devices: int = 8,
    weights: Weights = "int8-experts",
    thoughts: tuple[int, ...] = (40_960, 81_920),
    prompt: int = 1024,
    batch: int | None = None,
    usd_per_hour: float | None = None,
    cny_per_usd: float = 7.2,
    compute_utilisation: float = 0.4,
    bandwidth_utilisation: float = 0.6,
    mla: Mla | None = None,
    json_: Json = False,
    plot: Path | None = None,
) -> None:
    """What a thought costs in time and money, and M1's launch prices against that.

    The engine runs as many sequences at a time as fit, or --batch. --usd-per-hour is the rent of
    one device; known is only what the M1 report paid for an H800. --device cpu measures this one.
    --plot FILE draws cost against the length of a thought.
    """
    from openm1.planner.cost import Service, thought_cost
    from openm1.planner.devices import find_device
    from openm1.planner.fleet import serving_layout
    from openm1.planner.memory import FORMATS
    from openm1.planner.roofline import Utilisation

    where = find_device(device)
    rent = where.usd_per_hour if usd_per_hour is None else usd_per_hour
    if rent is None:
        raise ValueError(f"the rent of one {device} is not known; give --usd-per-hour")
    service = Service(
        shape=_shape(model, mla),
        format_=FORMATS[weights],
        device=where,
        layout=serving_layout(devices),
        usd_per_hour=rent,
        utilisation=Utilisation(compute=compute_utilisation, bandwidth=bandwidth_utilisation),
    )

    def cost(length: int) -> ThoughtCost:
        return thought_cost(service, prompt_tokens=prompt, generated_tokens=length, batch=batch)

    costs = [cost(length) for length in thoughts]
    tiers = _tiers(service, cny_per_usd) if model in PRICED_MODELS else []
    if plot is not None:
        from openm1.planner.plots import draw_thoughts

        lengths = [length for length in PLOTTED_LENGTHS if length <= max(thoughts)]
        draw_thoughts(plot, f"{model}, {devices} x {device}", [(n, cost(n).usd) for n in lengths])
    if json_:
        _print_json(
            {
                "model": model,
                "device": device,
                "usd_per_device_hour": rent,
                "thoughts": [asdict(each) for each in costs],
                "tiers": [[asdict(part) for part in row] for row in tiers],
            }
        )
        return
    from rich.console import Console

    from openm1.planner.tables import price_table, thought_table

    console = Console()
    console.print(
        f"[bold]{model}[/bold], {weights} on {devices} x {where.name} at ${rent:.2f} an hour each; "
        f"{compute_utilisation:.0%} of compute and {bandwidth_utilisation:.0%} of bandwidth reached"
    )
    console.print(thought_table(f"Thoughts after {prompt:,} tokens of prompt", costs))
    if tiers:
        title = f"Launch prices and cost, yuan for a million tokens, {cny_per_usd:g} yuan a dollar"
        console.print(price_table(title, tiers))


def _tiers(service: Service, cny_per_usd: float) -> list[tuple[PriceTier, TokenCost, TokenCost]]:
    """Each launch price with the cost at both ends of its tier."""
    from openm1.planner.cost import PRICE_TIERS, token_cost

    return [
        (
            tier,
            token_cost(service, tier.least_input_tokens, cny_per_usd),
            token_cost(service, tier.most_input_tokens, cny_per_usd),
        )
        for tier in PRICE_TIERS
    ]


PLANS: dict[str, Callable[..., Any]] = {
    "flops": flops,
    "memory": memory,
    "run": run,
    "price": price,
}
