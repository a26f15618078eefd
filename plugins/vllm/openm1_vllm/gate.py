"""The upgrade gate: is the vLLM installed here still right? `python -m openm1_vllm.gate`

Random checkpoints are served under many settings, each in a process of its own. Every greedy token
must be the one OpenM1's own model chooses after the same tokens, and its log-probability must be
within 1e-5. A table says what held; the exit status is 1 where something did not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "OPENM1 "
"""Starts the line that holds a process's answer: vLLM logs to the same place."""
MAX_LOGPROB_ERROR = 1e-5
TIMEOUT_S = 900
VOCAB_SIZE = 512

Prompt = tuple[int, int]
"""Number of tokens and seed: prompts of one seed begin alike."""


def _each(lengths: Iterable[int], seed: int) -> tuple[Prompt, ...]:
    return tuple((n, seed + i) for i, n in enumerate(lengths))


MIXED = (
    _each((1, 2, 5, 31, 64, 65, 257, 1000, 3000), 0),
    # On pages that others have used, where a prompt of one token must not be taken for a decode.
    _each([1] * 16, 100) + _each((1, 90, 1, 2, 1, 33), 200),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    rounds: tuple[tuple[Prompt, ...], ...] = MIXED
    """Batches one after the other."""
    engine: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    new_tokens: int = 16
    must_happen: str = ""
    """A counter of vLLM's that must not be 0 at the end, or "refused"."""

    @property
    def eager(self) -> bool:
        return self.engine.get("enforce_eager", True)

    @property
    def devices(self) -> int:
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        return max(self.engine.get(size, 1) for size in sizes)


PREFIXES = (
    ((700, 1), (300, 2)),
    ((700, 1), (1500, 1), (300, 2), (301, 2), (64, 3)),
    ((1500, 1), (1501, 1), (900, 2)),
)
CASES = (
    Case(name="mixed lengths, old pages"),
    Case(name="chunks of 33 tokens", engine={"max_num_batched_tokens": 33, "max_num_seqs": 4}),
    Case(name="33 tokens a prompt", engine={"long_prefill_token_threshold": 33}),
    Case(
        name="prefix caching",
        rounds=PREFIXES,
        engine={"enable_prefix_caching": True},
        must_happen="vllm:prefix_cache_hits",
    ),
    Case(
        name="prefix caching in chunks",
        rounds=PREFIXES,
        engine={"enable_prefix_caching": True, "long_prefill_token_threshold": 130},
        must_happen="vllm:prefix_cache_hits",
    ),
    Case(
        name="preemption",
        rounds=(_each(range(200, 208), 0),),
        new_tokens=100,
        engine={"num_gpu_blocks_override": 24, "max_model_len": 1024},
        must_happen="vllm:num_preemptions",
    ),
    Case(name="tensor parallel 2", engine={"tensor_parallel_size": 2}),
    Case(name="torch.compile", engine={"enforce_eager": False}),
    Case(
        # Without compilation vLLM's CPU build cannot: see docs/vllm.md.
        name="pipeline parallel 2",
        engine={"pipeline_parallel_size": 2, "enforce_eager": False},
    ),
    Case(
        name="Text-01, pre-norm, 8 heads",
        config={
            "model_type": "minimax_text_01",
            "architectures": ["MiniMaxText01ForCausalLM"],
            "postnorm": False,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
    Case(
        name="speculation",
        engine={"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        must_happen="refused",
    ),
)


def shape(case: Case) -> dict[str, Any]:
    """A config.json: 6 heads, partial rotary, unequal scales of the residuals."""
    from dataclasses import replace

    from openm1.model.config import post_norm_config

    config = post_norm_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        period=2,
        head_dim=32,
        rotary_dim=16,
        num_key_value_heads=2,
        intermediate_size=64,
        layernorm_linear_attention_alpha=1.7,
        layernorm_linear_attention_beta=0.9,
        layernorm_full_attention_alpha=2.3,
        layernorm_full_attention_beta=1.1,
        layernorm_mlp_alpha=1.4,
        layernorm_mlp_beta=0.8,
        max_position_embeddings=10_240,
    )
    names = {"model_type", "architectures"}
    config = replace(config, **{k: v for k, v in case.config.items() if k not in names})
    return config.to_dict() | case.config


def prompt(num_tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=num_tokens)


# In the process that has vLLM.


def serve(case: Case, folder: str) -> dict[str, Any]:
    """{"replies": [[token ids, log-probabilities], ...], "counter": ...}."""
    from vllm import LLM, SamplingParams

    settings = {
        "dtype": "float32",
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
    }
    try:
        llm = LLM(folder, **settings | case.engine)
    except ValueError as error:
        if case.must_happen != "refused":
            raise
        return {"replies": [], "counter": int("speculative decoding is on" in str(error))}
    params = SamplingParams(
        temperature=0.0, max_tokens=case.new_tokens, ignore_eos=True, detokenize=False, logprobs=0
    )
    replies = []
    for batch in case.rounds:
        prompts = [{"prompt_token_ids": prompt(*p)} for p in batch]
        for output in llm.generate(prompts, params, use_tqdm=False):
            reply = output.outputs[0]
            logprobs = [next(iter(step.values())).logprob for step in reply.logprobs]
            replies.append([list(reply.token_ids), logprobs])
    counters = [getattr(m, "value", None) for m in llm.get_metrics() if m.name == case.must_happen]
    return {"replies": replies, "counter": counters[0] if counters else None}


# In the process that has OpenM1's model.


@dataclass(frozen=True)
class Verdict:
    ok: bool
    detail: str
    seconds: float


def judge(case: Case, answer: dict[str, Any], folder: str) -> tuple[bool, str]:
    """Compares each reply with OpenM1's model, which reads prompt and reply at once."""
    import torch

    from openm1.model.m1 import M1ForCausalLM

    if case.must_happen and not answer["counter"]:
        return False, f"{case.must_happen} did not happen"
    if case.must_happen == "refused":
        return True, "refused with a reason"
    model = M1ForCausalLM.from_pretrained(folder)
    wrong, total, worst = 0, 0, 0.0
    prompts = [prompt(*p) for batch in case.rounds for p in batch]
    for ids, (tokens, logprobs) in zip(prompts, answer["replies"], strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1].log_softmax(-1)
        best = expected.max(-1)
        wrong += int((best.indices != torch.tensor(tokens)).sum())
        total += len(tokens)
        worst = max(worst, float((best.values - torch.tensor(logprobs)).abs().max()))
    counted = f", {case.must_happen} {answer['counter']:.0f}" if case.must_happen else ""
    detail = f"{total - wrong} of {total} tokens, log-probabilities to {worst:.1e}{counted}"
    return wrong == 0 and worst <= MAX_LOGPROB_ERROR, detail


def run(case: Case, *, any_version: bool = False) -> Verdict:
    """Makes the checkpoint, serves it in a process of its own, judges what comes back."""
    from openm1.model.config import M1Config
    from openm1.model.m1 import M1ForCausalLM

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = shape(case)
        M1ForCausalLM(M1Config.from_dict(config), seed=3).save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        ok, detail = _run(case, folder, any_version)
    return Verdict(ok, detail, time.monotonic() - began)


def _run(case: Case, folder: str, any_version: bool) -> tuple[bool, str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "openm1_vllm.gate", "--serve", case.name, folder],
        env=environment(case, any_version),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False, f"no answer in {TIMEOUT_S} s"
    finally:
        # vLLM has processes of its own, which may outlive the one that started them.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    answers = [line for line in stdout.splitlines() if line.startswith(MARK)]
    if not answers:
        log = Path(tempfile.gettempdir()) / f"openm1-gate-{case.name.replace(' ', '-')}.log"
        log.write_text(stdout + stderr)
        return False, f"vLLM ended with status {process.returncode}; its log is {log}"
    return judge(case, json.loads(answers[-1].removeprefix(MARK)), folder)


def environment(case: Case, any_version: bool = False) -> dict[str, str]:
    """What vLLM on a CPU needs to start beside other work, and fast."""
    values = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
    }
    if case.devices == 1:
        values["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if case.eager:
        # vLLM compiles some of its sampler even then.
        values["TORCHDYNAMO_DISABLE"] = "1"
    if any_version:
        values["OPENM1_VLLM_ANY_VERSION"] = "1"
    return dict(os.environ) | values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--any-version", action="store_true", help="also on an untested vLLM")
    parser.add_argument("--serve", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, folder = options.serve
        case = next(case for case in CASES if case.name == name)
        print(MARK + json.dumps(serve(case, folder)), flush=True)
        return 0
    from openm1_vllm.register import vllm_version

    print(f"vLLM {vllm_version()}", flush=True)
    failures = 0
    for case in CASES:
        if options.only and options.only not in case.name:
            continue
        verdict = run(case, any_version=options.any_version)
        failures += not verdict.ok
        word = "ok" if verdict.ok else "FAILED"
        print(f"{case.name:30} {word:7} {verdict.seconds:4.0f} s  {verdict.detail}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
