"""Recheck chains played by all rows at once, a token at a time, on one thread.

A row is the start symbol and then, for each turn, operation, hint, fork and value, as token ids.
All rows stand at the same place of their turn, so that a batch needs no scheduler and a sequence no
page table; the model is the ordinary one. Rows are ordered from the longest chain to the shortest:
those that still play are always the first ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openm1.data.packing import PackedBatch
from openm1.envs.recheck import RECHECKS, SKIP, RecheckTaskset
from openm1.kernels.packing import PackedLayout
from openm1.model.cache import CacheView
from openm1.model.config import M1Config
from openm1.model.m1 import M1ForCausalLM

TURN_TOKENS = 4
FORK, VALUE = 2, 3
"""Where in a turn the model may choose."""


class Words:
    """Token ids of a recheck taskset: its symbols, its operations, skip, the marks."""

    def __init__(self, taskset: RecheckTaskset) -> None:
        config = taskset.config
        self.config = config
        self.text = config.symbols + config.operations + SKIP + RECHECKS[: config.num_kinds]
        self.num_symbols, self.num_operations = len(config.symbols), len(config.operations)
        self.first_operation = self.num_symbols
        self.skip = self.num_symbols + self.num_operations
        self.first_recheck = self.skip + 1
        index = {symbol: i for i, symbol in enumerate(config.symbols)}
        rows = [[index[symbol] for symbol in taskset.tables[op]] for op in config.operations]
        self.tables = torch.tensor(rows)
        """[operations, symbols]: the result."""

    @property
    def vocab_size(self) -> int:
        return -(-len(self.text) // 16) * 16

    def recheck(self, operations: Tensor) -> Tensor:
        """Ids of the marks that check these operations."""
        return self.first_recheck + operations // self.config.operations_per_kind


@dataclass
class Chains:
    """What the environment knows of R rows before they are played."""

    start: Tensor
    """[R] symbols."""
    operations: Tensor
    """[R, most turns], by number."""
    num_turns: Tensor
    """[R]."""
    group: Tensor
    """[R]: rows of one prompt share a number."""


def draw_chains(
    words: Words,
    lengths: tuple[int, int],
    num_prompts: int,
    group_size: int,
    rng: torch.Generator,
    kinds: int | None = None,
) -> Chains:
    """`group_size` rows of each prompt, longest chains first.

    With `kinds`, operations are of the first so many kinds, half of them of the last one of these.
    """
    low, high = lengths
    turns = torch.randint(low, high + 1, (num_prompts,), generator=rng).sort(descending=True)[0]
    size, shape = words.config.operations_per_kind, (num_prompts, high)
    if kinds is None:
        operations = torch.randint(0, words.num_operations, shape, generator=rng)
    else:
        kind = torch.randint(0, kinds, shape, generator=rng)
        is_last = torch.rand(shape, generator=rng) < 0.5
        kind = torch.where(is_last, kinds - 1, kind)
        operations = kind * size + torch.randint(0, size, shape, generator=rng)
    start = torch.randint(0, words.num_symbols, (num_prompts,), generator=rng)
    rows = torch.arange(num_prompts).repeat_interleave(group_size)
    return Chains(start[rows], operations[rows], turns[rows], rows)


def draw_hints(words: Words, right: Tensor, rng: torch.Generator) -> Tensor:
    """The right symbol as often as hints are right, else any other."""
    other = torch.randint(1, words.num_symbols, right.shape, generator=rng)
    wrong = (right + other) % words.num_symbols
    lucky = torch.rand(right.shape, generator=rng) < words.config.hint_right
    return torch.where(lucky, right, wrong)


@dataclass
class Play:
    """R rows as played."""

    tokens: Tensor
    """[R, 1 + 4 turns]; behind a row's last turn there is nothing of meaning."""
    chosen: Tensor
    """[R, 1 + 4 turns] bool: what the model wrote."""
    logprobs: Tensor
    """[R, 1 + 4 turns] fp32, of what it wrote."""
    recheck_probability: Tensor
    """[R, turns]: of the mark that checks, at each fork."""
    fork_entropy: Tensor
    """[R, turns] nats."""
    right: Tensor
    """[R, turns] bool: whether the value was the operation's result."""
    chains: Chains

    @property
    def played(self) -> Tensor:
        """[R, turns] bool."""
        return torch.arange(self.right.shape[1]) < self.chains.num_turns[:, None]

    @property
    def reward(self) -> Tensor:
        """[R]: 1 if every value was right."""
        return (self.right | ~self.played).all(1).float()


class LockstepCache(CacheView):
    """Cache of R sequences with the same number of tokens; a sequence is one page."""

    def __init__(self, config: M1Config, rows: int, tokens: int) -> None:
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._keys = {i: torch.zeros(rows, tokens, groups, dim) for i in config.softmax_layers}
        self._values = {i: torch.zeros(rows, tokens, groups, dim) for i in config.softmax_layers}
        self._states = {i: torch.zeros(rows, heads, dim, dim) for i in config.lightning_layers}
        self.rows, self.length = rows, 0

    def advance(self, rows: int) -> None:
        """One more token, for the first `rows` rows."""
        self.rows, self.length = rows, self.length + 1

    @property
    def is_decode(self) -> bool:
        return True

    @property
    def positions(self) -> Tensor:
        return torch.full((self.rows,), self.length - 1)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._keys[layer][: self.rows, self.length - 1] = keys
        self._values[layer][: self.rows, self.length - 1] = values

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        place = slice(self.rows), slice(self.length)
        return self._keys[layer][place], self._values[layer][place]

    def padded_page_tables(self) -> tuple[Tensor, Tensor]:
        return torch.arange(self.rows)[:, None], torch.full((self.rows,), self.length)

    def state(self, layer: int) -> Tensor:
        return self._states[layer][: self.rows]

    def set_state(self, layer: int, state: Tensor) -> None:
        self._states[layer][: self.rows] = state


@torch.no_grad()
def play_chains(model: M1ForCausalLM, words: Words, chains: Chains, rng: torch.Generator) -> Play:
    """Samples at temperature 1."""
    rows, most = len(chains.start), int(chains.num_turns.max())
    size = 1 + TURN_TOKENS * most
    tokens = torch.zeros(rows, size, dtype=torch.int64)
    chosen = torch.zeros(rows, size, dtype=torch.bool)
    logprobs = torch.zeros(rows, size)
    recheck_probability, fork_entropy = torch.zeros(rows, most), torch.zeros(rows, most)
    right = torch.zeros(rows, most, dtype=torch.bool)
    cache = LockstepCache(model.config, rows, size)

    def feed(column: int) -> Tensor:
        cache.advance(count)
        ids = tokens[:count, column]
        return model.model(ids, PackedLayout([1] * count), cache).hidden

    def write(hidden: Tensor, column: int, where: Tensor | None = None) -> Tensor:
        """Samples a token of each row (of those in `where`); the log-probabilities of all."""
        scores = model.logits(hidden)[:, : len(words.text)].log_softmax(-1)
        drawn = torch.multinomial(scores.exp(), 1, generator=rng)
        kept = torch.ones(count, dtype=torch.bool) if where is None else where
        tokens[:count, column] = torch.where(kept, drawn[:, 0], tokens[:count, column])
        logprobs[:count, column] = scores.gather(1, drawn)[:, 0] * kept
        chosen[:count, column] = kept
        return scores

    tokens[:, 0] = chains.start
    count = rows
    feed(0)
    for turn in range(most):
        column = 1 + TURN_TOKENS * turn
        before = count
        count = int((chains.num_turns > turn).sum())
        if turn and before:
            feed(column - 1)
        operation = chains.operations[:count, turn]
        value = tokens[:count, column - 1].clamp(max=words.num_symbols - 1)
        result = words.tables[operation, value]
        hint = draw_hints(words, result, rng)
        tokens[:count, column] = words.first_operation + operation
        tokens[:count, column + 1] = hint
        feed(column)
        scores = write(feed(column + 1), column + FORK)
        mark = words.recheck(operation)
        recheck_probability[:count, turn] = scores.gather(1, mark[:, None])[:, 0].exp()
        fork_entropy[:count, turn] = -(scores.exp() * scores).sum(-1)
        tokens[:count, column + VALUE] = hint
        checks = tokens[:count, column + FORK] == mark
        write(feed(column + FORK), column + VALUE, checks)
        right[:count, turn] = tokens[:count, column + VALUE] == result
    return Play(
        tokens=tokens,
        chosen=chosen,
        logprobs=logprobs,
        recheck_probability=recheck_probability,
        fork_entropy=fork_entropy,
        right=right,
        chains=chains,
    )


def pack_rows(tokens: Tensor, targets: Tensor, num_turns: Tensor) -> PackedBatch:
    """Rows back to back; `targets` [R, tokens] marks what is learned of `tokens`."""
    lengths = TURN_TOKENS * num_turns
    real = torch.arange(tokens.shape[1] - 1) < lengths[:, None]
    return PackedBatch(
        input_ids=tokens[:, :-1][real],
        targets=tokens[:, 1:][real],
        loss_mask=targets[:, 1:][real],
        layout=PackedLayout(lengths.tolist()),
    )
