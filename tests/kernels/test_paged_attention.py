from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openm1.kernels import paged_attention
from openm1.kernels.cpu.tiles import tiles_available
from openm1.kernels.paged_attention import paged_decode_attention, paged_prefill_attention, soften

# Against fp64 over the same numbers, relative to the norm. fp32 sums some hundred terms; bf16
# rounds weights.
ERRORS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3}
HEADS, GROUPS, DIM, PAGE_TOKENS, NUM_PAGES = 6, 2, 8, 5, 70
# New tokens and those before them: less than a page, a page, several blocks, several tiles.
SHAPES = [(1, 0), (1, 299), (5, 0), (7, 3), (64, 0), (64, 64), (130, 200), (300, 0)]


def paged(lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Random keys and values in scattered pages, NaN wherever no token is; and the page tables."""
    keys, values = torch.full((2, NUM_PAGES, PAGE_TOKENS, GROUPS, DIM), torch.nan, dtype=dtype)
    free, tables = torch.randperm(NUM_PAGES), []
    for length in lengths:
        count = -(-length // PAGE_TOKENS)
        table, free = free[:count], free[count:]
        at = torch.arange(length)
        for pool in (keys, values):
            pool[table[at // PAGE_TOKENS], at % PAGE_TOKENS] = torch.randn(
                length, GROUPS, DIM, dtype=torch.float64
            ).to(dtype)
        tables.append(table)
    return keys, values, tables


def exact(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, total: int) -> Tensor:
    """The last queries of a sequence, in fp64, one by one."""
    k, v = (
        x[table].flatten(0, 1)[:total].double().repeat_interleave(HEADS // GROUPS, 1)
        for x in (keys, values)
    )
    out = torch.empty(q.shape, dtype=torch.float64)
    for i, row in enumerate(q.double()):
        seen = total - len(q) + i + 1
        scores = torch.einsum("hd,lhd->hl", row, k[:seen]) / math.sqrt(DIM)
        out[i] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v[:seen])
    return out


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.fixture(
    params=[
        ("tiles", torch.float64),
        ("tiles", torch.float32),
        ("tiles", torch.bfloat16),
        ("compiled", torch.bfloat16),
    ],
    ids=str,
)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Either way to prefill, with blocks and tiles so small that every loop is taken twice."""
    compiled = request.param[0] == "compiled"
    if compiled and not tiles_available():
        pytest.skip("this CPU has no tile unit")
    monkeypatch.setattr(paged_attention, "_has_tile_unit", lambda device: compiled)
    monkeypatch.setattr(paged_attention, "TILE_ROWS", 96)
    monkeypatch.setattr(paged_attention, "TILE_SCORES", 96 * 64)
    monkeypatch.setattr(paged_attention, "GATHER_TOKENS", 64)
    monkeypatch.setattr(paged_attention, "COMPILED_ROWS", 110)
    return request.param[1]


@pytest.mark.parametrize(("num_new", "past"), SHAPES)
def test_prefill_is_attention_over_the_past_and_itself(
    num_new: int, past: int, dtype: torch.dtype
) -> None:
    keys, values, (table,) = paged([past + num_new], dtype)
    # Large enough that some weights are near 1 and most near 0.
    q = (3 * torch.randn(num_new, HEADS, DIM)).to(dtype)
    out = paged_prefill_attention(q, keys, values, table, past)
    assert out.dtype == dtype
    assert error(out, exact(q, keys, values, table, past + num_new)) < ERRORS[dtype]


def test_prefill_bears_large_scores(dtype: torch.dtype) -> None:
    """Peaks that rise by hundreds from tile to tile. fp32 scores are then off by some 1e-5."""
    keys, values, (table,) = paged([300], dtype)
    keys[table] *= torch.linspace(1, 60, len(table))[:, None, None, None].to(dtype)
    q = (10 * torch.randn(20, HEADS, DIM)).to(dtype)
    out = paged_prefill_attention(q, keys, values, table, 280)
    assert error(out, exact(q, keys, values, table, 300)) < max(ERRORS[dtype], 2e-5)


@pytest.mark.parametrize("decoded", ERRORS, ids=str)
def test_decode_is_attention_over_each_sequences_own_tokens(decoded: torch.dtype) -> None:
    lengths = [1, 5, 99, 23]
    keys, values, tables = paged(lengths, decoded)
    q = (3 * torch.randn(len(lengths), HEADS, DIM)).to(decoded)
    # Any page may stand behind the last one.
    padded = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=3)
    out = paged_decode_attention(q, keys, values, padded, torch.tensor(lengths))
    assert out.dtype == decoded
    for row, mine, table, length in zip(q, out, tables, lengths, strict=True):
        assert error(mine[None], exact(row[None], keys, values, table, length)) < ERRORS[decoded]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_compiled_softmax_is_the_plain_one(weight_dtype: torch.dtype, masked: bool) -> None:
    """The plain one runs in fp64; both move on from the statistics of an earlier tile."""
    rows, width = 37, 192
    scores = 20 * torch.randn(rows, width)
    limits = torch.randint(1, width + 1, (rows,)) if masked else None
    peaks = 30 * torch.randn(rows)
    peaks[::3] = -torch.inf
    start = [peaks, torch.rand(rows), torch.empty(rows)]
    plain, again = [x.double() for x in start], [x.clone() for x in start]
    exact_weights = torch.empty(rows, width, dtype=torch.float64)
    soften(scores.double(), exact_weights, limits, 0.3, *plain)
    weights = torch.empty(rows, width, dtype=weight_dtype)
    soften(scores, weights, limits, 0.3, *start)
    tolerance = 4e-3 if weight_dtype == torch.bfloat16 else 3e-6
    torch.testing.assert_close(weights.double(), exact_weights, rtol=tolerance, atol=1e-9)
    for ours, theirs in zip(start, plain, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=1e-9)
    if weight_dtype == torch.float32:
        soften(scores, scores, limits, 0.3, *again)
        assert torch.equal(scores, weights)


@pytest.mark.skipif(not tiles_available(), reason="this CPU has no tile unit")
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_the_compiled_kernel_takes_any_head_dim_and_number_of_threads(dim: int) -> None:
    keys, values = torch.randn(2, 300, 2, dim).bfloat16()
    q = (2 * torch.randn(100, 6, dim)).bfloat16()
    table = torch.arange(300 // 5)
    pages = [x.unflatten(0, (-1, 5)) for x in (keys, values)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(paged_prefill_attention(q, *pages, table, 200))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    wide = [x.repeat_interleave(3, 1).transpose(0, 1).double() for x in (keys, values)]
    seen = torch.ones(100, 300, dtype=torch.bool).tril(200)
    truth = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1).double(), *wide, attn_mask=seen
    )
    assert error(results[0], truth.transpose(0, 1)) < ERRORS[torch.bfloat16]


@pytest.mark.skipif(not tiles_available(), reason="this CPU has no tile unit")
def test_fp32_is_rounded_to_bf16_only_where_the_process_allows_it() -> None:
    keys, values, (table,) = paged([100], torch.float32)
    q = torch.randn(100, HEADS, DIM)
    truth = exact(q, keys, values, table, 100)
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for setting in ("highest", "medium"):
            torch.set_float32_matmul_precision(setting)
            errors[setting] = error(paged_prefill_attention(q, keys, values, table, 0), truth)
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < ERRORS[torch.float32]
    assert 1e-4 < errors["medium"] < ERRORS[torch.bfloat16]
