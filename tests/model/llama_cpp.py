"""llama.cpp in this process, as an oracle: what it thinks of every token it generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


class LlamaCpp:
    """One sequence at a time, or `num_slots` of them together; fp32 cache, no prefix reuse."""

    def __init__(self, path: Path, *, num_slots: int = 1) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = 512 * num_slots, num_slots
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Its fused attention rounds keys and values to fp16 whatever the cache holds.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.use_jinja, params.verbosity = False, False, -1
        self.server = xllamacpp.Server(params)

    def greedy(
        self, prompt_ids: list[int], max_tokens: int, vocab_size: int
    ) -> tuple[list[int], torch.Tensor]:
        """The tokens chosen, and the log-probabilities of all [tokens, V], NaN where unsaid."""
        reply = self.server.handle_completions(
            {
                "prompt": prompt_ids,
                "n_predict": max_tokens,
                "temperature": 0.0,
                "n_probs": vocab_size,
                "cache_prompt": False,
            }
        )
        assert "choices" in reply, reply
        tokens = reply["choices"][0]["logprobs"]["content"]
        logprobs = torch.full((len(tokens), vocab_size), float("nan"))
        for row, token in zip(logprobs, tokens, strict=True):
            for entry in token["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
        return [token["id"] for token in tokens], logprobs
