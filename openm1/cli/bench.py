"""How fast a model runs here: prompts read, tokens written, one sequence or many."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from openm1.engine.llm import LLM
from openm1.engine.request import Request
from openm1.types import SamplingParams


def run_bench(
    llm: LLM,
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    num_tokens: int,
    repeats: int,
    as_json: bool,
) -> None:
    """Random prompts through the engine, greedy; medians of `repeats`, the first not counted."""
    rows: list[dict[str, Any]] = []
    draw = Random(0)
    highest = llm.engine.tokens.vocab_size - 1

    def submit(length: int, max_tokens: int) -> Request:
        prompt_ids = [draw.randint(0, highest) for _ in range(length)]
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, repetition_stop_tokens=0
        )
        return llm.engine.submit(prompt_ids, params)

    for context in contexts:
        seconds = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            _step_until_first_token(llm, [submit(context, 1)])
            seconds.append(time.perf_counter() - began)
        rate = context / statistics.median(seconds[1:])
        rows.append({"case": "prefill", "context": context, "batch": 1, "tokens_per_s": rate})
        for batch in batches:
            count = num_tokens * (repeats + 1)
            requests = [submit(context, count + 1) for _ in range(batch)]
            try:
                _step_until_first_token(llm, requests)
                seconds = []
                for _ in range(repeats):
                    began = time.perf_counter()
                    for _ in range(num_tokens):
                        llm.engine.step()
                    seconds.append(time.perf_counter() - began)
            finally:
                for request in requests:
                    llm.engine.abort(request)
            rate = batch * num_tokens / statistics.median(seconds)
            rows.append(
                {"case": "decode", "context": context, "batch": batch, "tokens_per_s": rate}
            )
        print(f"context {context} done", file=sys.stderr)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("case", "context", "batch", "tokens/s")
    for row in rows:
        table.add_row(
            row["case"], f"{row['context']:,}", str(row["batch"]), f"{row['tokens_per_s']:,.0f}"
        )
    Console().print(table)


def _step_until_first_token(llm: LLM, requests: list[Request]) -> None:
    while not all(request.output_ids for request in requests):
        llm.engine.step()
