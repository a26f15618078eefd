"""One HTML file that needs nothing else: its frame, line charts as SVG, thoughts to read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
"""(x, y), by rising x."""

WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MAX_POINTS = 500
"""Points drawn of a curve: more than a screen has room for only make the file large."""

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --faint: #6b6b6b; --line: #d0d0d0;
  --back: #fff; --card: #f6f6f4; --right: #0a7a2f; --wrong: #b3261e;
  --c0: #2f5fd0; --c1: #d06a1f; --c2: #0a7a2f; --c3: #8a3fb5; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --faint: #9c9c9c; --line: #444;
  --back: #161616; --card: #202020; --right: #55c27a; --wrong: #f0857c;
  --c0: #86a8ff; --c1: #f0a35e; --c2: #55c27a; --c3: #cf97f0; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--back); }
h1 { margin-bottom: .2rem; overflow-wrap: anywhere; } h2 { margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
td, th { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
.faint { color: var(--faint); } .right { color: var(--right); } .wrong { color: var(--wrong); }
.thought { color: var(--faint); font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
figure { margin: 0; background: var(--card); border-radius: 6px; padding: .6rem .6rem .2rem; }
figcaption { font-size: .85rem; display: flex; gap: .2rem .8rem; flex-wrap: wrap; }
figcaption b { flex-basis: 100%; font-size: .95rem; }
figcaption span::before { content: "\\2014 "; }
svg { width: 100%; height: auto; display: block; font-size: 10px; }
svg text { fill: var(--faint); } svg .grid { stroke: var(--line); stroke-width: .5; }
svg .mark { stroke: var(--faint); stroke-dasharray: 2 3; }
svg .cursor { stroke: var(--text); stroke-width: .7; visibility: hidden; }
svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.s3 { stroke: var(--c3); }
.l0::before { color: var(--c0); } .l1::before { color: var(--c1); }
.l2::before { color: var(--c2); } .l3::before { color: var(--c3); }
"""

CHART_SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-curves]")) {
  const curves = JSON.parse(svg.dataset.curves), [low, high, left, right] =
    JSON.parse(svg.dataset.scale), labels = svg.closest("figure").querySelectorAll("figcaption i");
  const cursor = svg.querySelector(".cursor");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = low + (at - left) / (right - left) * (high - low);
    let nearest = curves[0][0];
    for (const curve of curves) for (const point of curve)
      if (Math.abs(point[0] - x) < Math.abs(nearest[0] - x)) nearest = point;
    const place = left + (right - left) * (nearest[0] - low) / (high - low || 1);
    cursor.setAttribute("x1", place); cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
    curves.forEach((curve, i) => {
      const here = curve.find(point => point[0] === nearest[0]);
      labels[i].textContent = here ? ` ${+here[1].toPrecision(4)} at ${nearest[0]}` : "";
    });
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    labels.forEach(label => label.textContent = "");
  });
}
"""


def html_page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole document; `body`, `style` and `script` stand in it as they are."""
    scripts = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style>\n{body}\n{scripts}</html>\n"
    )


def reply_line(thought: str, answer: str, *, is_right: bool) -> str:
    """A thought, the answer after it, and the verdict, on one line."""
    verdict = "right" if is_right else "wrong"
    return (
        f'<span class="thought">{escape(thought)}</span> &rarr; {escape(answer)} '
        f'<span class="{verdict}">{verdict}</span>'
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text, not markup."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def line_chart(title: str, curves: Mapping[str, Points], *, marks: Sequence[float] = ()) -> str:
    """A figure with at most four curves over the same x; `marks` are places on it.

    Values that are not finite are left out; a chart without any value is "".
    """
    shown = {name: _thinned(_finite(points)) for name, points in curves.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    assert len(shown) <= 4, "there are four colours"
    every = [point for points in shown.values() for point in points]
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    ticks = _ticks(min(y for _, y in every), max(y for _, y in every))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return round(LEFT + across * width, 1), round(TOP + (1 - up) * height, 1)

    parts = [_grid(ticks, place, x_low, x_high)]
    for mark in marks:
        x, _ = place(mark, ticks[0])
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{TOP + height}"/>')
    for number, points in enumerate(shown.values()):
        path = " ".join("{},{}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline class="s{number}" points="{path}"/>')
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{TOP + height}"/>')
    keys = "".join(
        f'<span class="l{number}">{escape(name)}<i></i></span>' for number, name in enumerate(shown)
    )
    data = escape(json.dumps([[[x, float(f"{y:.6g}")] for x, y in p] for p in shown.values()]))
    scale = json.dumps([x_low, x_high, LEFT, WIDTH - RIGHT])
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{keys}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-curves="{data}" data-scale="{scale}">{"".join(parts)}</svg></figure>'
    )


def _grid(
    ticks: list[float],
    place: Callable[[float, float], tuple[float, float]],
    x_low: float,
    x_high: float,
) -> str:
    lines = []
    step = ticks[1] - ticks[0]
    for tick in ticks:
        _, y = place(x_low, tick)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(
            f'<text x="{LEFT - 4}" y="{y + 3}" text-anchor="end">{_label(tick, step)}</text>'
        )
    foot = HEIGHT - 8
    lines.append(f'<text x="{LEFT}" y="{foot}">{x_low:g}</text>')
    if x_high > x_low:
        lines.append(f'<text x="{WIDTH - RIGHT}" y="{foot}" text-anchor="end">{x_high:g}</text>')
    return "".join(lines)


def _label(tick: float, step: float) -> str:
    """With the digits in which neighbouring ticks differ."""
    if step >= 1000:
        return f"{tick / 1000:,g}k"
    if step >= 1 or step < 1e-5:
        return f"{tick:.3g}" if step < 1e-5 else f"{tick:g}"
    digits = -math.floor(math.log10(step * 1.001))
    is_quarter = not f"{step:.1e}".startswith(("1.0", "2.0", "5.0"))
    return f"{tick:.{digits + is_quarter}f}"


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every n-th point and the last, `MAX_POINTS` and one at most."""
    stride = -(-len(points) // MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around low and high."""
    # What moves in its last digits alone is drawn as flat as it is.
    least = 1e-4 * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]
