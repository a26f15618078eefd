from __future__ import annotations

import pytest
import torch
from torch import nn

from openm1.train.optim import AdamWConfig, make_optimizer


def test_the_defaults_are_those_of_m1():
    groups = make_optimizer(nn.Linear(2, 2), AdamWConfig()).param_groups
    for group in groups:
        assert group["betas"] == (0.9, 0.95)
        assert group["eps"] == 1e-15


def test_a_tiny_gradient_moves_a_weight_by_the_learning_rate():
    # At the usual eps of 1e-8 it would move it by a ten-thousandth of that.
    weight = nn.Parameter(torch.zeros(1, 2))
    optimizer = make_optimizer(nn.ParameterList([weight]), AdamWConfig(learning_rate=0.5))
    weight.grad = torch.tensor([[1e-12, -1e-12]])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[-0.5, 0.5]]), rtol=0.01, atol=0)


def test_only_matrices_decay():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    config = AdamWConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(nn.ParameterList([matrix, vector]), config)
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
    assert torch.equal(vector.detach(), torch.ones(2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("max_grad_norm", 0.0),
    ],
)
def test_impossible_numbers_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        AdamWConfig(**{name: value})
