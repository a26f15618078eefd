"""The product that oneDNN does where it is the faster one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from openm1.kernels import product

TOLERANCE = 2e-6
"""fp32 sums of up to 300 products, of the largest."""


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(product, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(32, 8, 24), (33, 24, 8), (300, 128, 4), (257, 17, 31)], ids=str)
@pytest.mark.parametrize("apart", [False, True])
def test_values_and_gradients_are_the_products(by_onednn, shape, apart):
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 2 * inputs, generator=generator)
    x = (x[:, ::2] if apart else x[:, :inputs].contiguous()).requires_grad_()
    weight = torch.randn(outputs, inputs, generator=generator).requires_grad_()
    grad = torch.randn(rows, outputs, generator=generator)
    out = product.linear(x, weight)
    assert "_Linear" in type(out.grad_fn).__name__
    found = out, *torch.autograd.grad(out, (x, weight), grad)
    wide = F.linear(x.double(), weight.double())
    expected = wide, *torch.autograd.grad(wide, (x, weight), grad.double())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= TOLERANCE * other.abs().max()


def test_only_what_needs_a_gradient_gets_one(by_onednn):
    x, weight = torch.ones(40, 8), torch.ones(3, 8, requires_grad=True)
    product.linear(x, weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((3, 8), 40.0))
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_other_kinds_are_torchs_own(by_onednn, dtype):
    rows = product.MIN_ROWS - 1 if dtype == torch.float32 else 64
    x, weight = torch.randn(rows, 8).to(dtype), torch.randn(3, 8).to(dtype).requires_grad_()
    out = product.linear(x, weight)
    assert "_Linear" not in type(out.grad_fn).__name__
    assert torch.equal(out, F.linear(x, weight))
