"""The sampler against a plain numpy reading of what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm1.engine.sampler import child_seed, sample, token_logprobs, uniforms

LAST_DRAW = 1 - 2**-53
MANY = 40_000


def reference_probs(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    scaled = logits / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept = order[:top_k] if top_k else order
    total, enough = probs[kept].sum(), []
    for index in kept:
        if probs[enough].sum() / total >= top_p:
            break
        enough.append(index)
    out = np.zeros_like(probs)
    out[enough] = probs[enough] / probs[enough].sum()
    return out


def sample_rows(logits: np.ndarray, settings: list[tuple[float, int, float]], draws) -> list[int]:
    temperature, top_k, top_p = zip(*settings, strict=True)
    return sample(
        torch.tensor(logits),
        torch.tensor(temperature, dtype=torch.float64),
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(draws, dtype=torch.float64),
    ).tolist()


def random_settings(count: int, rng: np.random.Generator) -> list[tuple[float, int, float]]:
    return [
        (
            float(rng.choice([0.3, 1.0, 2.5])),
            int(rng.choice([0, 1, 3, 17, 50, 1000])),
            float(rng.choice([1.0, 0.95, 0.5, 1e-9])),
        )
        for _ in range(count)
    ]


def test_tokens_are_the_references() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (300, 50))
    settings = random_settings(300, rng)
    draws = rng.random(300)
    expected = [
        int(np.searchsorted(np.cumsum(reference_probs(row, *setting)), draw, side="right"))
        for row, setting, draw in zip(logits, settings, draws, strict=True)
    ]
    assert sample_rows(logits, settings, draws) == expected
    assert len(set(expected)) > 30


def test_a_row_depends_on_itself_alone() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (40, 50))
    settings = [(0.0, 0, 1.0) if i % 5 == 0 else s for i, s in enumerate(random_settings(40, rng))]
    draws = rng.random(40)
    together = sample_rows(logits, settings, draws)
    alone = [
        sample_rows(logits[i : i + 1], settings[i : i + 1], draws[i : i + 1]) for i in range(40)
    ]
    assert together == [token for (token,) in alone]


def test_a_row_that_keeps_all_keeps_the_unlikeliest_beside_one_that_does_not() -> None:
    """Their probabilities are so small that the likeliest one's rounds to 1."""
    logits = np.array([[-40.0] * 1000 + [0.0]] * 2)
    assert sample_rows(logits[:1], [(1.0, 0, 1.0)], [0.0]) == [0]
    assert sample_rows(logits, [(1.0, 0, 1.0), (1.0, 0, 0.9)], [0.0, 0.0]) == [0, 1000]


@pytest.mark.parametrize("draw", [0.0, 2**-53, 0.5, LAST_DRAW])
def test_tokens_of_probability_zero_are_never_drawn(draw: float) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 3, (200, 40))
    dead = rng.random((200, 40)) < 0.5
    dead[:, [0, 1, -2, -1]] = True
    dead[:, 20] = False
    logits[dead] = -np.inf
    for setting in ((1.0, 0, 1.0), (0.4, 0, 0.99), (1.0, 30, 1.0)):
        tokens = sample_rows(logits, [setting] * 200, [draw] * 200)
        assert not dead[np.arange(200), tokens].any()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7)])
def test_frequencies_are_the_probabilities(top_k: int, top_p: float) -> None:
    logits = np.log([0.02, 0.3, 0.08, 0.25, 0.1, 0.05, 0.15, 0.05])
    draws = uniforms(list(range(MANY)), [0] * MANY).numpy()
    setting = (1.3, top_k, top_p)
    tokens = sample_rows(np.tile(logits, (MANY, 1)), [setting] * MANY, draws)
    expected = MANY * reference_probs(logits, *setting)
    counts = np.bincount(tokens, minlength=8)
    assert (counts[expected == 0] == 0).all()
    live = expected > 0
    # Chi-square with at most 7 degrees of freedom passes 30 once in ten thousand.
    assert ((counts - expected)[live] ** 2 / expected[live]).sum() < 30


def test_top_k_keeps_k_of_equals() -> None:
    draws = uniforms(list(range(500)), [0] * 500).numpy()
    assert set(sample_rows(np.zeros((500, 999)), [(1.0, 4, 1.0)] * 500, draws)) == {0, 1, 2, 3}


def test_temperature_zero_and_next_to_zero_are_greedy() -> None:
    logits = np.random.default_rng(3).normal(0, 1, (50, 30))
    best = logits.argmax(-1).tolist()
    for temperature in (0.0, 1e-9, 1e-300):
        assert sample_rows(logits, [(temperature, 0, 1.0)] * 50, [LAST_DRAW] * 50) == best


def test_logprobs_are_under_the_temperature_alone() -> None:
    logits = np.random.default_rng(4).normal(0, 2, (4, 30)).astype(np.float32)
    temperatures = [0.0, 0.5, 1.0, 3.0]
    tokens = [3, 1, 4, 1]
    got = token_logprobs(
        torch.tensor(logits), torch.tensor(temperatures), torch.tensor(tokens)
    ).tolist()
    expected = [
        np.log(reference_probs(row.astype(np.float64), t or 1.0, 0, 1.0)[token])
        for row, t, token in zip(logits, temperatures, tokens, strict=True)
    ]
    assert got == pytest.approx(expected, abs=1e-6)


def test_logprobs_next_to_temperature_zero_are_finite() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    cold = torch.tensor([1e-300], dtype=torch.float64)
    assert token_logprobs(logits, cold, torch.tensor([1])).item() == pytest.approx(0.0)


def test_uniforms_are_even_and_unrelated() -> None:
    by_step = uniforms([7] * MANY, list(range(MANY)))
    by_seed = uniforms(list(range(MANY)), [3] * MANY)
    by_child = uniforms([child_seed(11, i) for i in range(MANY)], [0] * MANY)
    for draws in (by_step, by_seed, by_child):
        assert draws.dtype == torch.float64 and draws.min() >= 0 and draws.max() < 1
        counts = torch.histc(draws, 20, 0, 1)
        # Chi-square with 19 degrees of freedom passes 52 once in ten thousand.
        assert ((counts - MANY / 20) ** 2 / (MANY / 20)).sum() < 52
        for lag in (1, 2, 7):
            pair = torch.stack([draws[:-lag], draws[lag:]])
            assert abs(torch.corrcoef(pair)[0, 1]) < 4 / MANY**0.5


def test_uniforms_come_from_seed_and_step_alone() -> None:
    seeds, steps = [3, -1, 2**64 - 1, 5, 3], [0, 4, 4, 0, 1]
    together = uniforms(seeds, steps).tolist()
    assert together == [uniforms([a], [b]).item() for a, b in zip(seeds, steps, strict=True)]
    # Seeds are taken modulo 2^64.
    assert together[1] == together[2]
    assert len(set(together)) == 4


def test_children_differ_from_their_parent_and_from_other_families() -> None:
    seeds = [child_seed(parent, i) for parent in range(20) for i in range(20)]
    assert len({*seeds, *range(20)}) == 420
    assert all(0 <= seed < 2**64 for seed in seeds)
