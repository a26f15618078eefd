from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openm1.model.config import M1Config
from openm1.model.moe import MoE, balance_loss, experts_dense, experts_sorted

from .tiny import one_expert_config, tiny_config

# fp32 rounding, relative to the largest: both paths add the same products in another order.
PATHS_ERROR = 3e-7
# The router's gradient is a difference of larger terms.
GRADIENTS_ERROR = 1e-6


def random_moe(config: M1Config, dtype: torch.dtype = torch.float32) -> MoE:
    moe = MoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
    return moe.to(dtype)


def route(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and numbers of the chosen experts, and the same as gates of all experts."""
    probs = (x @ moe.gate.weight.T).softmax(-1)
    weights, chosen = probs.topk(moe.config.num_experts_per_tok, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen, torch.zeros_like(probs).scatter(1, chosen, weights)


def both_paths(moe: MoE, x: Tensor) -> list[list[Tensor]]:
    """Output and gradients, of x, the router and the experts, on the dense and sorted path."""
    cotangent = torch.randn_like(x)
    results = []
    for path in ("dense", "sorted"):
        leaf = x.clone().requires_grad_()
        weights, chosen, gates = route(moe, leaf)
        if path == "dense":
            out = experts_dense(leaf, gates, moe.experts)
        else:
            out = experts_sorted(leaf, weights, chosen, moe.experts)
        gradients = torch.autograd.grad(out, [leaf, *moe.parameters()], cotangent)
        results.append([out, *gradients])
    return results


def test_dense_and_sorted_paths_are_equal() -> None:
    moe = random_moe(tiny_config(num_local_experts=8))
    dense, by_expert = both_paths(moe, torch.randn(33, 40))
    errors = [
        float((a - b).detach().abs().max() / a.detach().abs().max())
        for a, b in zip(dense, by_expert, strict=True)
    ]
    assert errors[0] <= PATHS_ERROR
    assert max(errors) <= GRADIENTS_ERROR


def test_dense_and_sorted_paths_are_one_function_in_fp64() -> None:
    moe = random_moe(tiny_config(num_local_experts=8), torch.float64)
    x = torch.randn(33, 40, dtype=torch.float64)
    for dense, by_expert in zip(*both_paths(moe, x), strict=True):
        torch.testing.assert_close(dense, by_expert, rtol=1e-12, atol=1e-12)


def test_the_router_takes_the_likeliest_and_their_weights_sum_to_one() -> None:
    moe = random_moe(tiny_config())
    x = torch.randn(9, 40)
    out, _ = moe(x)
    for row, token in zip(out, x, strict=True):
        probs = (moe.gate.weight @ token).softmax(0)
        first, second = probs.argsort(descending=True)[:2].tolist()
        expected = torch.zeros_like(row)
        for e in (first, second):
            w1, w2, w3 = (w[e] for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
            share = probs[e] / (probs[first] + probs[second])
            expected += share * (w2 @ (torch.nn.functional.silu(w1 @ token) * (w3 @ token)))
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_path_and_batch_do_not_change_a_token(num_tokens: int) -> None:
    moe = random_moe(tiny_config())
    x = torch.randn(num_tokens, 40)
    together, _ = moe(x)
    alone = torch.cat([moe(row[None])[0] for row in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_one_expert_has_no_router() -> None:
    moe = random_moe(one_expert_config())
    assert [name for name, _ in moe.named_parameters()] == [
        "experts.w1",
        "experts.w3",
        "experts.w2",
    ]
    out, loss = moe(torch.randn(5, 40))
    assert out.shape == (5, 40) and float(loss) == 0.0


def test_balance_loss_is_that_of_transformers() -> None:
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    logits = torch.randn(57, 8) * 2
    probs = logits.softmax(-1)
    ours = balance_loss(probs, probs.topk(2, -1).indices)
    theirs = minimax.load_balancing_loss_func((logits,), num_experts=8, top_k=2)
    torch.testing.assert_close(ours, theirs)


def test_balance_loss_is_k_when_balanced_and_more_when_not() -> None:
    even = torch.full((4, 4), 0.25)
    chosen = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    assert float(balance_loss(even, chosen)) == pytest.approx(2.0)
    skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 4)
    assert float(balance_loss(skewed, torch.tensor([[0, 1]] * 4))) == pytest.approx(3.2)
