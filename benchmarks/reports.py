"""What is measured of OpenM1 alone: cache hits, time against context, memory, what int8 costs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestant import OpenM1
from openm1.engine.cache.hybrid import CachedSequence
from openm1.engine.cpu_runner import CpuRunner
from openm1.model.cache import CachePools
from openm1.model.config import M1Config
from openm1.model.m1 import M1ForCausalLM

CONTEXTS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)


def _nano(dtype: torch.dtype = torch.float32) -> M1ForCausalLM:
    from benchmarks.peers import random_weights
    from benchmarks.registry import nano_shape

    return random_weights(nano_shape(), dtype)


def prefix(threads: int) -> dict[str, Any]:
    """Three prompts that share their first half: cached tokens of each, here and in llama.cpp."""
    from benchmarks.peers import LlamaCppPeer

    model = _nano()
    ours = OpenM1(model)
    half = ours.random_ids(2048)
    cached = []
    for _ in range(3):
        request = ours.submit(half + ours.random_ids(2048), 1)
        ours.run(request)
        cached.append(request.num_cached)
    peer = LlamaCppPeer(model, max_batch=1, max_context=8192, threads=threads)
    try:
        theirs = [peer.cached_tokens(half + ours.random_ids(2048)) for _ in range(3)]
    finally:
        peer.close()
    return {"prompt_tokens": 4096, "cached_tokens": cached, "llama.cpp_cached_tokens": theirs}


def decode_bytes(config: M1Config, context: int, element: int) -> int:
    """Bytes that one decoded token moves: weights it uses, states in and out, keys and values."""
    hidden, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
    lightning, softmax = len(config.lightning_layers), len(config.softmax_layers)
    attention = heads * dim
    groups = config.num_key_value_heads * dim
    weights = lightning * 5 * attention * hidden + softmax * (2 * attention + 2 * groups) * hidden
    experts = 3 * config.num_experts_per_tok * config.intermediate_size * hidden
    weights += config.num_hidden_layers * experts + config.vocab_size * hidden
    states = 2 * lightning * heads * dim * dim * 4
    return weights * element + states + softmax * 2 * groups * context * element


def decode_flops(config: M1Config, context: int) -> int:
    """Multiplications and additions of one decoded token."""
    heads, dim = config.num_attention_heads, config.head_dim
    bytes_without_cache = decode_bytes(config, 0, 2)
    states = 2 * len(config.lightning_layers) * heads * dim * dim * 4
    weights = (bytes_without_cache - states) // 2
    lightning = len(config.lightning_layers) * heads * dim * dim * 5
    softmax = len(config.softmax_layers) * heads * dim * context * 4
    return 2 * weights + lightning + softmax


def long_contexts(threads: int) -> dict[str, Any]:
    """Median seconds of a decoded token at each context. The cache is filled with random numbers,
    not by a prefill: decoding moves the same bytes whatever they mean."""
    model = _nano()
    config = model.config
    rows = []
    for context in CONTEXTS:
        pages = context // 64 + 2
        pools = CachePools(config, num_pages=pages, num_slots=1)
        for table in (pools.keys, pools.values, pools.states):
            table.normal_()
        runner = CpuRunner(model, pools, threads)
        sequence = CachedSequence(
            pages=list(range(pages)), slot=0, num_tokens=context - 1,
            num_cached=0, branch_point=None, epoch=0,
        )  # fmt: skip
        times = []
        with torch.inference_mode():
            for _ in range(12):
                began = time.perf_counter()
                runner.decode([1], [sequence])
                times.append(time.perf_counter() - began)
        rows.append(
            {
                "context": context,
                "seconds_per_token": statistics.median(times[2:]),
                "bytes_per_token": decode_bytes(config, context, 4),
                "flops_per_token": decode_flops(config, context),
            }
        )
    short, long = rows[0], next(row for row in rows if row["context"] == 262_144)
    return {
        "curve": rows,
        "256K_over_1K_measured": long["seconds_per_token"] / short["seconds_per_token"],
        "256K_over_1K_by_bytes": long["bytes_per_token"] / short["bytes_per_token"],
        "256K_over_1K_by_flops": long["flops_per_token"] / short["flops_per_token"],
    }


def prefill_memory(threads: int) -> dict[str, Any]:
    """Peak resident memory over the weights, of a 256K prompt and of one chunk (bf16), each in a
    process of its own: the long one should need only its keys and values more."""
    from benchmarks.registry import nano_shape

    chunk, length = 2048, 262_144
    peaks = {}
    for tokens in (chunk, length):
        command = [sys.executable, "-m", "benchmarks.peak", str(tokens), str(threads)]
        root = Path(__file__).parent.parent
        out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
        peaks[tokens] = json.loads(out.stdout.splitlines()[-1])["peak_bytes"]
    config = nano_shape()
    per_page = CachePools.page_bytes(config, 64, torch.bfloat16)
    # One chunk's peak has its own pages and the state in it already.
    allowed = peaks[chunk] + (length - chunk) // 64 * per_page
    return {
        "one_chunk_bytes": peaks[chunk],
        "keys_and_values_bytes": length // 64 * per_page,
        "allowed_bytes": allowed,
        "peak_bytes": peaks[length],
        "peak_over_allowed": peaks[length] / allowed,
    }
