"""CISPO against TRL itself, on a tiny MiniMax: `make test-trl`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cispo_step import TRL_PYTHON, TrlPeer
from openm1.model.config import post_norm_config
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.vocabulary import nano_tokenizer, padded_vocab_size
from openm1.rl.batch import Sample, pack_samples
from openm1.rl.losses import CISPO, policy_loss, sample_shares
from openm1.train.loss import score_tokens

PYTHON = os.environ.get(TRL_PYTHON, "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason=f"needs TRL in an environment that {TRL_PYTHON} names: make test-trl"
)
NUM_PROMPT_TOKENS = 5
LENGTHS = (7, 3, 1, 6)
CAP = 1.5
SAME = 1e-6
"""Of the loss, and of the whole gradient by its length. fp64 on both sides, but transformers keeps
some tables in fp32."""
SAME_TENSOR = 3e-6
"""Of each tensor: transformers' router takes its softmax in fp32, and its own gradient is small."""


def tiny_model() -> M1ForCausalLM:
    """Heads of a size that transformers' MiniMax computes as M1 does, and both attentions."""
    tokenizer = nano_tokenizer()
    config = post_norm_config(
        vocab_size=padded_vocab_size(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rotary_dim=8,
        intermediate_size=32,
        num_local_experts=4,
        period=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    # TRL would add the experts' balance loss to what is compared.
    config = replace(config, router_aux_loss_coef=0.0)
    return M1ForCausalLM(config, dtype=torch.float64, seed=1)


def batch() -> dict[str, torch.Tensor]:
    """Prompts of one length, replies of several: nothing is padded on the left."""
    rows, longest = len(LENGTHS), max(LENGTHS)
    mask = (torch.arange(longest)[None] < torch.tensor(LENGTHS)[:, None]).long()
    return {
        "prompt_ids": torch.randint(5, 300, (rows, NUM_PROMPT_TOKENS)),
        "prompt_mask": torch.ones(rows, NUM_PROMPT_TOKENS, dtype=torch.long),
        "completion_ids": torch.randint(5, 300, (rows, longest)),
        "completion_mask": mask,
        "advantages": torch.tensor([1.5, -0.5, 0.25, -1.25], dtype=torch.float64),
        "old_per_token_logps": -6 + torch.randn(rows, longest, dtype=torch.float64),
    }


def samples(tensors: dict[str, torch.Tensor]) -> list[Sample]:
    made = []
    for row, length in enumerate(LENGTHS):
        prompt = tensors["prompt_ids"][row].tolist()
        reply = tensors["completion_ids"][row, :length].tolist()
        made.append(
            Sample(
                token_ids=(*prompt, *reply),
                loss_mask=(False,) * len(prompt) + (True,) * length,
                old_logprobs=tuple(tensors["old_per_token_logps"][row, :length].tolist()),
                advantage=float(tensors["advantages"][row]),
                prompt=0,
            )
        )
    return made


def test_loss_and_gradient_are_trls(tmp_path: Path):
    model, tensors = tiny_model(), batch()
    model.save_pretrained(tmp_path / "model", layout="transformers")
    nano_tokenizer().save_pretrained(tmp_path / "model")
    torch.save(tensors, tmp_path / "batch.pt")
    peer = TrlPeer(PYTHON)
    try:
        theirs = peer.ask(
            {
                "loss": str(tmp_path / "batch.pt"),
                "model": str(tmp_path / "model"),
                "cap": CAP,
                "gradient": str(tmp_path / "gradient"),
            }
        )["loss"]
    finally:
        peer.close()
    # A gradient is read as a checkpoint is: the layouts differ in names and stacking alone.
    gradient = M1ForCausalLM.from_pretrained(tmp_path / "gradient", dtype=torch.float64)

    made = samples(tensors)
    packed = pack_samples(made)
    shares = sample_shares("token", LENGTHS, [0] * len(LENGTHS))
    result = policy_loss(
        CISPO(eps_is_high=CAP - 1),
        score_tokens(model, packed.packed).logprobs,
        torch.tensor([p for s in made for p in s.old_logprobs], dtype=torch.float64),
        packed.advantages.double(),
        torch.tensor(shares, dtype=torch.float64)[packed.sample_index],
    )
    result.loss.backward()
    clipped = result.weights != result.ratio
    assert bool(clipped.any()) and not bool(clipped.all())
    assert float(result.loss.detach()) == pytest.approx(theirs, rel=SAME)
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(ours) == len(list(gradient.parameters()))
    squares = [0.0, 0.0]
    for name, parameter in gradient.named_parameters():
        difference, length = (
            float((ours[name] - parameter.detach()).norm()),
            float(ours[name].norm()),
        )
        squares = [squares[0] + difference**2, squares[1] + length**2]
        assert difference < SAME_TENSOR * length, name
    assert squares[0] ** 0.5 < SAME * squares[1] ** 0.5
