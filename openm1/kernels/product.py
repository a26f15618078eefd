"""x W^T in fp32 on a CPU, in training by the faster of two libraries.

torch multiplies fp32 matrices by MKL, which on other makers' processors keeps to AVX2: less than
half of what AVX-512 can do. There oneDNN does it, whose product torch has for its compiler. Sums
are fp32 in both, in different orders.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MIN_ROWS = 32
"""For fewer, what oneDNN prepares takes longer than what it saves."""


def linear(x: Float[Tensor, "*T C"], weight: Float[Tensor, "N C"]) -> Float[Tensor, "*T N"]:
    """Without gradients torch's own; with them differentiable once where oneDNN does it."""
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    fits = x.ndim == 2 and len(x) >= MIN_ROWS and x.dtype == weight.dtype == torch.float32
    if trains and fits and x.device.type == "cpu" and onednn_is_faster():
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


@cache
def onednn_is_faster() -> bool:
    """True on a CPU with AVX-512 that is not Intel's."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not wide or not torch.backends.mkldnn.is_available():
        return False
    return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()


def product(a: Float[Tensor, "M C"], b: Float[Tensor, "N C"]) -> Float[Tensor, "M N"]:
    """a b^T in fp32 on the CPU, without a gradient of its own."""
    if len(a) >= MIN_ROWS and a.shape[1] > 0 and onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


def weight_gradient(x: Float[Tensor, "T C"], grad: Float[Tensor, "T N"]) -> Float[Tensor, "N C"]:
    """grad^T x: of W, where `grad` is that of x W^T."""
    if grad.shape[1] > x.shape[1] and onednn_is_faster():
        # There the wider of the two is better the second.
        return product(x.T, grad.T).T.contiguous()
    return product(grad.T, x.T)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        to_x = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        to_weight = weight_gradient(x, grad) if ctx.needs_input_grad[1] else None
        return to_x, to_weight
