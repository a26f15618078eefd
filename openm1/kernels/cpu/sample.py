"""From rows of logits to tokens and their log-probabilities, in three passes over the vocabulary at
most: largest, sum of exponentials, and for a draw the block it falls into."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import carray

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.arguments import (
    read_arguments,
    read_d1,
    read_d2,
    read_f2,
    read_i1,
)
from openm1.kernels.cpu.blocks import largest, meet, share
from openm1.kernels.cpu.compile import Job, piece

# Logits that one thread looks at before it takes others. Fixed, so that the order of the sums does
# not depend on the number of threads.
BLOCK = 4096


@piece
def weigh(row, first, stop, best, inverse):
    """Sum of exp((x - best) * inverse)."""
    values = carray(vector.pointer_f32(row + 4 * first), (stop - first,))
    total = np.float32(0.0)
    for i in range(values.size):
        total += vector.exp_f32((values[i] - best) * inverse)
    return np.float64(total)


@piece
def find(row, first, stop, best):
    """The lowest id whose logit is `best`."""
    values = carray(vector.pointer_f32(row + 4 * first), (stop - first,))
    for i in range(values.size):
        if values[i] == best:
            return first + i
    return first


@piece
def draw_in_block(row, first, stop, best, inverse, target):
    """The id at which the running sum of weights passes `target`; the last that weighs at all
    should rounding leave it just short."""
    values = carray(vector.pointer_f32(row + 4 * first), (stop - first,))
    total, last = 0.0, first
    for i in range(values.size):
        weight = vector.exp_f32((values[i] - best) * inverse)
        total += weight
        if weight > 0:
            last = first + i
        if total > target:
            break
    return last


@piece
def draw(row, size, best, inverse, sums, target):
    """Inverts the cumulative distribution: first the block, then the token in it."""
    last = 0
    for block in range(sums.size):
        if sums[block] > 0:
            last = block
            if target < sums[block]:
                break
            target -= sums[block]
    first = last * BLOCK
    return draw_in_block(row, first, min(first + BLOCK, size), best, inverse, target)


class SampleArguments(NamedTuple):
    """Rows in excess of `num_rows` are not looked at; `tops` and `sums` are scratch."""

    num_rows: int
    logits: int  # address of the first row
    row_bytes: int
    size: int
    temperature: np.ndarray  # [S] fp64
    draws: np.ndarray  # [S] fp64
    given: np.ndarray  # [S] int64, a token that is only scored, or -1
    tops: np.ndarray  # [S, blocks]
    sums: np.ndarray  # [S, blocks] fp64
    tokens: np.ndarray  # [S] int64, written
    logprobs: np.ndarray  # [S] fp64, written


NUM_FIELDS = len(SampleArguments._fields)


@Job
def sample_step(thread, threads, counter, address):
    """As `engine.draw.sample_plain`. Rows that have no distribution get log-probability NaN.

    At the address are SampleArguments, flattened.
    """
    a = read_arguments(address, NUM_FIELDS)
    count, logits, row_bytes, size = a[0, 0], a[1, 0], a[2, 0], a[3, 0]
    temperature, draws, given = read_d1(a, 4), read_d1(a, 5), read_i1(a, 6)
    tops, sums, tokens, logprobs = read_f2(a, 7), read_d2(a, 8), read_i1(a, 9), read_d1(a, 10)
    blocks = (size + BLOCK - 1) // BLOCK
    first, stop = share(count * blocks, thread, threads, 1)
    for unit in range(first, stop):
        s, block = unit // blocks, unit % blocks
        begin = block * BLOCK
        row = logits + s * row_bytes + 4 * begin
        tops[s, block] = largest(row, min(BLOCK, size - begin))
    meet(counter, threads)
    for unit in range(first, stop):
        s, block = unit // blocks, unit % blocks
        begin, best = block * BLOCK, best_of(tops[s, :blocks])
        sums[s, block] = weigh(
            logits + s * row_bytes, begin, min(begin + BLOCK, size), best, inverse(temperature[s])
        )
    meet(counter, 2 * threads)
    first, stop = share(count, thread, threads, 1)
    for s in range(first, stop):
        row, best = logits + s * row_bytes, best_of(tops[s, :blocks])
        if not np.isfinite(best):
            logprobs[s] = np.nan
            continue
        total = sums[s, :blocks].sum()
        if given[s] >= 0:
            tokens[s] = given[s]
        elif temperature[s] > 0:
            scale, target = inverse(temperature[s]), draws[s] * total
            tokens[s] = draw(row, size, best, scale, sums[s, :blocks], target)
        else:
            block = 0
            while tops[s, block] != best:
                block += 1
            tokens[s] = find(row, block * BLOCK, min((block + 1) * BLOCK, size), best)
        logit = carray(vector.pointer_f32(row), (size,))[tokens[s]]
        logprobs[s] = np.float64(logit - best) * inverse(temperature[s]) - np.log(total)


@piece
def best_of(tops):
    best = tops[0]
    for value in tops:
        if value > best or value != value:
            best = value
    return best


@piece
def inverse(temperature):
    """Of the temperature that a row is scored at: greedy rows at 1."""
    if temperature == 0:
        return np.float32(1.0)
    # Colder than this is greedy in all but name, and the quotient could overflow.
    return np.float32(1.0 / max(temperature, 1e-6))
