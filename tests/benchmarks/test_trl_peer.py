"""What the race with TRL gives to transformers is the same model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from benchmarks.cispo_step import save_for_transformers
from benchmarks.trl_peer import repair_cache
from openm1.model.config import M1Config
from openm1.model.m1 import M1ForCausalLM

TOLERANCE = 2e-5
"""Logits of about 1 through four layers of fp32."""
CONFIG = M1Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=4,
    attn_type_list=(0, 1, 0, 1),
    num_local_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.2,
)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours = M1ForCausalLM(CONFIG).eval()
    frequencies = save_for_transformers(ours, str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.model.rotary_emb.inv_freq.copy_(torch.tensor(frequencies))
    # Put back what the repair changes.
    monkeypatch.setattr(MiniMaxCache, "get_seq_length", MiniMaxCache.get_seq_length)
    monkeypatch.setattr(MiniMaxCache, "get_mask_sizes", MiniMaxCache.get_mask_sizes)
    return ours, theirs.eval()


@torch.no_grad()
def test_half_a_head_is_rotated(models):
    ours, theirs = models
    ids = torch.arange(20)[None] * 7 % 96
    expected = ours(ids)
    assert (theirs(ids).logits - expected).abs().max() < TOLERANCE * expected.abs().max()
    whole = M1ForCausalLM(replace(CONFIG, rotary_dim=CONFIG.head_dim)).eval()
    whole.load_state_dict(ours.state_dict())
    assert (whole(ids) - expected).abs().max() > 100 * TOLERANCE * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("repaired", [False, True])
def test_tokens_after_a_padded_prompt_see_the_prompt(models, repaired):
    ours, theirs = models
    if repaired:
        repair_cache(theirs)
    ids = torch.arange(12)[None] * 7 % 96
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids[:, :-1]], 1)
    mask = (torch.arange(15) >= 3).long()[None]
    cache = theirs(padded, attention_mask=mask[:, :-1], use_cache=True).past_key_values
    after = theirs(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
    expected = ours(ids)[:, -1]
    difference = (after - expected).abs().max() / expected.abs().max()
    # Without the repair this is transformers' fault, and the reason for it.
    assert difference < TOLERANCE if repaired else difference > 100 * TOLERANCE
