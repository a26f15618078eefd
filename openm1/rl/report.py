"""`openm1 report RUN`: a run of reinforcement learning as one page to look at and to read in."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from openm1.chat.thinking import split_thought
from openm1.common.page import CHART_SCRIPT, Points, html_page, html_table, line_chart
from openm1.common.track import read_metrics
from openm1.rl.record import read_rollouts, recorded_steps

Rows = list[dict[str, Any]]

CHARTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Reward", {"reward": "rollout/reward", "accuracy": "rollout/accuracy"}),
    (
        "Length of replies (tokens)",
        {
            "mean": "rollout/length_mean_tokens",
            "99th percentile": "rollout/length_p99_tokens",
            "window": "rollout/window_tokens",
        },
    ),
    ("Entropy (nats)", {"policy": "rl/entropy_nats"}),
    ("Perplexity of the replies", {"sampler": "rollout/perplexity"}),
    ("Clipped and dropped tokens (share)", {"clipped": "rl/clipped_share"}),
    (
        "Weights of tokens",
        {
            "least": "rl/weight_min",
            "greatest": "rl/weight_max",
            "floor": "rl/weight_floor",
            "cap": "rl/weight_cap",
        },
    ),
    ("Correlation of trainer's and sampler's probabilities", {"r": "rl/probability_corr"}),
    (
        "Difference of trainer's and sampler's probabilities",
        {"greatest": "rl/probability_max_difference", "KL (nats)": "rl/sampler_kl_nats"},
    ),
    (
        "Groups (shares)",
        {
            "with signal": "rollout/signal_share",
            "all right": "rollout/all_right_share",
            "all wrong": "rollout/all_wrong_share",
            "unscored": "rollout/unscored_share",
        },
    ),
    (
        "Replies that ended badly (shares)",
        {
            "cut by the window": "rollout/truncated_share",
            "repetition": "rollout/repetition_share",
            "failed": "rollout/error_share",
        },
    ),
    ("Gradient norm", {"before clipping": "train/grad_norm"}),
    (
        "Throughput (tokens/s)",
        {"sampled": "time/sampled_tokens_per_s", "trained": "time/trained_tokens_per_s"},
    ),
    ("Seconds of a step", {"sampling": "time/sample_s", "training": "time/train_s"}),
    ("Staleness (policy versions)", {"mean": "rl/staleness_mean", "greatest": "rl/staleness_max"}),
    ("Value of the critic", {"loss": "critic/loss", "explained": "critic/explained_variance"}),
    ("Judge: reward against length", {"correlation": "genrm/length_corr"}),
)
"""What is drawn, where the run has it."""

STYLE = """
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.tiles div { background: var(--card); border-radius: 6px; padding: .5rem .9rem; }
.tiles b { display: block; font-size: 1.3rem; font-weight: 600; }
details { margin: .35rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
details.step > summary { font-size: 1.1rem; font-weight: 600; margin-top: 1rem; }
details.group { margin-left: .6rem; } details.rollout { margin-left: 1.4rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 75ch; margin: .4rem 0 .4rem 1rem;
  padding: .1rem .9rem; border-left: 3px solid var(--line); }
.text.thought { max-height: 60vh; overflow-y: auto; font-size: .9rem; line-height: 1.6; }
.text.answer { border-color: var(--c0); } .label { margin: .5rem 0 0 1rem; font-size: .8rem; }
.bar { position: sticky; top: 0; background: var(--back); padding: .5rem 0; z-index: 1; }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .15rem .8rem; cursor: pointer; }
button[aria-pressed=true] { border-color: var(--c0); box-shadow: inset 0 0 0 1px var(--c0); }
pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: 6px; }
"""

SCRIPT = """
for (const button of document.querySelectorAll(".bar button[data-kind]"))
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll(".bar button[data-kind]"))
      other.setAttribute("aria-pressed", other === button);
    const kind = button.dataset.kind;
    for (const rollout of document.querySelectorAll(".rollout"))
      rollout.hidden = kind !== "all" && !rollout.dataset.kinds.split(" ").includes(kind);
    for (const group of document.querySelectorAll(".group")) {
      const any = [...group.querySelectorAll(".rollout")].some(rollout => !rollout.hidden);
      group.hidden = !any; if (kind !== "all" && any) group.open = true;
    }
  });
document.querySelector("#fold")?.addEventListener("click", () => {
  for (const part of document.querySelectorAll(".group, .rollout")) part.open = false;
});
"""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What of a run is on the page."""

    steps: tuple[int, ...] = ()
    """Steps whose rollouts can be read; none chosen are five, spread over the run."""
    max_groups: int = 6
    """Prompts per step, those that taught something first."""
    max_rollouts: int = 8
    """Rollouts per prompt, right and wrong ones in turn."""

    def __post_init__(self) -> None:
        for name in ("max_groups", "max_rollouts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is 1 or more")


def write_report(run: Path, target: Path, config: ReportConfig | None = None) -> None:
    """Raises ValueError where `run` is no folder of an RL run, finished or not."""
    page = report_page(run, config or ReportConfig())
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)


def report_page(run: Path, config: ReportConfig) -> str:
    settings = _settings(run)
    rows = _rows(run)
    name = run.resolve().name
    parts = [f"<h1>{escape(name)}</h1>", _state(run, settings, rows)]
    if rows:
        parts += [
            _tiles(rows),
            f'<h2>Curves</h2><div class="charts">{_charts(rows)}</div>',
            f"<h2>Windows</h2>{_windows(rows)}",
            _errors(rows),
            f"<h2>Rollouts to read</h2>{_rollouts(run, rows, config)}",
        ]
    text = escape(json.dumps(settings, indent=2))
    parts.append(
        f"<h2>Configuration</h2><details><summary>config.json</summary><pre>{text}</pre></details>"
    )
    body = "\n".join(part for part in parts if part)
    return html_page(f"{name}: a run", body, style=STYLE, script=CHART_SCRIPT + SCRIPT)


def _settings(run: Path) -> dict[str, Any]:
    """config.json, once it is certain that the folder is a run of this kind."""
    file = run / "config.json"
    if not run.is_dir():
        raise ValueError(f"{run} is no folder; allowed is the folder of a run, like runs/chain/rl")
    if not file.is_file():
        raise ValueError(f"{run} has no config.json, so it is no run folder")
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    kind = settings.get("kind") if isinstance(settings, dict) else None
    if kind not in ("RLRun", "RLConfig"):
        raise ValueError(
            f"{run} holds a run of kind {kind!r}; a report is made of runs of `openm1 rl`"
        )
    return settings


def _rows(run: Path) -> Rows:
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    try:
        return read_metrics(file)
    except ValueError as error:
        raise ValueError(f"{file} has a line that is no JSON: {error}") from None


def _rl(settings: dict[str, Any]) -> dict[str, Any]:
    return settings["rl"] if settings["kind"] == "RLRun" else settings


def _state(run: Path, settings: dict[str, Any], rows: Rows) -> str:
    rl = _rl(settings)
    planned, done = rl["num_steps"], len(rows)
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    newest = f"newest checkpoint {saved[-1]}" if saved else "no checkpoint yet"
    if not rows:
        text = f"No step of {planned} is finished yet; {newest}."
    else:
        spent = sum(row.get("time/sample_s", 0) + row.get("time/train_s", 0) for row in rows)
        whole = "finished" if done >= planned else "not finished"
        text = f"{done} of {planned} steps, {whole}, {_duration(spent)}; {newest}."
    loss = rl["loss"]
    knobs = ", ".join(f"{key} {value}" for key, value in loss.items() if key != "kind")
    batch = (
        f"{rl['num_prompts']} prompts x {rl['group_size']}, {rl['num_updates']} updates per batch, "
        f"learning rate {rl['optimizer']['learning_rate']:g}, anchor {rl['anchor']['at']}"
    )
    what = f"{loss['kind']} ({knobs}); {batch}."
    return f'<p class="faint">{escape(text)}<br>{escape(what)}</p>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _tiles(rows: Rows) -> str:
    """First and last tenth of the run beside each other, since single steps are noisy."""
    part = max(1, len(rows) // 10)

    def change(name: str, form: str) -> str:
        first, last = _mean(rows[:part], name), _mean(rows[-part:], name)
        return "" if first is None or last is None else f"{first:{form}} &rarr; {last:{form}}"

    tiles = (
        ("reward", change("rollout/reward", ".3f")),
        ("accuracy", change("rollout/accuracy", ".1%")),
        ("tokens a reply", change("rollout/length_mean_tokens", ",.1f")),
        ("entropy, nats", change("rl/entropy_nats", ".3f")),
        ("agreement of probabilities", change("rl/probability_corr", ".5f")),
        ("sampled tokens/s", change("time/sampled_tokens_per_s", ",.0f")),
    )
    shown = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in tiles if value)
    return f'<div class="tiles">{shown}</div>'


def _mean(rows: Rows, name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return fmean(values) if values else None


def _charts(rows: Rows) -> str:
    grown = [
        after["step"]
        for before, after in pairwise(rows)
        if after.get("rollout/window_tokens") != before.get("rollout/window_tokens")
    ]
    return "".join(
        line_chart(
            title, {label: _points(rows, name) for label, name in curves.items()}, marks=grown
        )
        for title, curves in CHARTS
    )


def _points(rows: Rows, name: str) -> Points:
    return [(row["step"], row[name]) for row in rows if name in row]


def _windows(rows: Rows) -> str:
    """One line for each window; the dotted lines of the curves are where it grew."""
    lines = []
    for tokens, part in groupby(rows, lambda row: row.get("rollout/window_tokens")):
        inside = list(part)
        cells = [f"{tokens}", f"{inside[0]['step']} to {inside[-1]['step']}", f"{len(inside)}"]
        for name, form in (
            ("rollout/reward", ".3f"),
            ("rollout/accuracy", ".1%"),
            ("rollout/length_p99_tokens", ",.0f"),
            ("rollout/truncated_share", ".1%"),
            ("rollout/perplexity", ".3f"),
        ):
            value = _mean(inside, name)
            cells.append("" if value is None else f"{value:{form}}")
        lines.append(cells)
    head = ["window (tokens)", "steps", "number", "reward", "accuracy", "p99 length", "cut"]
    return html_table([*head, "perplexity"], lines)


def _errors(rows: Rows) -> str:
    names = sorted({name for row in rows for name in row if name.startswith("errors/")})
    counts = [(name, sum(row.get(name, 0) for row in rows)) for name in names]
    lines = [[name.removeprefix("errors/"), f"{count:g}"] for name, count in counts if count]
    return f"<h2>What went wrong</h2>{html_table(['', 'times'], lines)}" if lines else ""


def _rollouts(run: Path, rows: Rows, config: ReportConfig) -> str:
    # A killed run may leave rollouts of steps that will be done again.
    done = {row["step"] for row in rows}
    there = [step for step in recorded_steps(run) if step in done]
    if missing := set(config.steps) - set(there):
        raise ValueError(f"steps {sorted(missing)} have no rollouts; there are {_ranges(there)}")
    steps = list(config.steps) or _spread(there, 5)
    if not steps:
        return "<p>None were recorded.</p>"
    kinds = ("all", "right", "wrong", "cut", "failed")
    buttons = "".join(
        f'<button data-kind="{kind}" aria-pressed="{str(kind == "all").lower()}">{kind}</button> '
        for kind in kinds
    )
    bar = f'<div class="bar">{buttons}<button id="fold">fold all</button></div>'
    parts = [
        _step(step, read_rollouts(run, step), config, is_open=step == steps[-1]) for step in steps
    ]
    return bar + "".join(parts)


def _ranges(steps: Sequence[int]) -> str:
    return f"those of {steps[0]} to {steps[-1]}" if steps else "none"


def _spread(steps: Sequence[int], count: int) -> list[int]:
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _step(step: int, lines: Rows, config: ReportConfig, *, is_open: bool) -> str:
    groups: dict[int, Rows] = defaultdict(list)
    for line in lines:
        groups[line["group"]].append(line)
    ordered = sorted(groups.values(), key=lambda group: len({r["reward"] for r in group}) < 2)
    shown = ordered[: config.max_groups]
    rewards = [line["reward"] for line in lines if line["reward"] is not None]
    mean = f"mean reward {fmean(rewards):.3f}" if rewards else "no reward"
    note = f"{len(groups)} prompts, {len(lines)} rollouts, {mean}; {len(shown)} prompts shown"
    inside = "".join(_group(group, config) for group in shown)
    return (
        f'<details class="step"{" open" if is_open else ""}><summary>Step {step} '
        f'<span class="faint">{note}</span></summary>{inside}</details>'
    )


def _group(lines: Rows, config: ReportConfig) -> str:
    first = lines[0]
    rewards = [line["reward"] for line in lines if line["reward"] is not None]
    mean = f"{fmean(rewards):.2f}" if rewards else "no reward"
    inside = "".join(_rollout(line) for line in _alternating(lines)[: config.max_rollouts])
    head = f"{escape(first['family'])} &middot; {mean} &middot; {escape(_start(first['prompt']))}"
    prompt = _text("prompt", first["prompt"]) + _text("expected", first["expected"])
    return f'<details class="group"><summary>{head}</summary>{prompt}{inside}</details>'


def _alternating(lines: Rows) -> Rows:
    """Best, worst, next best, next worst, ..; failed ones last."""
    scored = sorted((r for r in lines if r["reward"] is not None), key=lambda r: -r["reward"])
    turns = [scored[i // 2] if i % 2 == 0 else scored[-1 - i // 2] for i in range(len(scored))]
    return turns + [line for line in lines if line["reward"] is None]


def _start(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:99] + "…"


def _rollout(line: dict[str, Any]) -> str:
    reward, failed = line["reward"], line["error"] is not None
    kinds = ["failed"] if failed else ["right" if reward >= 1 else "wrong"]
    kinds += ["cut"] if line["finish_reason"] in ("length", "repetition") else []
    thought, answer = split_thought(line["replies"][-1]) if line["replies"] else (None, "")
    verdict = "failed" if failed else f"{reward:g}"
    css = "right" if kinds[0] == "right" else "wrong"
    ended = {"length": ", cut by the window", "repetition": ", stopped for repeating itself"}
    about = f"{line['num_tokens']:,} tokens{ended.get(line['finish_reason'], '')}"
    head = (
        f'<span class="{css}">{verdict}</span> <span class="faint">{about}</span> '
        f"{escape(_start(answer if answer else thought or ''))}"
    )
    body = "".join(_turns(line)) + (_text("error", line["error"]) if failed else "")
    return (
        f'<details class="rollout" data-kinds="{" ".join(kinds)}"><summary>{head}</summary>'
        f"{body}</details>"
    )


def _turns(line: dict[str, Any]) -> list[str]:
    parts = []
    for number, reply in enumerate(line["replies"]):
        if number:
            parts.append(_text("environment", line["between"][number - 1]))
        thought, answer = split_thought(reply)
        if thought is not None:
            parts.append(_text("thought", thought))
        parts.append(_text("answer", answer))
    return parts


def _text(label: str, text: str) -> str:
    css = {"thought": "text thought", "answer": "text answer"}.get(label, "text")
    return f'<div class="label faint">{label}</div><div class="{css}">{escape(text)}</div>'
