"""Norm and head: the two layers whose arithmetic is always fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from openm1.kernels.cpu.training import norm as training
from openm1.kernels.cpu.training.sharing import trains_on_cpu
from openm1.kernels.product import linear


class RMSNorm(nn.Module):
    """w * x * rsqrt(mean(x^2) + eps), statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        if x.ndim == 2 and trains_on_cpu(x, self.weight):
            return training.rms_norm(x, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), self.eps)
        return normed.to(x.dtype)

    def gated(
        self, x: Float[Tensor, "T size"], gate: Float[Tensor, "T size"]
    ) -> Float[Tensor, "T size"]:
        """sigmoid(gate) times the norm of `x`."""
        if trains_on_cpu(x, gate, self.weight):
            return training.gated_rms_norm(x, gate, self.weight, self.eps)
        return torch.sigmoid(gate) * self(x)


class Linear(nn.Linear):
    """Without bias; initialised by the model, not here."""

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=dtype)

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in fp32 (fp64 for fp64 inputs), for the router and the head."""
    work = torch.promote_types(x.dtype, torch.float32)
    return linear(x.to(work), weight.to(work))
