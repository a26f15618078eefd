"""Log-probabilities of given tokens, and the losses of supervised learning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openm1.data.packing import PackedBatch
from openm1.model.m1 import M1ForCausalLM

# Rows of logits held at once: at M1's vocabulary 1,024 rows of fp32 are 0.8 GB.
LOGIT_ROWS = 1024
SMALL_VOCAB_LOGITS = 16_000_000


@dataclass(frozen=True)
class TokenScores:
    """What the model thinks of chosen tokens of a packed batch."""

    logprobs: Float[Tensor, " M"]
    """fp32, in packed order of the masked places."""
    entropy: Float[Tensor, " M"]
    """Of the whole distribution at each place, nats, without gradient."""
    aux_loss: Tensor


def score_tokens(
    model: M1ForCausalLM,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    experts: Int[Tensor, "T LK"] | None = None,
) -> TokenScores:
    """Log-probabilities of the targets where the loss mask is set (M places).

    `experts` are K for each layer that tokens go to again, -1 where the router chooses.

    With `vocab_size`, ids from there on get no probability, as in sampling: they are rows that pad
    the model's vocabulary and have no text.
    """
    if experts is not None:
        layers = model.config.num_hidden_layers
        experts = experts.unflatten(1, (layers, model.config.num_experts_per_tok))
    output = model.model(batch.input_ids, batch.layout, experts=experts)
    rows = batch.loss_mask.nonzero()[:, 0]
    hidden = output.hidden.index_select(0, rows)
    targets = batch.targets.index_select(0, rows)
    step = max(LOGIT_ROWS, SMALL_VOCAB_LOGITS // model.config.vocab_size)
    parts = [
        _score(model, hidden[i : i + step], targets[i : i + step], temperature, vocab_size)
        for i in range(0, max(len(hidden), 1), step)
    ]
    logprobs, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenScores(logprobs, entropy, output.aux_loss)


def _score(
    model: M1ForCausalLM,
    hidden: Tensor,
    targets: Int[Tensor, " M"],
    temperature: float,
    vocab_size: int | None,
) -> tuple[Tensor, Tensor]:
    logits = model.logits(hidden)[:, :vocab_size]
    # A division by 1 would go through all of them for nothing, and back.
    logprobs = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def supervised_loss(scores: TokenScores, aux_coef: float) -> Tensor:
    """Summed cross-entropy of the batch's tokens, plus the experts' balance loss per token.

    A sum, so that the cross-entropies of micro-batches of any sizes add up to the one big batch's.
    The balance loss is each micro-batch's own, weighted by its tokens.
    """
    count = len(scores.logprobs)
    return -scores.logprobs.sum() + aux_coef * count * scores.aux_loss
