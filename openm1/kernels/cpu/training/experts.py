"""The chosen experts' SwiGLU: tokens gathered by expert, products, and back to their places."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from openm1.kernels.cpu.blocks import sigmoid, silu
from openm1.kernels.cpu.compile import kernel
from openm1.kernels.cpu.training.norm import ONE
from openm1.kernels.cpu.training.sharing import arrays, in_ranges, trains_on_cpu
from openm1.kernels.product import product, weight_gradient


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `chosen_experts` is for these: plain fp32 on the CPU, and a gradient wanted."""
    return isinstance(weight, Tensor) and trains_on_cpu(x, weight)


def chosen_experts(
    x: Float[Tensor, "T C"],
    weights: Float[Tensor, "T K"],
    chosen: Int[Tensor, "T K"],
    w1: Float[Tensor, "E F C"],
    w3: Float[Tensor, "E F C"],
    w2: Float[Tensor, "E C F"],
) -> Float[Tensor, "T C"]:
    """sum_k weights_k W2_e (silu(W1_e x) * W3_e x), with e = chosen_k, K different ones."""
    return _ChosenExperts.apply(x, weights, chosen, w1, w3, w2)


class _ChosenExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, w1: Tensor, w3: Tensor, w2: Tensor
    ) -> Tensor:
        experts = chosen.flatten()
        counts = torch.bincount(experts, minlength=len(w1)).tolist()
        kept: list[Tensor] = []
        out = torch.zeros_like(x)
        for e, places in enumerate(experts.argsort(stable=True).split(counts)):
            tokens = places // chosen.shape[1]
            inputs, shares = x.index_select(0, tokens), weights.flatten()[places]
            gate, up = product(inputs, w1[e]), product(inputs, w3[e])
            hidden = torch.empty_like(up)
            in_ranges(_swiglu, len(tokens), *arrays(gate, up, shares, hidden))
            mixed = product(hidden, w2[e])
            in_ranges(_add_rows, len(tokens), *arrays(mixed, tokens, out))
            kept += [places, gate, up]
        ctx.save_for_backward(x, weights, w1, w3, w2, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weights, w1, w3, w2, *kept = ctx.saved_tensors
        to_x, to_weights = torch.zeros_like(x), weights.new_empty(weights.numel())
        to_w1, to_w3, to_w2 = (torch.empty_like(w) for w in (w1, w3, w2))
        for e in range(len(w1)):
            places, gate, up = kept[3 * e : 3 * e + 3]
            tokens = places // weights.shape[1]
            inputs, shares = x.index_select(0, tokens), weights.flatten()[places]
            above = grads[0].index_select(0, tokens)
            to_hidden, hidden = product(above, w2[e].T), torch.empty_like(up)
            to_gate, to_up, to_shares = (torch.empty_like(t) for t in (gate, up, shares))
            given = gate, up, shares, to_hidden, hidden, to_gate, to_up, to_shares
            in_ranges(_swiglu_back, len(tokens), *arrays(*given))
            to_weights[places] = to_shares
            to_inputs = product(to_gate, w1[e].T).add_(product(to_up, w3[e].T))
            in_ranges(_add_rows, len(tokens), *arrays(to_inputs, tokens, to_x))
            to_w1[e] = weight_gradient(inputs, to_gate)
            to_w3[e] = weight_gradient(inputs, to_up)
            to_w2[e] = weight_gradient(hidden, above)
        return to_x, to_weights.view_as(weights), None, to_w1, to_w3, to_w2


@kernel
def _swiglu(first, stop, gate, up, shares, hidden):
    for t in range(first, stop):
        gates, ups, to, share = gate[t], up[t], hidden[t], shares[t]
        for i in range(gates.size):
            to[i] = share * (silu(gates[i]) * ups[i])


@kernel
def _swiglu_back(first, stop, gate, up, shares, to_hidden, hidden, to_gate, to_up, to_shares):
    for t in range(first, stop):
        gates, ups, above, share = gate[t], up[t], to_hidden[t], shares[t]
        to, to_gates, to_ups = hidden[t], to_gate[t], to_up[t]
        total = np.float32(0.0)
        for i in range(gates.size):
            opened = sigmoid(gates[i])
            passed = gates[i] * opened
            total += above[i] * passed * ups[i]
            to[i] = share * passed * ups[i]
            to_ups[i] = share * above[i] * passed
            to_gates[i] = share * above[i] * ups[i] * (opened + passed * (ONE - opened))
        to_shares[t] = total


@kernel
def _add_rows(first, stop, rows, tokens, out):
    """No two rows are for the same token."""
    for i in range(first, stop):
        row, to = rows[i], out[tokens[i]]
        for c in range(row.size):
            to[c] += row[c]
