"""Rotary positions on the first `rotary_dim` dimensions of a head, in the NeoX half layout."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rope_tables(
    positions: Int[Tensor, " T"], rotary_dim: int, theta: float
) -> tuple[Float[Tensor, "T R"], Float[Tensor, "T R"]]:
    """Cosines and sines, fp32, R = rotary_dim / 2; angle_i = position * theta^(-2 i / rotary_dim).

    Angles are taken in fp64: at a million tokens an fp32 angle is off by several hundredths.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.to(torch.float64)[:, None] * theta ** (-exponent / rotary_dim)
    return angles.cos().float(), angles.sin().float()


def apply_rope(
    x: Float[Tensor, "T H D"], cos: Float[Tensor, "T R"], sin: Float[Tensor, "T R"]
) -> Float[Tensor, "T H D"]:
    """Rotates in fp32 (fp64 for fp64 inputs), returns the dtype of `x`."""
    half = cos.shape[-1]
    work = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[:, None, :].to(work), sin[:, None, :].to(work)
    first = x[..., :half].to(work)
    second = x[..., half : 2 * half].to(work)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    if 2 * half == x.shape[-1]:
        return rotated
    return torch.cat([rotated, x[..., 2 * half :]], -1)
