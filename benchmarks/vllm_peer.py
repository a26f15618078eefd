"""vLLM on the CPU in an interpreter of its own: reads one JSON job a line, prints one answer each.

It imports nothing of this project: the environment vLLM needs has other versions of what the
project needs. The model is named by its config and has random weights. Jobs and answers:

    python vllm_peer.py '{"config": {...}, "dtype": "bfloat16", "threads": 1,
                          "max_batch": 32, "max_context": 2048}'
    {"prefill": 1024}           ->  OPENM1 {"seconds": 0.11}
    {"decode": [8, 1024, 32]}   ->  OPENM1 {"seconds": 0.52}
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARK = "OPENM1 "
"""Starts the lines that hold answers: vLLM logs to the same place."""


def main() -> None:
    start = json.loads(sys.argv[1])
    # vLLM reads these when it is imported.
    os.environ["OMP_NUM_THREADS"] = str(start["threads"])
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(start["config"]))
        engine = Engine(folder, start)
    print(MARK + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        seconds = (
            engine.prefill_s(job["prefill"])
            if "prefill" in job
            else engine.decode_s(*job["decode"])
        )
        print(MARK + json.dumps({"seconds": seconds}), flush=True)


class Engine:
    def __init__(self, folder: str, start: dict[str, Any]) -> None:
        from vllm import LLM

        self._vocab_size = start["config"]["vocab_size"]
        self._llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=start["dtype"],
            max_model_len=start["max_context"],
            max_num_seqs=start["max_batch"],
            enable_prefix_caching=True,
        )
        self._prompts: dict[tuple[int, int], list[list[int]]] = {}
        self._run(self._fresh(1, 32), 4)

    def prefill_s(self, num_tokens: int) -> float:
        """Of a prompt that was never seen before, so that nothing of it is cached."""
        return self._run(self._fresh(1, num_tokens), 1)

    def decode_s(self, batch: int, context: int, num_tokens: int) -> float:
        """The difference of two runs of the same prompts, one of which stops at its first token.
        Both find the prompts in the prefix cache."""
        key = batch, context
        if key not in self._prompts:
            self._prompts = {key: self._fresh(batch, context)}
            self._run(self._prompts[key], 1)
        prompts = self._prompts[key]
        return self._run(prompts, num_tokens + 1) - self._run(prompts, 1)

    def _run(self, prompts: list[list[int]], num_tokens: int) -> float:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return time.perf_counter() - began

    def _fresh(self, count: int, length: int) -> list[list[int]]:
        return [random.choices(range(self._vocab_size), k=length) for _ in range(count)]


if __name__ == "__main__":
    main()
