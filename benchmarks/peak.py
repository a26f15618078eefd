"""`python -m benchmarks.peak TOKENS THREADS`: peak memory of a prefill over the weights (Linux)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks.contestant import OpenM1
from benchmarks.peers import random_weights
from benchmarks.registry import nano_shape


def peak_bytes() -> int:
    """The most memory that was ever resident, since it was last forgotten."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much memory was resident at most")


def main() -> None:
    tokens, threads = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    ours = OpenM1(random_weights(nano_shape(), torch.bfloat16))
    # Libraries load and kernels compile at first use, which is not the prompt's doing.
    ours.prefill_s(64)
    prompt = ours.random_ids(tokens)  # The caller's, whoever computes it.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    ours.timed_prompts([prompt])
    print(json.dumps({"peak_bytes": peak_bytes() - before}))


if __name__ == "__main__":
    main()
