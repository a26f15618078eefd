"""Drawing against a plain numpy reading of what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm1.engine.draw import BadLogits, sample_kept, sample_plain
from openm1.engine.sampler import uniforms

LAST_DRAW = 1 - 2**-53
MANY = 40_000
PLAIN = (1.0, 0, 1.0, 0.0)
"""Temperature, top_k, top_p, min_p."""
# Single-precision sums are good to this; log-probabilities of drawn tokens are double.
SINGLE = 1e-6

Setting = tuple[float, int, float, float]


def reference_probs(logits: np.ndarray, setting: Setting) -> np.ndarray:
    temperature, top_k, top_p, min_p = setting
    scaled = logits / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept = order[:top_k] if top_k else order
    total, enough = probs[kept].sum(), []
    for index in kept:
        if top_p < 1 and probs[enough].sum() / total >= top_p:
            break
        enough.append(index)
    enough = [index for index in enough if probs[index] >= min_p * probs.max()]
    out = np.zeros_like(probs)
    out[enough] = probs[enough] / probs[enough].sum()
    return out


def kept_rows(logits: np.ndarray, settings: list[Setting], draws) -> list[int]:
    temperature, top_k, top_p, min_p = (torch.tensor(list(s)) for s in zip(*settings, strict=True))
    return sample_kept(
        torch.tensor(logits),
        temperature.double(),
        torch.tensor(draws, dtype=torch.float64),
        top_k=top_k,
        top_p=top_p.double(),
        min_p=min_p.double(),
    ).tolist()


def plain_rows(logits, temperatures, draws, given=None) -> tuple[list[int], list[float]]:
    tokens, logprobs = sample_plain(
        torch.as_tensor(logits),
        torch.tensor(temperatures, dtype=torch.float64),
        torch.as_tensor(draws, dtype=torch.float64),
        torch.tensor([-1] * len(logits) if given is None else given),
    )
    assert logprobs.dtype == torch.float64
    return tokens.tolist(), logprobs.tolist()


def random_settings(count: int, rng: np.random.Generator) -> list[Setting]:
    return [
        (
            float(rng.choice([0.3, 1.0, 2.5])),
            int(rng.choice([0, 0, 1, 3, 17, 290, 1000])),
            # Odd fractions, so that no sum of equal weights meets one exactly.
            float(rng.choice([1.0, 0.95123, 0.50321, 1e-9])),
            float(rng.choice([0.0, 0.0, 0.0123, 0.31, 1.0])),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("size", [50, 700])
@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_what_is_kept_is_the_references(size: int, spread: float) -> None:
    """700 nearly equal tokens are more than the first candidates, 50 are fewer."""
    rng = np.random.default_rng(size)
    # Rounded, so that many are equal and the lower id has to win.
    logits = np.round(rng.normal(0, spread, (150, size)), 1)
    settings = random_settings(150, rng)
    draws = rng.random(150)
    expected = [
        int(np.searchsorted(np.cumsum(reference_probs(row, setting)), draw, side="right"))
        for row, setting, draw in zip(logits, settings, draws, strict=True)
    ]
    assert kept_rows(logits, settings, draws) == expected
    assert len(set(expected)) > 20


def test_plain_tokens_and_logprobs_are_the_references() -> None:
    rng = np.random.default_rng(5)
    logits, draws = rng.normal(0, 2, (90, 50)), rng.random(90)
    temperatures = rng.choice([0.3, 1.0, 2.5], 90).tolist()
    tokens, logprobs = plain_rows(logits, temperatures, draws)
    for row, temperature, draw, token, logprob in zip(
        logits, temperatures, draws, tokens, logprobs, strict=True
    ):
        probs = reference_probs(row, (temperature, 0, 1.0, 0.0))
        assert token == int(np.searchsorted(np.cumsum(probs), draw, side="right"))
        assert logprob == pytest.approx(np.log(probs[token]), abs=1e-12)
    assert len(set(tokens)) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [50, 9000, 40_000])
def test_a_row_depends_on_itself_alone_to_the_last_bit(size: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    count = 12
    whole = torch.tensor(rng.normal(0, 2, (count, size + 7)), dtype=dtype)
    logits = whole[:, :size]  # Rows that do not lie end to end, as those cut at the vocabulary.
    temperatures = [[0.0, 0.7, 1.0][i % 3] for i in range(count)]
    given = [5 if i % 4 == 0 else -1 for i in range(count)]
    draws = torch.tensor(rng.random(count))
    together = plain_rows(logits, temperatures, draws, given)
    order = rng.permutation(count).tolist()
    shuffled = plain_rows(
        logits[order], [temperatures[i] for i in order], draws[order], [given[i] for i in order]
    )
    for place, i in enumerate(order):
        alone = plain_rows(logits[i : i + 1], temperatures[i : i + 1], draws[i : i + 1], [given[i]])
        assert (together[0][i], together[1][i]) == (alone[0][0], alone[1][0])
        assert (shuffled[0][place], shuffled[1][place]) == (alone[0][0], alone[1][0])


def test_a_cut_row_depends_on_itself_alone() -> None:
    rng = np.random.default_rng(1)
    logits = np.round(rng.normal(0, 0.5, (40, 700)), 1)
    settings = [(0.0, *s[1:]) if i % 5 == 0 else s for i, s in enumerate(random_settings(40, rng))]
    draws = rng.random(40)
    together = kept_rows(logits, settings, draws)
    alone = [kept_rows(logits[i : i + 1], settings[i : i + 1], draws[i : i + 1]) for i in range(40)]
    assert together == [token for (token,) in alone]


def test_a_row_that_keeps_all_keeps_the_unlikeliest_beside_one_that_does_not() -> None:
    """Their probabilities are so small that the likeliest one's rounds to 1."""
    logits = np.array([[-40.0] * 1000 + [0.0]] * 2)
    assert kept_rows(logits[:1], [PLAIN], [0.0]) == [0]
    assert kept_rows(logits, [PLAIN, (1.0, 0, 0.9, 0.0)], [0.0, 0.0]) == [0, 1000]
    # The same for one that keeps all of its thousand likeliest.
    assert kept_rows(logits[:1], [(1.0, 1000, 1.0, 0.0)], [0.0]) == [0]


@pytest.mark.parametrize("draw", [0.0, 2**-53, 0.5, LAST_DRAW])
def test_tokens_of_probability_zero_are_never_drawn(draw: float) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 3, (200, 40))
    dead = rng.random((200, 40)) < 0.5
    dead[:, [0, 1, -2, -1]] = True
    dead[:, 20] = False
    logits[dead] = -np.inf
    for setting in ((0.4, 0, 0.99, 0.0), (1.0, 30, 1.0, 0.0), (1.0, 0, 1.0, 1e-9)):
        tokens = kept_rows(logits, [setting] * 200, [draw] * 200)
        assert not dead[np.arange(200), tokens].any()
    tokens, logprobs = plain_rows(logits, [1.0] * 200, [draw] * 200)
    assert not dead[np.arange(200), tokens].any()
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.35), (5, 0.9, 0.4)],
)
def test_frequencies_are_the_probabilities(top_k: int, top_p: float, min_p: float) -> None:
    logits = np.log([0.02, 0.3, 0.08, 0.25, 0.1, 0.05, 0.15, 0.05])
    draws = uniforms(list(range(MANY)), [0] * MANY).numpy()
    setting = (1.3, top_k, top_p, min_p)
    rows = np.tile(logits, (MANY, 1))
    if setting[1:] == PLAIN[1:]:
        tokens, _ = plain_rows(rows, [1.3] * MANY, draws)
    else:
        tokens = kept_rows(rows, [setting] * MANY, draws)
    expected = MANY * reference_probs(logits, setting)
    counts = np.bincount(tokens, minlength=8)
    assert (counts[expected == 0] == 0).all()
    live = expected > 0
    assert live.sum() > 1
    # Chi-square with at most 7 degrees of freedom passes 30 once in ten thousand.
    assert ((counts - expected)[live] ** 2 / expected[live]).sum() < 30


def test_top_k_keeps_k_of_equals() -> None:
    draws = uniforms(list(range(500)), [0] * 500).numpy()
    got = kept_rows(np.zeros((500, 999)), [(1.0, 4, 1.0, 0.0)] * 500, draws)
    assert set(got) == {0, 1, 2, 3}


def test_min_p_is_a_share_of_the_likeliest_and_keeps_what_meets_it() -> None:
    logits = np.log([[0.5, 0.25, 0.125, 0.125]])
    for min_p, last in ((0.25, 3), (0.26, 1), (0.5, 1), (0.51, 0), (1.0, 0)):
        assert kept_rows(logits, [(1.0, 0, 1.0, min_p)], [LAST_DRAW]) == [last]
    # Colder means farther apart.
    assert kept_rows(logits, [(0.5, 0, 1.0, 0.26)], [LAST_DRAW]) == [0]


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-300])
def test_temperature_zero_and_next_to_zero_are_greedy(temperature: float) -> None:
    logits = np.random.default_rng(3).normal(0, 1, (50, 30))
    best = logits.argmax(-1).tolist()
    assert plain_rows(logits, [temperature] * 50, [LAST_DRAW] * 50)[0] == best
    assert kept_rows(logits, [(temperature, 9, 0.9, 0.0)] * 50, [LAST_DRAW] * 50) == best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_greedy_takes_the_lowest_id_of_equals(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 1000, dtype=dtype)
    logits[1, 700] = logits[1, 900] = 2.0
    logits[2, -1] = 1.0
    assert plain_rows(logits, [0.0] * 3, [0.5] * 3)[0] == [0, 700, 999]
    # Also beside a row that is not greedy, and where something is cut.
    assert plain_rows(logits, [0.0, 0.0, 1.0], [0.999] * 3)[0][:2] == [0, 700]
    if dtype == torch.float64:
        settings = [(0.0, 0, 0.9, 0.0), (0.0, 5, 1.0, 0.1), (1.0, 1, 1.0, 0.0)]
        assert kept_rows(logits.numpy(), settings, [0.999] * 3) == [0, 700, 999]


def test_given_tokens_are_scored_under_the_temperature() -> None:
    logits = np.random.default_rng(4).normal(0, 2, (5, 30)).astype(np.float32)
    temperatures, given = [0.0, 0.5, 1.0, 3.0, 0.0], [3, 1, 4, 1, -1]
    tokens, logprobs = plain_rows(logits, temperatures, [0.5] * 5, given)
    assert tokens == [3, 1, 4, 1, int(logits[4].argmax())]
    expected = [
        np.log(reference_probs(row.astype(np.float64), (t or 1.0, 0, 1.0, 0.0))[token])
        for row, t, token in zip(logits, temperatures, tokens, strict=True)
    ]
    assert logprobs == pytest.approx(expected, abs=SINGLE)


def test_logprobs_far_out_are_what_they_are() -> None:
    logits = [[1.0, 2.0, -torch.inf, 3000.0]]
    assert plain_rows(logits, [1e-300], [0.0])[1] == [0.0]
    assert plain_rows(logits, [1.0], [0.0], [2])[1] == [-np.inf]
    assert plain_rows(logits, [0.5], [0.0], [0])[1] == pytest.approx([-5998.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_rows_are_named(bad: float, temperature: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(5, 40, dtype=dtype)
    logits[1] = bad
    logits[3, slice(None) if bad == -torch.inf else 17] = bad
    draws, given = torch.zeros(5), torch.tensor([-1, -1, -1, 2, -1])
    scale = torch.full((5,), temperature, dtype=torch.float64)
    with pytest.raises(BadLogits, match=r"rows \[1, 3\]") as caught:
        sample_plain(logits, scale, draws, given)
    assert caught.value.rows == [1, 3]
    kept = {"top_k": given.clamp(min=0), "top_p": scale + 0.5, "min_p": draws}
    with pytest.raises(BadLogits, match=r"rows \[1, 3\]"):
        sample_kept(logits, scale, draws.double(), **kept)


def test_logits_are_left_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(4, 60, dtype=dtype)
        before = logits.clone()
        plain_rows(logits, [0.0, 1.0, 0.5, 2.0], [0.5] * 4, [-1, -1, 3, -1])
        sample_kept(
            logits,
            torch.ones(4, dtype=torch.float64),
            torch.full((4,), 0.5, dtype=torch.float64),
            top_k=torch.tensor([0, 3, 0, 0]),
            top_p=torch.tensor([1.0, 1.0, 0.5, 1.0], dtype=torch.float64),
            min_p=torch.tensor([0.0, 0.0, 0.0, 0.5], dtype=torch.float64),
        )
        assert torch.equal(logits, before)
