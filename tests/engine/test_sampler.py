"""From rows to tokens: forced, adjusted, cut and plain ones side by side."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from openm1.engine.adjustment import Adjustment
from openm1.engine.draw import BadLogits, sample_plain
from openm1.engine.sampler import (
    Choice,
    SamplingRow,
    adjust_logits,
    choose,
    sampling_row,
    uniforms,
)
from openm1.engine.seeds import child_seed
from openm1.engine.thinking import ThoughtTracker
from openm1.types import SamplingParams

VOCAB, ROWS_OF_MODEL = 50, 64
OPEN, CLOSE = 7, 8
MANY = 40_000
# Greedy and given tokens are scored from single-precision sums.
SINGLE = 1e-6


def row_of(step: int = 0, forced: int | None = None, output=(), prompt=(), **params) -> SamplingRow:
    """A row in its answer, where `output` is what there is of it."""
    wanted = SamplingParams(**({"seed": 1} | params))
    adjustment = Adjustment.for_request(wanted, prompt, VOCAB)
    if adjustment is not None:
        adjustment.catch_up(list(output), 0)
    return SamplingRow(params=wanted, step=step, forced=forced, adjustment=adjustment)


def logits_for(count: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """Rows as a model gives them: likeliest of all are ids that have no text."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, ROWS_OF_MODEL, generator=generator) * spread
    logits[:, VOCAB:] = 40.0
    return logits


def chosen(logits: torch.Tensor, rows: list[SamplingRow]) -> Choice:
    before = logits.clone()
    choice = choose(logits, rows, vocab_size=VOCAB)
    assert torch.equal(logits, before), "the logits were changed"
    assert len(choice.tokens) == len(choice.logprobs) == len(choice.top_logprobs) == len(rows)
    assert all(0 <= token < VOCAB for token in choice.tokens)
    return choice


def logprobs_of(logits: torch.Tensor, temperature: float) -> np.ndarray:
    scaled = logits[:VOCAB].double().numpy() / (temperature or 1.0)
    return scaled - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()


def random_rows(count: int, rng: np.random.Generator) -> list[SamplingRow]:
    """All sorts of wishes side by side."""

    def pick(*values):
        return values[rng.integers(len(values))]

    return [
        row_of(
            step=int(rng.integers(1000)),
            forced=pick(None, None, None, 4),
            output=rng.integers(0, VOCAB, 9).tolist(),
            prompt=rng.integers(0, ROWS_OF_MODEL, 9).tolist(),
            seed=int(rng.integers(10**9)),
            temperature=pick(0.0, 0.7, 1.5),
            top_k=pick(0, 0, 5),
            top_p=pick(1.0, 1.0, 0.8),
            min_p=pick(0.0, 0.0, 0.1),
            presence_penalty=pick(0.0, 0.0, 0.0, 1.1),
            frequency_penalty=pick(0.0, 0.0, 0.0, 0.6),
            repetition_penalty=pick(1.0, 1.0, 1.0, 1.4),
            logit_bias=pick({}, {}, {}, {3: 2.0}),
            banned_token_ids=pick((), (), (), (0, 1, 2)),
            top_logprobs=pick(0, 3),
        )
        for _ in range(count)
    ]


def test_a_row_depends_on_itself_alone_whatever_runs_beside_it() -> None:
    rng = np.random.default_rng(1)
    logits, rows = logits_for(60), random_rows(60, rng)
    together = chosen(logits, rows)
    order = rng.permutation(60).tolist()
    shuffled = chosen(logits[order], [rows[i] for i in order])
    for place, i in enumerate(order):
        alone = chosen(logits[i : i + 1], [rows[i]])
        for other, at in ((together, i), (shuffled, place)):
            assert other.tokens[at] == alone.tokens[0]
            assert other.logprobs[at] == alone.logprobs[0]
            assert other.top_logprobs[at] == alone.top_logprobs[0]


def test_seed_and_step_make_the_draw() -> None:
    logits = logits_for(1).expand(300, -1)
    by_seed = chosen(logits, [row_of(seed=s) for s in range(300)]).tokens
    by_step = chosen(logits, [row_of(step=s) for s in range(300)]).tokens
    assert len(set(by_seed)) > 10 and len(set(by_step)) > 10 and by_seed != by_step
    assert by_seed == chosen(logits, [row_of(seed=s) for s in range(300)]).tokens
    greedy = chosen(logits, [row_of(seed=s, temperature=0.0) for s in range(300)]).tokens
    assert set(greedy) == {int(logits[0, :VOCAB].argmax())}


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_each_cut_acts_alone(cut: dict) -> None:
    logits = logits_for(20, seed=8)
    rows = [row_of(seed=seed, temperature=2.0, **cut) for seed in range(20)]
    assert chosen(logits, rows).tokens == logits[:, :VOCAB].argmax(-1).tolist()


def test_forced_tokens_come_and_are_scored_as_the_model_sees_them() -> None:
    logits = logits_for(4)
    wishes = [{"temperature": 0.0}, {"temperature": 0.6}, {"top_k": 1}, {"banned_token_ids": [9]}]
    choice = chosen(logits, [row_of(forced=9, **wish) for wish in wishes])
    assert choice.tokens == [9] * 4
    for row, logprob, temperature in zip(logits, choice.logprobs, (0, 0.6, 1, 1), strict=True):
        assert logprob == pytest.approx(logprobs_of(row, temperature)[9], abs=SINGLE)


def test_logprobs_are_from_before_all_adjustments_and_cuts() -> None:
    rng = np.random.default_rng(2)
    logits, rows = logits_for(80, seed=3), random_rows(80, rng)
    choice = chosen(logits, rows)
    for scores, row, token, logprob in zip(
        logits, rows, choice.tokens, choice.logprobs, strict=True
    ):
        expected = logprobs_of(scores, row.params.temperature)[token]
        assert logprob == pytest.approx(expected, abs=SINGLE)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_top_logprobs_are_the_likeliest_best_first(temperature: float) -> None:
    logits = logits_for(3, seed=4)
    logits[1, 20:30] = 9.0
    logits[2, :] = -torch.inf
    logits[2, [4, 30]] = torch.tensor([0.0, 1.0])
    rows = [row_of(temperature=temperature, top_logprobs=n, top_k=1) for n in (5, 4, 999)]
    choice = chosen(logits, rows)
    for scores, tops in zip(logits, choice.top_logprobs, strict=True):
        logprobs = logprobs_of(scores, temperature)
        order = sorted(range(VOCAB), key=lambda i: (-logprobs[i], i))[: len(tops)]
        assert [token for token, _ in tops] == order
        assert [p for _, p in tops] == pytest.approx(logprobs[order].tolist())
    # Among equals the lowest ids; ids of no probability and of no text are not reported.
    assert [token for token, _ in choice.top_logprobs[1]] == [20, 21, 22, 23]
    assert [token for token, _ in choice.top_logprobs[2]] == [30, 4]
    assert len(choice.top_logprobs[0]) == 5
    for token, logprob, tops in zip(
        choice.tokens, choice.logprobs, choice.top_logprobs, strict=True
    ):
        assert tops[0] == (token, pytest.approx(logprob, abs=SINGLE))


def test_all_text_at_most_is_reported() -> None:
    (tops,) = chosen(logits_for(1), [row_of(top_logprobs=999)]).top_logprobs
    assert sorted(token for token, _ in tops) == list(range(VOCAB))
    assert sum(math.exp(p) for _, p in tops) == pytest.approx(1.0)


def adjusted_by_hand(logits: list[float], params: SamplingParams, prompt, answer) -> list[float]:
    out, counts = [], Counter(answer)
    for token, logit in enumerate(logits):
        if token in counts or token in prompt:
            if logit > 0:
                logit = logit / params.repetition_penalty
            else:
                logit = logit * params.repetition_penalty
        if token in counts:
            logit -= params.presence_penalty
        logit -= params.frequency_penalty * counts[token]
        logit += params.logit_bias.get(token, 0.0)
        out.append(-math.inf if token in params.banned_token_ids else logit)
    return out


def test_adjusted_logits_are_the_oracles() -> None:
    rng = np.random.default_rng(6)
    for _ in range(60):
        params = SamplingParams(
            presence_penalty=float(rng.choice([0, 0.7, -1.2])),
            frequency_penalty=float(rng.choice([0, 0.3, -0.4])),
            repetition_penalty=float(rng.choice([1, 1.3, 0.8])),
            logit_bias={int(i): float(rng.normal(0, 3)) for i in rng.integers(0, VOCAB, 4)},
            banned_token_ids=rng.integers(0, VOCAB, 3).tolist(),
        )
        prompt, answer = (rng.integers(0, VOCAB, n).tolist() for n in (6, 15))
        adjustment = Adjustment.for_request(params, prompt, VOCAB)
        assert adjustment is not None
        adjustment.catch_up([VOCAB - 1, *answer], 1)
        scores = torch.tensor(rng.normal(0, 2, VOCAB))
        expected = adjusted_by_hand(scores.tolist(), params, prompt, answer)
        adjust_logits(scores, adjustment)
        assert scores.tolist() == pytest.approx(expected)


def test_adjusted_rows_are_drawn_from_the_adjusted_logits() -> None:
    count = 10_000
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]])).expand(count, -1)
    adjustment = Adjustment.for_request(SamplingParams(frequency_penalty=0.5), (), 4)
    assert adjustment is not None
    adjustment.catch_up([0, 0, 2], 0)
    params = SamplingParams(temperature=0.7, min_p=0.3)
    rows = [
        SamplingRow(params=replace(params, seed=seed), step=3, adjustment=adjustment)
        for seed in range(count)
    ]
    tokens = choose(logits, rows, vocab_size=4).tokens
    weights = [(0.4 * math.exp(-1)) ** (1 / 0.7), 0.3 ** (1 / 0.7)]
    weights += [(0.2 * math.exp(-0.5)) ** (1 / 0.7), 0.1 ** (1 / 0.7)]
    expected = np.array([w if w >= 0.3 * max(weights) else 0.0 for w in weights])
    expected *= count / expected.sum()
    counts = np.bincount(tokens, minlength=4)
    assert (counts[expected == 0] == 0).all() and (expected > 0).sum() == 2
    # Chi-square with 1 degree of freedom passes 15 once in ten thousand.
    assert ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum() < 15


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_never_come_and_biased_ones_do(temperature: float) -> None:
    logits = logits_for(50, seed=7)
    best = logits[:, :VOCAB].argmax(-1).tolist()
    rows = [
        row_of(temperature=temperature, seed=i, banned_token_ids=[b]) for i, b in enumerate(best)
    ]
    got = chosen(logits, rows).tokens
    assert all(token != banned for token, banned in zip(got, best, strict=True))
    rows = [row_of(temperature=temperature, seed=i, logit_bias={3: 90.0}) for i in range(50)]
    assert chosen(logits, rows).tokens == [3] * 50


def play(wish: dict, tokens: list[int], prompt=(), **tracker) -> list[SamplingRow]:
    """The rows of a reply that goes `tokens`."""
    params = SamplingParams(seed=1, **wish)
    adjustment = Adjustment.for_request(params, prompt, VOCAB)
    thought = ThoughtTracker([OPEN], [CLOSE], thinking=params.thinking, **tracker)
    rows, output = [], []
    for token in tokens:
        rows.append(sampling_row(params, output, thought, adjustment))
        output.append(token)
        thought.observe(token)
    return rows


def test_adjustments_leave_the_thought_alone() -> None:
    reply = [OPEN, 5, 5, CLOSE, 5, 6]
    rows = play({"presence_penalty": 9.0}, reply)
    assert [row.adjustment is not None for row in rows] == [True, *[False] * 3, True, True]
    assert [row.opening_token for row in rows] == [OPEN, *[None] * 5]
    assert [row.step for row in rows] == list(range(6))
    assert rows[-1].adjustment is not None
    # The thought's tokens and the markers are no part of the answer.
    assert rows[-1].adjustment.answer_counts()[0].tolist() == [5]
    assert all(row.adjustment is None for row in play({}, reply))


def test_with_thinking_off_a_thought_may_begin_and_is_closed_at_once() -> None:
    rows = play({"thinking": False, "banned_token_ids": [9]}, [OPEN, CLOSE, 5])
    assert [row.opening_token for row in rows] == [OPEN, None, None]
    assert [row.forced for row in rows] == [None, CLOSE, None]
    assert [row.adjustment is not None for row in rows] == [True, False, True]


def undecided_rows(count: int, **params) -> list[SamplingRow]:
    return [replace(row_of(seed=s, **params), opening_token=OPEN) for s in range(count)]


@pytest.mark.parametrize("wish", [{"logit_bias": {3: 90.0}}, {"banned_token_ids": [OPEN]}])
def test_whether_a_thought_begins_is_the_models_choice(wish: dict) -> None:
    count = 4000
    logits = torch.zeros(1, ROWS_OF_MODEL).expand(count, -1).clone()
    # As likely as all others together.
    logits[:, OPEN] = math.log(VOCAB - 1)
    tokens = Counter(chosen(logits, undecided_rows(count, **wish)).tokens)
    # Four standard deviations.
    assert abs(tokens[OPEN] - count / 2) < 4 * (count / 4) ** 0.5
    if "logit_bias" in wish:
        assert tokens[3] == count - tokens[OPEN]
    logits[:, OPEN] = -20.0
    assert OPEN not in chosen(logits, undecided_rows(count, **wish)).tokens
    greedy = logits_for(1)
    greedy[0, OPEN] = 30.0
    assert chosen(greedy, undecided_rows(1, temperature=0.0, **wish)).tokens == [OPEN]


def test_an_adjustment_without_effect_keeps_the_distribution_of_the_first_token() -> None:
    """Two draws decide on it, the marker's and the others': together they must be one."""
    count = 10_000
    logits = torch.full((count, ROWS_OF_MODEL), -torch.inf)
    probs = {OPEN: 0.35, 2: 0.25, 20: 0.25, 40: 0.15}
    for token, prob in probs.items():
        logits[:, token] = math.log(prob)
    counts = Counter(chosen(logits, undecided_rows(count, logit_bias={1: 1.0})).tokens)
    expected = {token: count * prob for token, prob in probs.items()}
    # Chi-square with 3 degrees of freedom passes 21 once in ten thousand.
    assert sum((counts[t] - e) ** 2 / e for t, e in expected.items()) < 21


@pytest.mark.parametrize(
    "wish", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"logit_bias": {1: 1.0}}]
)
def test_bad_rows_are_named_and_the_others_can_go_on(wish: dict) -> None:
    logits = logits_for(5)
    logits[1, 3], logits[4, :VOCAB] = torch.nan, -torch.inf
    rows = [row_of(seed=s, **wish) for s in range(5)]
    with pytest.raises(BadLogits) as caught:
        choose(logits, rows, vocab_size=VOCAB)
    assert set(caught.value.rows) <= {1, 4} and caught.value.rows
    # Only what has text is looked at.
    logits[0, VOCAB + 2] = torch.nan
    chosen_rows = choose(logits[[0, 2, 3]], [rows[i] for i in (0, 2, 3)], vocab_size=VOCAB)
    whole = choose(logits_for(5), rows, vocab_size=VOCAB)
    assert chosen_rows.tokens == [whole.tokens[i] for i in (0, 2, 3)]


def test_a_row_whose_every_likely_token_is_banned_is_named() -> None:
    logits = torch.full((3, ROWS_OF_MODEL), -torch.inf)
    logits[:, [4, 5]] = 0.0
    rows = [row_of(seed=s) for s in range(2)] + [row_of(banned_token_ids=[4, 5])]
    with pytest.raises(BadLogits, match=r"rows \[2\]"):
        choose(logits, rows, vocab_size=VOCAB)


def test_another_plain_sampler_gets_rows_cut_at_the_vocabulary_and_what_is_settled() -> None:
    seen = []

    def plain(logits, temperature, draws, given):
        seen.append((tuple(logits.shape), temperature.tolist(), given.tolist(), draws))
        return sample_plain(logits, temperature, draws, given)

    rows = [row_of(temperature=0.5), row_of(forced=9), row_of(top_k=1), row_of(temperature=0.0)]
    logits = logits_for(4)
    choice = choose(logits, rows, vocab_size=VOCAB, plain=plain)
    assert choice == chosen(logits, rows)
    ((shape, temperature, settled, draws),) = seen
    assert shape == (4, VOCAB) and temperature == [0.5, 1.0, 1.0, 0.0]
    assert settled == [-1, 9, int(logits[2, :VOCAB].argmax()), -1]
    assert torch.equal(draws, uniforms([1] * 4, [0] * 4))


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


class _Only:
    """A grammar, and its matcher, that always allows the same tokens."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids

    def start(self) -> _Only:
        return self

    def consume(self, token_id: int) -> bool:
        return token_id in self.ids

    def allowed(self, num_left: int) -> np.ndarray:
        return np.isin(np.arange(VOCAB), self.ids)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3}])
def test_only_what_the_grammar_allows_is_drawn(params: dict) -> None:
    """Its score is that of the whole distribution; a row beside it is free."""
    logits = torch.randn(2, ROWS_OF_MODEL)
    rows = [row_of(grammar=_Only(3, 30, 31), logit_bias={4: 100.0}, **params), row_of(step=1)]
    choice = choose(logits, rows, vocab_size=VOCAB)
    assert choice.tokens[0] in (3, 30, 31)
    scale = params.get("temperature") or 1.0
    expected = torch.log_softmax(logits[0, :VOCAB].double() / scale, -1)[choice.tokens[0]]
    assert choice.logprobs[0] == pytest.approx(expected.item(), abs=SINGLE)
    alone = choose(logits[1:], rows[1:], vocab_size=VOCAB)
    assert choice.tokens[1] == alone.tokens[0]


def test_a_thought_may_open_before_a_grammar_and_the_grammar_wins_otherwise() -> None:
    """The marker's first token decides in the logits as they are, also where it is grammatical."""
    for likely, expected in ((OPEN, OPEN), (20, 3)):
        logits = torch.zeros(1, ROWS_OF_MODEL)
        logits[0, likely] = 50.0
        logits[0, 3] = 10.0
        row = replace(row_of(temperature=0.0, grammar=_Only(3, 4)), opening_token=OPEN)
        assert choose(logits, [row], vocab_size=VOCAB).tokens == [expected]
    # A grammar whose only way on is the marker's own token must not be left with nothing.
    row = replace(row_of(temperature=0.0, grammar=_Only(OPEN)), opening_token=OPEN)
    assert choose(torch.randn(1, ROWS_OF_MODEL), [row], vocab_size=VOCAB).tokens == [OPEN]
