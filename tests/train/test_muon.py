from __future__ import annotations

import pytest
import torch
from torch import nn

from openm1.model.m1 import M1ForCausalLM
from openm1.train.muon import Muon, MuonWithAdamW, orthogonalize
from openm1.train.optim import AdamWConfig, make_optimizer
from tests.train.tiny import tiny_model


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48), (3, 24, 40)])
def test_singular_values_come_close_to_one(shape: tuple[int, ...]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.3 and values.max() < 1.3
    # The directions stay: u and v of the input still make the output diagonal and positive.
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ orthogonalize(matrix) @ vh.mT
    diagonal = torch.diagonal(inner, dim1=-2, dim2=-1)
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert (diagonal > 0).all()


def test_the_first_step_is_the_scaled_orthogonal_gradient():
    weight = nn.Parameter(torch.zeros(16, 48))
    gradient = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    weight.grad = gradient.clone()
    Muon([weight], lr=0.5).step()
    expected = -0.5 * 0.2 * 48**0.5 * orthogonalize(gradient)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)
    # Its root mean square is about AdamW's 0.2 at learning rate 1, whatever the shape.
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.1, rel=0.25)


def test_layers_matrices_are_muons_and_the_rest_adamws():
    model = tiny_model()
    optimizer = make_optimizer(model, AdamWConfig(learning_rate=1e-3, matrices="muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    muon, adamw = (
        {id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts
    )
    for name, parameter in model.named_parameters():
        inner = "layers" in name and parameter.ndim > 1 and ".gate.weight" not in name
        assert (id(parameter) in muon) == inner and (id(parameter) in adamw) != inner


def test_a_saved_state_goes_on_as_if_nothing_had_been():
    def run(num_steps: int, state: dict | None, model: M1ForCausalLM) -> dict:
        optimizer = make_optimizer(model, AdamWConfig(learning_rate=1e-2, matrices="muon"))
        if state is not None:
            optimizer.load_state_dict(state)
        for step in range(num_steps):
            ids = torch.arange(8)[None] + (step if state is None else step + 2)
            model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.state_dict()

    whole, parts = tiny_model(), tiny_model()
    run(4, None, whole)
    run(2, run(2, None, parts), parts)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
