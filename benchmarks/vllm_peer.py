"""vLLM on the CPU in an interpreter of its own: reads one JSON job a line, prints one answer each.

It imports nothing of this project: the environment vLLM needs has other versions of what the
project needs. The model is named by its config and has random weights. Jobs and answers:

    python vllm_peer.py '{"config": {...}, "dtype": "bfloat16", "threads": 1,
                          "max_batch": 32, "max_context": 2048}'
    {"prefill": 1024}           ->  OPENM1 {"seconds": 0.11}
    {"decode": [8, 1024, 32]}   ->  OPENM1 {"seconds": 0.52}

With "cpu_time": true, seconds are those of the process's own time on the CPU.
"""

from __future__ import annotations

import hashlib
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
CALLS_A_PROMPT = 4
WIDTH = 0.02 * 3**0.5
"""Of a uniform distribution with a standard deviation of 0.02."""


def main() -> None:
    start = json.loads(sys.argv[1])
    # vLLM reads these when it is imported.
    os.environ["OMP_NUM_THREADS"] = str(start["threads"])
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    # At the same place every time: vLLM keeps what it compiles by the model's path.
    text = json.dumps(start["config"])
    name = f"openm1-vllm-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    engine = Engine(str(folder), start)
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
        from vllm.model_executor.model_loader import dummy_loader

        dummy_loader.initialize_single_dummy_weight = Weights().draw
        self._vocab_size = start["config"]["vocab_size"]
        self._max_context = start["max_context"]
        self._clock = time.process_time if start.get("cpu_time") else time.perf_counter
        self._llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=start["dtype"],
            max_model_len=start["max_context"],
            max_num_seqs=start["max_batch"],
            enable_prefix_caching=True,
        )
        self._running: tuple[int, int] | None = None
        self._num_calls = 0
        self._num_requests = 0
        self._run(self._fresh(1, 32), 4)

    def prefill_s(self, num_tokens: int) -> float:
        """Of a prompt that was never seen before, so that nothing of it is cached."""
        self._stop()
        return self._run(self._fresh(1, num_tokens), 1)

    def decode_s(self, batch: int, context: int, num_tokens: int) -> float:
        """Every CALLS_A_PROMPT calls begin with new prompts, which are not counted: a model of
        random weights soon repeats a token or two, and how many experts those are sent to is what
        is read from memory."""
        if self._running != (batch, context) or self._num_calls % CALLS_A_PROMPT == 0:
            self._start(batch, context)
            self._running, self._num_calls = (batch, context), 0
        self._num_calls += 1
        began, count = self._clock(), 0
        while count < batch * num_tokens:
            count += len(self._llm.llm_engine.step())
        return self._clock() - began

    def _start(self, batch: int, context: int) -> None:
        self._stop()
        engine = self._llm.llm_engine
        names = [str(i) for i in range(self._num_requests, self._num_requests + batch)]
        self._num_requests += batch
        for name, prompt in zip(names, self._fresh(batch, context), strict=True):
            room = self._max_context - context
            engine.add_request(name, {"prompt_token_ids": prompt}, _greedy(room))
        waiting = set(names)
        while waiting:
            waiting -= {output.request_id for output in engine.step()}

    def _stop(self) -> None:
        self._llm.llm_engine.abort_request([str(i) for i in range(self._num_requests)])
        self._running = None

    def _run(self, prompts: list[list[int]], num_tokens: int) -> float:
        began = self._clock()
        prompts_of_ids = [{"prompt_token_ids": p} for p in prompts]
        self._llm.generate(prompts_of_ids, _greedy(num_tokens), use_tqdm=False)
        return self._clock() - began

    def _fresh(self, count: int, length: int) -> list[list[int]]:
        return [random.choices(range(self._vocab_size), k=length) for _ in range(count)]


class Weights:
    """Draws matrices as training begins with them, and norms of 1.

    vLLM's own random weights are the same numbers in every matrix, so that all layers send a token
    to the same experts: how many are busy, and so how much is read from memory, is luck.
    """

    def __init__(self) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(1)

    def draw(self, parameter: Any) -> None:
        if not parameter.is_floating_point():
            return
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.uniform_(-WIDTH, WIDTH, generator=self._generator)


def _greedy(num_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


if __name__ == "__main__":
    main()
