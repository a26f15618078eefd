"""The convention behind Figure 1 (right) of the M1 report, recovered from its three curves.

The report does not state it. Its curves are c1 L + c2 L^2 in the length L, and

  c2 = softmax layers x heads x (d_qk + 2 d_v)

fits all three: scores are counted for causal pairs, products with values for the whole square. For
c1 twice the parameters that a token goes through (with router and head) fits Qwen3. DeepSeek-R1
needs its input embedding on top, which DeepSeek's own "37 B active" has in it too. M1's curve is
that of 8 softmax and 72 lightning layers, where the model has 10 and 70, with the state of a
lightning layer counted as if it were one [H D, H D] matrix that is multiplied with once. These
readings have no fitted number in them and meet every point; others that do are possible.
Source of the points: the vector drawing of Figure 1 in arXiv 2506.13585, read off.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from importlib.resources import files

from openm1.planner.attention import GroupedQuery, Latent, Lightning
from openm1.planner.shape import ModelShape

M1_SOFTMAX_LAYERS_DRAWN = 8


def _active_params(shape: ModelShape) -> int:
    """That multiply one token, router and head included."""
    layers = sum(w.num_used_params for w in shape.layer_weights() if w.multiplies)
    return layers + shape.head_params


def _deepseek(shape: ModelShape) -> tuple[int, int]:
    embedding = shape.vocab_size * shape.hidden_size
    square = 0
    for layer in shape.layers:
        attention = layer.attention
        assert isinstance(attention, Latent)
        square += attention.num_heads * (attention.qk_head_dim + 2 * attention.v_head_dim)
    return 2 * (_active_params(shape) + embedding), square


def _qwen3(shape: ModelShape) -> tuple[int, int]:
    square = 0
    for layer in shape.layers:
        attention = layer.attention
        assert isinstance(attention, GroupedQuery)
        square += 3 * attention.num_heads * attention.head_dim
    return 2 * _active_params(shape), square


def _m1(shape: ModelShape) -> tuple[int, int]:
    by_kind = {layer.attention.kind: layer for layer in shape.layers}
    lightning, softmax = by_kind["lightning"].attention, by_kind["softmax"].attention
    assert isinstance(lightning, Lightning) and isinstance(softmax, GroupedQuery)
    drawn = {"softmax": M1_SOFTMAX_LAYERS_DRAWN}
    drawn["lightning"] = len(shape.layers) - drawn["softmax"]
    params = shape.head_params
    for kind, count in drawn.items():
        weights = by_kind[kind].weights(shape.hidden_size)
        params += count * sum(w.num_used_params for w in weights if w.multiplies)
    linear = 2 * params + drawn["lightning"] * 2 * lightning.size**2
    return linear, drawn["softmax"] * 3 * softmax.num_heads * softmax.head_dim


DRAWN: dict[str, Callable[[ModelShape], tuple[int, int]]] = {
    "minimax-m1": _m1,
    "m1-40k": _m1,
    "m1-80k": _m1,
    "deepseek-r1": _deepseek,
    "qwen3-235b-a22b": _qwen3,
}


def report_coefficients(shape: ModelShape) -> tuple[int, int]:
    """c1 and c2 of a model in the figure; raises ValueError for any other."""
    if shape.name not in DRAWN:
        raise ValueError(
            f"convention is 'report' and model {shape.name!r}; the report draws only "
            f"{', '.join(DRAWN)}"
        )
    return DRAWN[shape.name](shape)


def report_flops(shape: ModelShape, generated_tokens: int) -> int:
    """What the figure shows for a reply of this length (without a prompt)."""
    linear, square = report_coefficients(shape)
    return linear * generated_tokens + square * generated_tokens**2


@cache
def figure_points() -> dict[str, list[tuple[int, float]]]:
    """(generated tokens, FLOPs) of each curve, as drawn in the report."""
    points: dict[str, list[tuple[int, float]]] = {}
    text = files("openm1.planner").joinpath("figure1_flops.csv").read_text()
    for row in csv.DictReader(text.splitlines()):
        point = int(row["generation_tokens"]), float(row["total_flops"])
        points.setdefault(row["model"], []).append(point)
    return points
