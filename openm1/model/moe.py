"""Mixture of experts: every token to its top K of E, none dropped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from openm1.kernels.cpu.training import experts as training
from openm1.kernels.product import linear
from openm1.model.config import M1Config
from openm1.model.layers import Linear, linear_fp32

# Below this many multiply-adds per token for all experts together, one dense product over all of
# them beats sorting tokens by expert: the arithmetic saved is less than the cost of moving rows.
DENSE_MAX_MULTIPLY_ADDS = 400_000


# For bf16 products on a CPU a kernel is compiled, and kept, for every new shape, and an expert's
# share of the tokens is new each time: rounded up, few shapes come back again and again.
BF16_ROWS_MULTIPLE = 128


class Experts(nn.Module):
    """E SwiGLU experts, stacked: w1 and w3 [E, F, C], w2 [E, C, F]."""

    def __init__(self, config: M1Config) -> None:
        super().__init__()
        experts, width, size = (
            config.num_local_experts,
            config.intermediate_size,
            config.hidden_size,
        )
        self.w1 = nn.Parameter(torch.empty(experts, width, size))
        self.w3 = nn.Parameter(torch.empty(experts, width, size))
        self.w2 = nn.Parameter(torch.empty(experts, size, width))

    def whole(self) -> list[Tensor]:
        """w1, w3 and w2, each as one tensor also where they are kept in int8."""
        return [w if isinstance(w, Tensor) else w.full() for w in (self.w1, self.w3, self.w2)]


class MoE(nn.Module):
    """Router in fp32: softmax over all experts, top K, renormalised to sum 1.

    A single expert has nothing to route, and no `gate`.
    """

    def __init__(self, config: M1Config) -> None:
        super().__init__()
        self.config = config
        if config.num_local_experts > 1:
            # Kept in fp32 in models of any dtype: the published checkpoint stores it so.
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.gate = Linear(config.hidden_size, config.num_local_experts, dtype)
        self.experts = Experts(config)

    def forward(
        self,
        x: Float[Tensor, "T C"],
        given: Int[Tensor, "T K"] | None = None,
        seen: list[Tensor] | None = None,
    ) -> tuple[Float[Tensor, "T C"], Tensor]:
        """The mixed output and the auxiliary loss (a scalar, not yet scaled by its coefficient).

        Where gradients are off the loss is not computed, and 0. Tokens go to the `given` experts,
        except where those are -1; the router weighs them. To `seen`, the choices [T, K] are added.
        """
        no_loss = x.new_zeros((), dtype=torch.float32)
        if self.config.num_local_experts == 1:
            return experts_dense(x, x.new_ones(len(x), 1), self.experts), no_loss
        probs = linear_fp32(x, self.gate.weight).softmax(-1)  # [T, E]
        weights, chosen = probs.topk(self.config.num_experts_per_tok, -1)
        if given is not None:
            chosen = torch.where(given < 0, chosen, given)
            weights = probs.gather(1, chosen)
        if seen is not None:
            seen.append(chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        if training.fits(x, self.experts.w1):
            w1, w3, w2 = self.experts.whole()
            out = training.chosen_experts(x, weights, chosen, w1, w3, w2)
        elif self._dense_is_faster(len(x)):
            gates = torch.zeros_like(probs).scatter(1, chosen, weights)
            out = experts_dense(x, gates, self.experts)
        else:
            out = experts_sorted(x, weights, chosen, self.experts)
        return out, balance_loss(probs, chosen) if torch.is_grad_enabled() else no_loss

    def _dense_is_faster(self, num_tokens: int) -> bool:
        cost = 3 * self.experts.w1.numel()
        return num_tokens > 1 and cost <= DENSE_MAX_MULTIPLY_ADDS


def experts_dense(
    x: Float[Tensor, "T C"], gates: Float[Tensor, "T E"], experts: Experts
) -> Float[Tensor, "T C"]:
    """All experts as one wide SwiGLU, the unchosen ones' activations multiplied by a gate of 0."""
    w1, w3, w2 = experts.whole()
    hidden = F.silu(linear(x, w1.flatten(0, 1))) * linear(x, w3.flatten(0, 1))
    hidden = hidden.unflatten(-1, gates.shape[1:] + (-1,)) * gates.to(x.dtype)[..., None]
    return linear(hidden.flatten(1), w2.transpose(0, 1).flatten(1))


def experts_sorted(
    x: Float[Tensor, "T C"],
    weights: Float[Tensor, "T K"],
    chosen: Int[Tensor, "T K"],
    experts: Experts,
) -> Float[Tensor, "T C"]:
    """Tokens sorted by expert, one product per expert over its own rows."""
    num_choices = chosen.shape[1]
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=len(experts.w1)).tolist()
    outputs = []
    for e, rows in enumerate(x.index_select(0, order // num_choices).split(counts)):
        if len(rows):
            count = len(rows)
            if rows.dtype == torch.bfloat16 and rows.device.type == "cpu":
                rows = F.pad(rows, (0, 0, 0, -count % BF16_ROWS_MULTIPLE))
            hidden = F.silu(linear(rows, experts.w1[e])) * linear(rows, experts.w3[e])
            outputs.append(linear(hidden, experts.w2[e])[:count])
    by_expert = torch.cat(outputs)
    # Where each token's choices went; to fetch them is quicker than to add them up in place.
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=x.device)
    shares = weights.to(x.dtype)
    out = torch.zeros_like(x)
    for k in range(num_choices):
        chosen_rows = by_expert.index_select(0, places[k::num_choices])
        out = torch.addcmul(out, chosen_rows, shares[:, k, None])
    return out


def balance_loss(probs: Float[Tensor, "T E"], chosen: Int[Tensor, "T K"]) -> Tensor:
    """E * sum_e f_e P_e: f_e the share of tokens that chose e (they sum to K), P_e the mean
    probability. K when balanced. Source: Switch Transformer (arXiv 2101.03961), eq. 4, for K > 1
    as the published modeling file has it, but per layer."""
    num_experts = probs.shape[-1]
    share = torch.bincount(chosen.flatten(), minlength=num_experts).to(probs.dtype) / len(probs)
    return num_experts * (share * probs.mean(0)).sum()
