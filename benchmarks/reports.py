"""What is measured of OpenM1 alone: cache hits, time against context, memory, what int8 costs."""

from __future__ import annotations

import json
import random
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
from openm1.planner.devices import Device, measure_cpu
from openm1.planner.memory import FORMATS
from openm1.planner.models import from_m1
from openm1.planner.roofline import StepTime, Utilisation, decode_bytes, decode_time
from openm1.types import SamplingParams

CONTEXTS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
LONG_TURNS = 7


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


def _predicted(config: M1Config, context: int) -> tuple[Device, StepTime]:
    """One fp32 token by this machine's peaks, wholly used: its bandwidth is that of reading as many
    bytes again and again as the token moves."""
    shape, format_ = from_m1(config, "nano"), FORMATS["float32"]
    moved = decode_bytes(shape, format_, num_sequences=1, context_tokens=context)
    cpu = measure_cpu(round(sum(moved.values())))
    whole = Utilisation(compute=1.0, bandwidth=1.0)
    step = decode_time(
        shape, format_, cpu, num_sequences=1, context_tokens=context, utilisation=whole
    )
    return cpu, step


def _decode_s(runner: CpuRunner, context: int) -> float:
    """Median seconds of a token, over caches filled with random numbers, not by a prefill: decoding
    moves the same bytes whatever they mean."""
    sequence = CachedSequence(
        pages=list(range(context // 64 + 2)), slot=0, num_tokens=context - 1,
        num_cached=0, branch_point=None, epoch=0,
    )  # fmt: skip
    times = []
    with torch.inference_mode():
        for _ in range(12):
            began = time.perf_counter()
            runner.decode([1], [sequence])
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def long_contexts(threads: int) -> dict[str, Any]:
    """Seconds of a decoded token at each context, beside what the planner predicts.

    Machine and decoding are measured in turns, so that both see the same hour; medians of turns.
    """
    model = _nano()
    rows = []
    for context in CONTEXTS:
        pools = CachePools(model.config, num_pages=context // 64 + 2, num_slots=1)
        for table in (pools.keys, pools.values, pools.states):
            table.normal_()
        runner = CpuRunner(model, pools, threads)
        turns = []
        for _ in range(LONG_TURNS):
            cpu, predicted = _predicted(model.config, context)
            # The threads that multiplied for numpy spin for a while, on cores that decoding needs.
            time.sleep(0.2)
            seconds = _decode_s(runner, context)
            turns.append(
                {
                    "seconds_per_token": seconds,
                    "predicted_s": predicted.seconds,
                    "measured_over_predicted": seconds / predicted.seconds,
                    "machine_bytes_per_s": cpu.peak_bytes_per_s,
                    "machine_fp32_flops_per_s": cpu.peak_flops_per_s,
                }
            )
        ratios = [turn["measured_over_predicted"] for turn in turns]
        rows.append(
            {
                "context": context,
                **{name: statistics.median(t[name] for t in turns) for name in turns[0]},
                "lowest_ratio": min(ratios),
                "highest_ratio": max(ratios),
                "bound": predicted.bound,
                "bytes_per_token": predicted.moved_bytes,
                "flops_per_token": predicted.flops,
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


def million(threads: int) -> dict[str, Any]:
    """A prompt of 1,000,000 tokens and an answer of 1,000 (bf16), as a user would ask for them."""
    from openm1.cli.progress import ProgressDisplay
    from openm1.engine.llm import LLM, Progress

    llm = LLM(_nano(torch.bfloat16))
    prompt = random.choices(range(llm.model.config.vocab_size), k=1_000_000)
    params = SamplingParams(max_tokens=1000, ignore_eos=True, repetition_stop_tokens=0)
    began = time.perf_counter()
    marks: list[tuple[float, Progress]] = []
    with ProgressDisplay() as display:

        def watch(progress: Progress) -> None:
            display(progress)
            marks.append((time.perf_counter() - began, progress))

        completion = llm.generate([prompt], params, on_progress=watch)[0][0]
    read_s = next(at for at, progress in marks if progress.answer_tokens)
    return {
        "prompt_tokens": completion.num_prompt_tokens,
        "prompt_s": read_s,
        "answer_tokens": len(completion.token_ids),
        "answer_tokens_per_s": len(completion.token_ids) / (marks[-1][0] - read_s),
        "cache_bytes": llm.engine.memory.in_use_bytes,
    }
