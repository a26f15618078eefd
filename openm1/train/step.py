"""One optimizer step."""

from __future__ import annotations

import torch

from openm1.common.errors import RunStopped
from openm1.model.m1 import M1ForCausalLM


class NonFiniteGradient(RunStopped):
    """A step's gradient was not finite; the weights were left as they were."""


def optimizer_step(
    model: M1ForCausalLM,
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: float,
    max_grad_norm: float,
) -> float:
    """Clips, steps and clears the gradients; returns their norm before clipping.

    Raises NonFiniteGradient before anything is changed.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if not bool(torch.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteGradient(f"gradient norm is {float(norm)}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)
