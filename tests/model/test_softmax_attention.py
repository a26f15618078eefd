"""Attention in training on a CPU: all scores at once, against torch's own operator."""

from __future__ import annotations

import pytest
import torch

from openm1.kernels.packing import PackedLayout
from openm1.model import softmax_attention
from openm1.model.softmax_attention import attend_packed


@pytest.mark.parametrize("lengths", [[17], [1, 5, 33, 2], [64, 63, 9]])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_outputs_and_gradients_are_those_of_torchs_operator(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], groups: int
):
    layout, heads, dim = PackedLayout(lengths), 6, 8
    shapes = [(layout.num_tokens, n, dim) for n in (heads, groups, groups)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = torch.randn(shapes[0], dtype=torch.float64)

    def run() -> tuple[torch.Tensor, ...]:
        out = attend_packed(*tensors, layout)
        return out, *torch.autograd.grad((out * weights).sum(), tensors)

    plain = run()
    monkeypatch.setattr(softmax_attention, "PLAIN_MAX_TOKENS", 0)
    for ours, theirs in zip(plain, run(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
