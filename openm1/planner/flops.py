"""How many FLOPs a prompt, a token, a whole reply or a training step takes.

Convention: one multiply-add is 2 FLOPs. Counted are all products with weight matrices (projections,
router, chosen experts, head), attention's products over causal pairs, and the updates, decays and
reads of lightning states. Not counted are norms, activations, softmax, rotary embedding, residuals
and sampling: they are less than a thousandth in M1 and bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from openm1.planner.shape import ModelShape

CHUNK_TOKENS = 64
"""Tokens of a chunk of lightning attention; OpenM1's kernel takes 64, the published code 256."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopLine:
    """One operation in all layers of one kind together."""

    layers: str
    """Kind of attention of the layers, or "head"."""
    num_layers: int
    operation: str
    flops: int


def total_flops(lines: Iterable[FlopLine]) -> int:
    return sum(line.flops for line in lines)


def prefill_flops(
    shape: ModelShape,
    new_tokens: int,
    *,
    past_tokens: int = 0,
    num_logits: int = 1,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[FlopLine]:
    """Many tokens at once after `past_tokens` others, with the logits of `num_logits` of them."""
    _check(new_tokens=(new_tokens, 0), past_tokens=(past_tokens, 0), num_logits=(num_logits, 0))
    _check(chunk_tokens=(chunk_tokens, 1))
    return _count(shape, past_tokens, new_tokens, num_logits, chunk_tokens)


def decode_flops(shape: ModelShape, new_tokens: int, *, past_tokens: int = 0) -> list[FlopLine]:
    """Tokens one after the other, each with its logits; the first sees `past_tokens` and itself."""
    _check(new_tokens=(new_tokens, 0), past_tokens=(past_tokens, 0))
    return _count(shape, past_tokens, new_tokens, new_tokens, None)


def generation_flops(
    shape: ModelShape, *, prompt_tokens: int, generated_tokens: int
) -> list[FlopLine]:
    """A prompt and the reply to it. Each token is run once and the reply's have logits; the very
    last one too, as it is when the conversation goes on."""
    _check(prompt_tokens=(prompt_tokens, 0), generated_tokens=(generated_tokens, 0))
    prompt = prefill_flops(shape, prompt_tokens, num_logits=0)
    reply = decode_flops(shape, generated_tokens, past_tokens=prompt_tokens)
    return _add(prompt, reply)


def training_flops(
    shape: ModelShape,
    *,
    num_sequences: int,
    sequence_tokens: int,
    recompute: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[FlopLine]:
    """Forward and backward of one step, every token with a loss.

    Backward has two products for each of forward's; with activation checkpointing the layers, not
    the head, run forward twice.
    """
    _check(num_sequences=(num_sequences, 1), sequence_tokens=(sequence_tokens, 1))
    forward = prefill_flops(
        shape, sequence_tokens, num_logits=sequence_tokens, chunk_tokens=chunk_tokens
    )
    times = {line.layers: 3 + int(recompute and line.layers != "head") for line in forward}
    return [
        replace(line, flops=line.flops * times[line.layers] * num_sequences) for line in forward
    ]


def _check(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}; allowed is an integer of at least {least}")


def _count(
    shape: ModelShape, past: int, new: int, num_logits: int, chunk_tokens: int | None
) -> list[FlopLine]:
    """Without `chunk_tokens`: token by token."""
    flops: dict[tuple[str, str], int] = {}
    kinds = [layer.attention.kind for layer in shape.layers]
    for layer in shape.layers:
        attention = layer.attention
        if chunk_tokens is None:
            mixing = attention.step_flops(past, new)
        else:
            mixing = attention.block_flops(past, new, chunk_tokens)
        products = [
            ("projections" if w.part == "attention" else w.part, 2 * w.num_used_params * new)
            for w in layer.weights(shape.hidden_size)
            if w.multiplies
        ]
        for operation, count in [*products, *mixing.items()]:
            key = attention.kind, operation
            flops[key] = flops.get(key, 0) + count
    lines = [
        FlopLine(layers=kind, num_layers=kinds.count(kind), operation=operation, flops=count)
        for (kind, operation), count in flops.items()
        if count
    ]
    head = 2 * shape.head_params * num_logits
    return [*lines, FlopLine(layers="head", num_layers=1, operation="logits", flops=head)]


def _add(*bills: list[FlopLine]) -> list[FlopLine]:
    """Lines of the same name summed."""
    sums: dict[tuple[str, str], FlopLine] = {}
    for line in (line for bill in bills for line in bill):
        key = line.layers, line.operation
        before = sums[key].flops if key in sums else 0
        sums[key] = replace(line, flops=before + line.flops)
    # The head comes last, whichever bill brought a line first.
    return sorted(sums.values(), key=lambda line: (line.layers == "head", line.layers))
