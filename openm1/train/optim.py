"""AdamW with M1's numbers, and Muon beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from openm1.train.muon import Muon, MuonWithAdamW


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig:
    """M1's betas and eps: its gradients span 1e-18 to 1e-5, where the usual eps of 1e-8 would
    drown most of them. Source: arXiv 2506.13585, section 3.2."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    matrices: Literal["adamw", "muon"] = "adamw"
    """What steps the matrices inside the layers; embedding, router, head and norms stay AdamW's."""
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        def need(good: bool, name: str, allowed: str) -> None:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}")

        need(self.learning_rate > 0, "learning_rate", "above 0")
        need(0 <= self.beta1 < 1, "beta1", "0 to below 1")
        need(0 <= self.beta2 < 1, "beta2", "0 to below 1")
        need(self.eps > 0, "eps", "above 0")
        need(self.weight_decay >= 0, "weight_decay", "0 or more")
        need(self.max_grad_norm > 0, "max_grad_norm", "above 0")


def make_optimizer(model: nn.Module, config: AdamWConfig) -> torch.optim.Optimizer:
    """Weight decay on matrices only."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if config.matrices == "muon" and _is_inner_matrix(name, p)]
    taken = {id(p) for p in inner}
    params = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    if not inner:
        return adamw
    muon = Muon(inner, lr=config.learning_rate, weight_decay=config.weight_decay)
    return MuonWithAdamW(muon, adamw)


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and ".layers." in name and not name.endswith(".gate.weight")
