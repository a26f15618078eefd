"""From logits to tokens. A row's token depends on its logits, its seed and its place alone.

Reading order: `sampling_row`, `choose`, then `draw` for what happens to rows without adjustments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from openm1.engine.adjustment import Adjustment
from openm1.engine.draw import (
    MIN_TEMPERATURE,
    BadLogits,
    PlainSampler,
    best_tokens_of,
    row_blocks,
    sample_kept,
    sample_plain,
)
from openm1.engine.seeds import GOLDEN, mix
from openm1.engine.thinking import ThoughtTracker
from openm1.types import SamplingParams

_SECOND_STREAM = 0xD1B54A32D192ED03


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRow:
    """How one row of logits becomes a token."""

    params: SamplingParams
    """`seed` is set."""
    step: int
    """How many tokens the reply has."""
    forced: int | None = None
    """A token that must come; it is only scored."""
    adjustment: Adjustment | None = None
    """Penalties, bias, bans and grammar, where the row asks for some and the thought is over."""
    opening_token: int | None = None
    """The token that would begin a thought, where one may yet begin; no adjustment touches it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What came of each row."""

    tokens: list[int]
    logprobs: list[float]
    """Under softmax(logits / temperature), 1 when greedy, before any adjustment or cut."""
    top_logprobs: list[tuple[tuple[int, float], ...]]
    """The likeliest tokens under the same distribution, best first; () where not asked for."""


def sampling_row(
    params: SamplingParams,
    output_ids: list[int],
    thought: ThoughtTracker,
    adjustment: Adjustment | None,
) -> SamplingRow:
    """The row for the next token of a reply; `adjustment` learns what the answer has gained."""
    active = None
    if adjustment is not None and thought.answer_start is not None:
        adjustment.catch_up(output_ids, thought.answer_start)
        active = adjustment
    return SamplingRow(
        params=params,
        step=len(output_ids),
        forced=thought.forced,
        adjustment=active,
        opening_token=thought.opening_token,
    )


def choose(
    logits: Float[Tensor, "S V"],
    rows: Sequence[SamplingRow],
    *,
    vocab_size: int,
    plain: PlainSampler = sample_plain,
) -> Choice:
    """One token per row, never one of `vocab_size` or above. `logits` are not changed.

    Raises BadLogits with the numbers of bad rows; the others may then be tried without them.
    """
    logits, device = logits[:, :vocab_size], logits.device
    if any(row.params.temperature > 0 for row in rows):
        draws = _draws(rows, stream=0)
    else:
        draws = torch.zeros(len(rows), dtype=torch.float64)
    given = [-1 if row.forced is None else row.forced for row in rows]
    for index, token in _choose_special(logits, rows, draws).items():
        given[index] = token
    temperature = torch.tensor(
        [row.params.temperature for row in rows], dtype=torch.float64, device=device
    )
    settled = torch.tensor(given, dtype=torch.int64, device=device)
    tokens, logprobs = plain(logits, temperature, draws.to(device), settled)
    return Choice(
        tokens=tokens.tolist(),
        logprobs=logprobs.tolist(),
        top_logprobs=_top_logprobs(logits, rows, temperature, plain),
    )


def _draws(rows: Sequence[SamplingRow], stream: int) -> Float[Tensor, " S"]:
    return uniforms([(row.params.seed or 0) ^ stream for row in rows], [row.step for row in rows])


def _choose_special(
    logits: Tensor, rows: Sequence[SamplingRow], draws: Float[Tensor, " S"]
) -> dict[int, int]:
    """Tokens of the rows with an adjustment or a cut, by row."""
    special = [index for index, row in enumerate(rows) if _is_special(row)]
    # Whether a thought begins is left to the model: where it may, the logits as they are decide on
    # its first token, and where they decide against it, a second draw takes one of the others.
    undecided = [
        i for i in special if rows[i].adjustment is not None and rows[i].opening_token is not None
    ]
    chosen: dict[int, int] = {}
    if undecided:
        first = _choose_kept(logits, rows, undecided, draws, adjusted=False)
        chosen = {i: token for i, token in first.items() if token == rows[i].opening_token}
        draws = draws.clone()
        draws[undecided] = _draws(rows, _SECOND_STREAM)[undecided]
    rest = [i for i in special if i not in chosen]
    return chosen | _choose_kept(logits, rows, rest, draws, adjusted=True)


def _is_special(row: SamplingRow) -> bool:
    if row.forced is not None:
        return False
    params = row.params
    cuts = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return row.adjustment is not None or (cuts and params.temperature > 0)


def _choose_kept(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    index: list[int],
    draws: Float[Tensor, " S"],
    *,
    adjusted: bool,
) -> dict[int, int]:
    """Tokens of the rows numbered `index`, by row, from their logits as they are or adjusted."""
    chosen: dict[int, int] = {}
    for block, part in row_blocks(logits, index):
        if adjusted:
            part = _adjusted(part, [rows[i] for i in block])
        chosen.update(zip(block, _sample_block(part, rows, block, draws), strict=True))
    return chosen


def _adjusted(scores: Float[Tensor, "R V"], rows: list[SamplingRow]) -> Float[Tensor, "R V"]:
    if all(row.adjustment is None for row in rows):
        return scores
    scores = scores.clone()
    for at, row in enumerate(rows):
        if row.adjustment is not None:
            adjust_logits(scores[at], row.adjustment)
            allowed = row.adjustment.allowed_by_grammar(row.opening_token)
            if allowed is not None:
                # Not less than this: of all that is allowed nothing may be taken away.
                scores[at].masked_fill_(~torch.from_numpy(allowed).to(scores.device), -torch.inf)
            elif row.opening_token is not None:
                scores[at, row.opening_token] = -torch.inf
    return scores


def _sample_block(
    scores: Float[Tensor, "R V"],
    rows: Sequence[SamplingRow],
    block: list[int],
    draws: Float[Tensor, " S"],
) -> list[int]:
    """Tokens of the rows numbered `block`, whose logits are `scores`."""
    params, device = [rows[i].params for i in block], scores.device

    def column(values: list[float]) -> Float[Tensor, " R"]:
        return torch.tensor(values, dtype=torch.float64, device=device)

    try:
        return sample_kept(
            scores,
            column([p.temperature for p in params]),
            draws[block].to(device),
            top_k=torch.tensor([p.top_k for p in params], device=device),
            top_p=column([p.top_p for p in params]),
            min_p=column([p.min_p for p in params]),
        ).tolist()
    except BadLogits as error:
        raise BadLogits([block[row] for row in error.rows]) from None


def adjust_logits(scores: Float[Tensor, " V"], adjustment: Adjustment) -> None:
    """In place: the repetition penalty, then frequency and presence, then bias, then bans."""

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(scores.device)

    if adjustment.repetition_penalty != 1:
        ids, penalty = on_device(adjustment.repeated_ids()), adjustment.repetition_penalty
        found = scores[ids]
        scores[ids] = torch.where(found > 0, found / penalty, found * penalty)
    if adjustment.frequency_penalty or adjustment.presence_penalty:
        ids, counts = map(on_device, adjustment.answer_counts())
        counts = counts.to(scores.dtype)
        scores[ids] -= adjustment.frequency_penalty * counts + adjustment.presence_penalty
    if len(adjustment.bias):
        scores[on_device(adjustment.bias_ids)] += on_device(adjustment.bias).to(scores.dtype)
    if len(adjustment.banned_ids):
        scores[on_device(adjustment.banned_ids)] = -torch.inf


def _top_logprobs(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    temperature: Float[Tensor, " S"],
    plain: PlainSampler,
) -> list[tuple[tuple[int, float], ...]]:
    tops: list[tuple[tuple[int, float], ...]] = [() for _ in rows]
    asking = [index for index, row in enumerate(rows) if row.params.top_logprobs]
    for block, part in row_blocks(logits, asking):
        best, ids = best_tokens_of(part)
        _, logprobs = plain(part, temperature[block], torch.zeros_like(best[:, 0]).double(), ids)
        for at, index in enumerate(block):
            ids, above_best = _top(part[at], rows[index].params.top_logprobs)
            asked = rows[index].params.temperature
            scale = max(asked, MIN_TEMPERATURE) if asked else 1.0
            found = (logprobs[at] + above_best / scale).tolist()
            tops[index] = tuple(zip(ids.tolist(), found, strict=True))
    return tops


def _top(scores: Float[Tensor, " V"], count: int) -> tuple[Tensor, Tensor]:
    """(ids of the highest logits, how far each is above the best, in fp64), best first.

    Among equals those of lower id come first; what cannot come at all is left out.
    """
    kth = scores.topk(min(count, len(scores))).values[-1]
    ids = (scores >= kth.clamp(min=torch.finfo(scores.dtype).min)).nonzero()[:, 0]
    found, order = scores[ids].double().sort(descending=True, stable=True)
    return ids[order][:count], (found - found[0])[:count]


def uniforms(seeds: list[int], steps: list[int]) -> Float[Tensor, " S"]:
    """One number in [0, 1) per row, fp64, from (seed, step) alone.

    A counter-based generator: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) mixed twice.
    """
    # Arrays of unsigned integers wrap without a warning.
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    step = np.array(steps, dtype=np.uint64)
    bits = mix(mix(seed) + (step + np.uint64(1)) * GOLDEN)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
