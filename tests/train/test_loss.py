from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from openm1.data.packing import Example, pack
from openm1.model.m1 import M1ForCausalLM
from openm1.train import loss as loss_file
from openm1.train.loss import score_tokens, supervised_loss

from .tiny import VOCAB, gradients, random_examples, tiny_model

# Products in fp64, but decay and state of the lightning layers are fp32 whatever the model is.
PACKED_TOLERANCE = 1e-6


def gradient_of(model: M1ForCausalLM, *batches: list[Example], aux_coef: float = 0.0):
    model.zero_grad()
    for batch in batches:
        supervised_loss(score_tokens(model, pack(batch)), aux_coef).backward()
    return gradients(model)


def test_a_packed_batch_has_the_gradient_of_its_sequences_alone():
    model = tiny_model()
    batch = random_examples(Random(0), 2, 70, 9, 33, 65)
    packed = gradient_of(model, batch)
    alone = gradient_of(model, *([example] for example in batch))
    assert float(alone.norm()) > 1
    assert float((packed - alone).norm() / alone.norm()) < PACKED_TOLERANCE


def test_micro_batches_add_up():
    model = tiny_model()
    batch = random_examples(Random(1), 12, 5, 40, 7)
    whole = gradient_of(model, batch)
    split = gradient_of(model, batch[:1], batch[1:])
    assert float((whole - split).norm() / whole.norm()) < PACKED_TOLERANCE


def test_log_probabilities_are_those_of_the_logits():
    model = tiny_model()
    first, second = random_examples(Random(2), 11, 6)
    scores = score_tokens(model, pack([first, second]), temperature=0.7)
    expected, entropies = [], []
    for example in (first, second):
        logits = model(torch.tensor([example.token_ids]))[0, :-1] / 0.7
        table = logits.log_softmax(-1)
        for t, flag in enumerate(example.loss_mask[1:]):
            if flag:
                expected.append(table[t, example.token_ids[t + 1]])
                entropies.append(torch.distributions.Categorical(logits=logits[t]).entropy())
    torch.testing.assert_close(scores.logprobs, torch.stack(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.entropy, torch.stack(entropies), rtol=0, atol=1e-6)
    assert not scores.entropy.requires_grad


def test_what_is_not_learned_gives_no_gradient():
    model = tiny_model()
    learned, other = random_examples(Random(3), 9, 9)
    masked = replace(other, loss_mask=[False] * 9)
    both, one = gradient_of(model, [learned, masked]), gradient_of(model, [learned])
    assert float(one.norm()) > 0
    assert float((both - one).norm() / one.norm()) < PACKED_TOLERANCE


def test_a_last_token_that_is_not_learned_changes_nothing():
    # It is no input either, so not even rounding may tell one from another.
    model = tiny_model()
    tokens, mask = [1, 2, 3, 4, 5], [True, True, True, True, False]
    first, second = (
        gradient_of(model, [Example(token_ids=[*tokens[:-1], last], loss_mask=mask)])
        for last in (5, 9)
    )
    assert torch.equal(first, second)


def test_a_batch_without_a_learned_token_has_gradient_zero():
    model = tiny_model()
    masked = [Example(token_ids=[1, 2, 3], loss_mask=[False] * 3)]
    assert float(gradient_of(model, masked, aux_coef=0.1).abs().max()) == 0


def test_ids_beyond_the_vocabulary_have_no_share():
    model = tiny_model()
    batch = pack([Example(token_ids=[1, 2, 3, 4], loss_mask=[True] * 4)])
    scores = score_tokens(model, batch, vocab_size=VOCAB - 6)
    table = model(torch.tensor([[1, 2, 3]]))[0, :, : VOCAB - 6].log_softmax(-1)
    torch.testing.assert_close(scores.logprobs, table[[0, 1, 2], [2, 3, 4]], rtol=0, atol=1e-6)
    assert bool((scores.logprobs > score_tokens(model, batch).logprobs).all())
    assert bool(scores.entropy.isfinite().all())


def test_logits_in_parts_are_logits_at_once(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model()
    batch = pack(random_examples(Random(4), 20, 13))
    whole = score_tokens(model, batch)
    monkeypatch.setattr(loss_file, "LOGIT_ROWS", 3)
    monkeypatch.setattr(loss_file, "SMALL_VOCAB_LOGITS", 1)
    parts = score_tokens(model, batch)
    torch.testing.assert_close(parts.logprobs, whole.logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.entropy, whole.entropy, rtol=0, atol=1e-12)


def test_the_balance_loss_counts_by_tokens():
    model = tiny_model()
    scores = score_tokens(model, pack(random_examples(Random(5), 10)))
    difference = supervised_loss(scores, 0.5) - supervised_loss(scores, 0.0)
    expected = 0.5 * len(scores.logprobs) * float(scores.aux_loss.detach())
    assert float(difference.detach()) == pytest.approx(expected)
