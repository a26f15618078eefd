"""RMSNorm, plain and behind an output gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from openm1.kernels.cpu.blocks import rms_scale, sigmoid
from openm1.kernels.cpu.compile import kernel
from openm1.kernels.cpu.training.sharing import arrays, in_ranges

ONE = np.float32(1.0)


def rms_norm(
    x: Float[Tensor, "T C"], weight: Float[Tensor, " C"], eps: float
) -> Float[Tensor, "T C"]:
    """weight * x / sqrt(mean(x^2) + eps)."""
    return _RMSNorm.apply(x, weight, eps)


def gated_rms_norm(
    x: Float[Tensor, "T C"], gate: Float[Tensor, "T C"], weight: Float[Tensor, " C"], eps: float
) -> Float[Tensor, "T C"]:
    """sigmoid(gate) * weight * x / sqrt(mean(x^2) + eps)."""
    return _GatedRMSNorm.apply(x, gate, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out, scales = torch.empty_like(x), x.new_empty(len(x))
        in_ranges(_norm, len(x), np.float32(eps), *arrays(x, weight, out, scales))
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        to_x = torch.empty_like(x)
        given = x, weight, scales, grads[0].contiguous(), to_x
        parts = in_ranges(_norm_back, len(x), *arrays(*given))
        return to_x, torch.from_numpy(sum(parts)), None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, gate = x.contiguous(), gate.contiguous()
        out, scales = torch.empty_like(x), x.new_empty(len(x))
        in_ranges(_gated, len(x), np.float32(eps), *arrays(x, gate, weight, out, scales))
        ctx.save_for_backward(x, gate, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, gate, weight, scales = ctx.saved_tensors
        to_x, to_gate = torch.empty_like(x), torch.empty_like(x)
        given = x, gate, weight, scales, grads[0].contiguous(), to_x, to_gate
        parts = in_ranges(_gated_back, len(x), *arrays(*given))
        return to_x, to_gate, torch.from_numpy(sum(parts)), None


@kernel
def _norm(first, stop, eps, x, weight, out, scales):
    for t in range(first, stop):
        row, to = x[t], out[t]
        scale = rms_scale(row, eps, row.size)
        scales[t] = scale
        for i in range(row.size):
            to[i] = row[i] * scale * weight[i]


@kernel
def _norm_back(first, stop, x, weight, scales, grad, to_x):
    to_weight = np.zeros(weight.size, np.float32)
    for t in range(first, stop):
        row, above, to, scale = x[t], grad[t], to_x[t], scales[t]
        mean = np.float32(0.0)
        for i in range(row.size):
            mean += above[i] * weight[i] * row[i]
        mean *= scale * scale / np.float32(row.size)
        for i in range(row.size):
            to[i] = scale * (above[i] * weight[i] - row[i] * mean)
            to_weight[i] += above[i] * row[i] * scale
    return to_weight


@kernel
def _gated(first, stop, eps, x, gate, weight, out, scales):
    for t in range(first, stop):
        row, gates, to = x[t], gate[t], out[t]
        scale = rms_scale(row, eps, row.size)
        scales[t] = scale
        for i in range(row.size):
            to[i] = sigmoid(gates[i]) * (row[i] * scale * weight[i])


@kernel
def _gated_back(first, stop, x, gate, weight, scales, grad, to_x, to_gate):
    to_weight, opened = np.zeros(weight.size, np.float32), np.empty(weight.size, np.float32)
    for t in range(first, stop):
        row, gates, above, scale = x[t], gate[t], grad[t], scales[t]
        to, to_gates = to_x[t], to_gate[t]
        mean = np.float32(0.0)
        for i in range(row.size):
            share = sigmoid(gates[i])
            # The gradient of the norm's output, and of the gate.
            inside = above[i] * share
            normed = row[i] * scale
            to_gates[i] = inside * (ONE - share) * normed * weight[i]
            to_weight[i] += inside * normed
            opened[i] = inside * weight[i]
            mean += opened[i] * normed
        mean /= np.float32(row.size)
        for i in range(row.size):
            to[i] = scale * (opened[i] - row[i] * scale * mean)
    return to_weight
