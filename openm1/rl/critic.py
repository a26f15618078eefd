"""PPO's critic: a value head on the policy's hidden states, and generalised advantages from it.

The value of a token is what is expected of the rest of the rollout before that token is written,
so the head looks at the hidden state that the token is drawn from. A rollout has one reward, at its
end; tokens that the policy did not choose (prompts, the environment's turns) are steps of the
environment: they are skipped over, without a value of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openm1.data.packing import split_by_tokens
from openm1.model.m1 import M1ForCausalLM
from openm1.rl.batch import Sample, pack_samples
from openm1.train.optim import AdamWConfig, make_optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Critic:
    """Advantages from a learned value, not the group's mean (arXiv 1506.02438, 1707.06347)."""

    gamma: float = 1.0
    """Discount per token; 1 since a late right answer is worth what an early one is."""
    lam: float = 0.95
    """Of generalised advantages: 1 is reward minus value, 0 one step of difference."""
    num_epochs: int = 4
    """Passes over a batch by the value head; its hidden states are computed once."""
    clip: float | None = 0.2
    """The value may move so far from what it was when the batch came; None: freely."""
    normalise: bool = True
    """Advantages of a batch to mean 0 and deviation 1."""
    optimizer: AdamWConfig = field(
        default_factory=lambda: AdamWConfig(learning_rate=1e-2, eps=1e-8)
    )

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is 0 to 1")
        if self.num_epochs < 1:
            raise ValueError(f"num_epochs is {self.num_epochs}; allowed is at least 1")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; allowed is above 0, or None")


def gae(
    values: Float[Tensor, " M"], reward: float, *, gamma: float, lam: float
) -> Float[Tensor, " M"]:
    """Generalised advantages of one rollout's tokens, whose `reward` comes after the last.

    A_t = d_t + gamma lam A_{t+1}, d_t = gamma V_{t+1} - V_t, and d = reward - V at the last one
    (arXiv 1506.02438, eq. 16). A_t + V_t is the value's target.
    """
    after = torch.cat([values[1:] * gamma, values.new_tensor([reward])])
    deltas = after - values
    advantages = torch.empty_like(values)
    running = values.new_zeros(())
    for t in reversed(range(len(values))):
        running = deltas[t] + gamma * lam * running
        advantages[t] = running
    return advantages


def value_loss(
    values: Float[Tensor, " M"],
    old_values: Float[Tensor, " M"],
    targets: Float[Tensor, " M"],
    clip: float | None,
) -> Tensor:
    """Half the mean squared error; with `clip` the worse of it and of the clipped value's."""
    squares = (values - targets) ** 2
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        squares = torch.maximum(squares, (near - targets) ** 2)
    return 0.5 * squares.mean()


class ValueHead(nn.Module):
    """A linear map from the hidden state [M, C] to a value [M], in fp32, starting at 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.float())[:, 0]


class CriticTrainer:
    """The value head with its optimizer; `Stateful`, and so part of a run's checkpoint.

    The head alone is trained: the policy's layers learn from the policy's loss.
    """

    def __init__(self, model: M1ForCausalLM, config: Critic) -> None:
        self.model, self.config = model, config
        self.head = ValueHead(model.config.hidden_size).to(model.device)
        self.optimizer = make_optimizer(self.head.parameters(), config.optimizer)

    def learn(
        self, samples: Sequence[Sample], max_tokens: int
    ) -> tuple[list[Sample], dict[str, float]]:
        """The samples with an advantage for each token, by the values from before the head was
        trained on them; `Sample.reward` is what is predicted."""
        config = self.config
        hidden = self._hidden(samples, max_tokens)
        counts = [sample.num_loss_tokens for sample in samples]
        with torch.no_grad():
            old = self.head(hidden).cpu()
        pairs = zip(old.split(counts), samples, strict=True)
        advantages = torch.cat(
            [gae(v, s.reward, gamma=config.gamma, lam=config.lam) for v, s in pairs]
        )
        targets = advantages + old
        loss = self._fit(hidden, old.to(hidden.device), targets.to(hidden.device))
        error, spread = float((targets - old).var()), float(targets.var())
        metrics = {
            "critic/loss": loss,
            "critic/value_mean": float(old.mean()),
            "critic/explained_variance": 1 - error / spread if spread > 0 else 0.0,
        }
        if config.normalise and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        parts = advantages.split(counts)
        with_values = [
            replace(sample, advantages=tuple(part.tolist()))
            for sample, part in zip(samples, parts, strict=True)
        ]
        return with_values, metrics

    @torch.no_grad()
    def _hidden(self, samples: Sequence[Sample], max_tokens: int) -> Tensor:
        """[M, C] of the places that the samples' tokens are drawn from."""
        parts = []
        for group in split_by_tokens(samples, max_tokens):
            packed = pack_samples(group, self.model.device).packed
            hidden = self.model.model(packed.input_ids, packed.layout).hidden
            parts.append(hidden[packed.loss_mask])
        return torch.cat(parts)

    def _fit(self, hidden: Tensor, old: Tensor, targets: Tensor) -> float:
        """The loss before the last epoch's step."""
        loss = hidden.new_zeros(())
        for _ in range(self.config.num_epochs):
            loss = value_loss(self.head(hidden), old, targets, self.config.clip)
            self.optimizer.zero_grad()
            loss.backward()
            limit = self.config.optimizer.max_grad_norm
            nn.utils.clip_grad_norm_(self.head.parameters(), limit)
            self.optimizer.step()
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
