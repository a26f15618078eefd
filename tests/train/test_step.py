from __future__ import annotations

from copy import deepcopy
from random import Random

import pytest
import torch

from openm1.data.packing import pack
from openm1.train.loss import score_tokens, supervised_loss
from openm1.train.optim import AdamWConfig, make_optimizer
from openm1.train.step import NonFiniteGradient, optimizer_step

from .tiny import gradients, random_examples, tiny_model, weights


def backward(model) -> None:
    batch = pack(random_examples(Random(0), 8, 5))
    supervised_loss(score_tokens(model, batch), 0.0).backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float):
    model = tiny_model()
    optimizer = make_optimizer(model, AdamWConfig())
    backward(model)
    optimizer_step(model, optimizer, learning_rate=0.01, max_grad_norm=1.0)
    backward(model)
    norm_weight = model.model.norm.weight
    assert norm_weight.grad is not None
    norm_weight.grad[3] = bad
    before, state = weights(model), deepcopy(optimizer.state_dict())
    with pytest.raises(NonFiniteGradient, match=str(bad)):
        optimizer_step(model, optimizer, learning_rate=0.01, max_grad_norm=1.0)
    assert torch.equal(weights(model), before)
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, state["state"][index][name])
    # Nor does it leak into the next step.
    assert float(gradients(model).abs().max()) == 0


def test_gradients_are_clipped_used_and_cleared():
    model = tiny_model()
    backward(model)
    gradient, before = gradients(model), weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    norm = optimizer_step(model, optimizer, learning_rate=0.1, max_grad_norm=0.5)
    assert norm == pytest.approx(float(gradient.norm()))
    assert norm > 0.5
    expected = before - 0.1 * gradient * (0.5 / norm)
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-7)
    assert float(gradients(model).abs().max()) == 0
