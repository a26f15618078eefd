"""The pieces of a layer in training, against plain torch in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openm1.kernels import product
from openm1.kernels.cpu.training import attention, experts, lightning, norm, sharing
from openm1.kernels.lightning.naive import lightning_naive
from openm1.kernels.packing import PackedLayout
from openm1.model.config import M1_40K, PRESETS
from openm1.model.lightning_attention import layer_slopes
from openm1.model.m1 import M1ForCausalLM

ERROR = 1e-5
"""fp32 sums of some hundred terms, of the largest entry."""
LENGTHS = [[1], [63], [64], [65], [300], [1, 7, 8, 9, 130, 2], [200, 1, 64, 70]]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that a kernel allocates and forgets to fill holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Laid out with gaps, as parts of a larger tensor are."""
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    wide = [torch.randn(*shape, 2, generator=generator) for shape in shapes]
    return [x[..., 0].requires_grad_() for x in wide]


def compare(
    ours: Callable[..., Tensor], truth: Callable[..., Tensor], tensors: list[Tensor]
) -> list[Tensor]:
    """Values and gradients are those of `truth` in fp64; returns ours."""
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, expected = ours(*tensors), truth(*exact)
    (grad,) = inputs(out.shape)
    found = [out, *torch.autograd.grad(out, tensors, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        # The first token's query has a gradient of 0.
        scale = float(other.detach().abs().max()) or 1.0
        assert (one - other).detach().abs().max() <= ERROR * scale
    return found


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("width", [8, 128, 130])
def test_norm(threads: int, rows: int, width: int):
    x, gate, weight = inputs((rows, width), (rows, width), (width,))
    weight = weight.detach().contiguous().requires_grad_()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight, 1e-5)

    compare(lambda x, w: norm.rms_norm(x, w, 1e-5), plain, [x, weight])
    compare(
        lambda x, g, w: norm.gated_rms_norm(x, g, w, 1e-5),
        lambda x, g, w: torch.sigmoid(g) * plain(x, w),
        [x, gate, weight],
    )


def plain_experts(x: Tensor, weights: Tensor, chosen: Tensor, w1, w3, w2) -> Tensor:
    out = torch.zeros_like(x)
    for k in range(chosen.shape[1]):
        for e in range(len(w1)):
            mine = (chosen[:, k] == e).to(x.dtype) * weights[:, k]
            out = out + mine[:, None] * ((F.silu(x @ w1[e].T) * (x @ w3[e].T)) @ w2[e].T)
    return out


@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 2), (9, 3)])
@pytest.mark.parametrize("tokens", [1, 4, 70])
def test_experts(
    threads: int,
    num_experts: int,
    top_k: int,
    tokens: int,
    by_onednn: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    if by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(product, "onednn_is_faster", lambda: by_onednn)
    size, width = 24, 40
    generator = torch.Generator().manual_seed(tokens)
    # The last of nine experts is nobody's choice.
    options = torch.rand(tokens, min(num_experts, 8), generator=generator)
    chosen = options.topk(top_k, -1).indices
    shapes = (tokens, size), (tokens, top_k), (num_experts, width, size)
    tensors = inputs(*shapes, (num_experts, width, size), (num_experts, size, width))
    found = compare(
        lambda x, g, *w: experts.chosen_experts(x, g, chosen, *w),
        lambda x, g, *w: plain_experts(x, g, chosen, *w),
        tensors,
    )
    if num_experts == 9:
        assert all(not grad[8].any() for grad in found[3:])


@pytest.mark.parametrize("dim", lightning.HEAD_DIMS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lightning(threads: int, dim: int, lengths: list[int]):
    layout = PackedLayout(lengths)
    # M1's fastest and slowest heads; six are a unit and a half.
    slopes = torch.cat([layer_slopes(M1_40K, layer)[[0, 30, -1]] for layer in (0, 78)])

    def plain(projected: Tensor) -> Tensor:
        q, k, v = F.silu(projected).unflatten(1, (len(slopes), -1)).chunk(3, -1)
        return lightning_naive(q, k, v, slopes, layout=layout)[0].flatten(1)

    projected = inputs((layout.num_tokens, 3 * dim * len(slopes)))
    compare(lambda x: lightning.lightning_silu(x, slopes, layout), plain, projected)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dim", [16, 48])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention(threads: int, groups: int, dim: int, lengths: list[int]):
    layout = PackedLayout(lengths)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        outputs = []
        for part in parts:
            heads = [x.transpose(0, 1).repeat_interleave(6 // x.shape[1], 0) for x in part]
            out = F.scaled_dot_product_attention(*heads, is_causal=True)
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs)

    tensors = inputs(*((layout.num_tokens, heads, dim) for heads in (6, groups, groups)))
    compare(lambda *x: attention.causal_attention(*x, layout), plain, tensors)


def test_large_scores_have_their_softmax():
    """Without the largest score taken off, these weights would be infinite, or all 0."""
    layout = PackedLayout([20])
    q, k, v = inputs((20, 1, 16), (20, 1, 16), (20, 1, 16))
    for sign in (300.0, -300.0):
        out = attention.causal_attention(q * 0 + sign, k * 0 + 1, v, layout)
        running_mean = v[:, 0].double().cumsum(0) / torch.arange(1, 21)[:, None]
        assert (out[:, 0] - running_mean).detach().abs().max() < ERROR


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_lost(bad: float):
    """A step must see it, and be refused."""
    layout, slopes = PackedLayout([9, 9]), torch.tensor([0.5, 0.1])

    def spoil(shape: tuple[int, ...]) -> Tensor:
        x = torch.ones(shape)
        x[3, 0] = bad
        return x

    clean = torch.ones(18, 2, 16)
    tainted = spoil((18, 2, 16))
    results = [
        norm.rms_norm(spoil((18, 32)), torch.ones(32), 1e-5),
        norm.gated_rms_norm(clean.flatten(1), spoil((18, 32)) * torch.nan, torch.ones(32), 1e-5),
        lightning.lightning_silu(spoil((18, 96)), slopes, layout),
        attention.causal_attention(tainted, clean, clean, layout).flatten(1),
        attention.causal_attention(clean, tainted, clean, layout).flatten(1),
        attention.causal_attention(clean, clean, tainted, layout).flatten(1),
    ]
    for out in results:
        assert not out[3].isfinite().all()


def test_taken_only_for_gradients_in_fp32():
    x = torch.ones(4, 16)
    assert not sharing.trains_on_cpu(x)
    x.requires_grad_()
    assert sharing.trains_on_cpu(x)
    with torch.no_grad():
        assert not sharing.trains_on_cpu(x)
    assert not sharing.trains_on_cpu(x, x.double())
    assert not lightning.fits(x, 24) and lightning.fits(x, 32)


def test_a_whole_model_has_the_gradients_of_fp64():
    model = M1ForCausalLM(PRESETS["nano"], seed=1)
    exact = M1ForCausalLM(PRESETS["nano"], dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    layout = PackedLayout([40, 3, 90])
    ids = torch.randint(0, 800, (layout.num_tokens,), generator=torch.Generator().manual_seed(2))
    losses = []
    for one in (model, exact):
        output = one.model(ids, layout)
        logits = one.logits(output.hidden)
        losses.append(F.cross_entropy(logits[:-1], ids[1:]) + output.aux_loss)
        losses[-1].backward()
    names = _functions(losses[0].grad_fn)
    assert {"_LightningBackward", "_AttentionBackward", "_ChosenExpertsBackward"} <= names
    assert {"_RMSNormBackward", "_GatedRMSNormBackward"} <= names
    assert abs(losses[0] - losses[1]) < ERROR
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2 * ERROR, name


def _functions(node) -> set[str]:
    """Names of all gradient functions behind one."""
    seen, left = set(), [node]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    return {type(node).__name__ for node in seen}
