"""`openm1 serve`: a model, an engine and a server put together."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openm1.engine.client import EnginePolicy
from openm1.engine.llm import LLM
from openm1.server.app import build_app
from openm1.server.config import ServerConfig
from openm1.server.run import run_server
from openm1.server.served import CacheCounts, ServedModel
from openm1.types import SamplingParams

# Nobody reads faster than twenty pieces a second, and each piece costs as much as a token of nano.
BURST_S = 0.05
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run_serve(llm: LLM, name: str, config: ServerConfig, *, context_tokens: int | None) -> None:
    """Serves until it is told to stop; says on standard error where."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if config.host not in LOOPBACK and not config.api_keys:
        logging.warning("%s is reachable from outside and no API key is set", config.host)
    # Kernels are compiled and memory is taken before the first client comes.
    llm.generate([[0]], SamplingParams(max_tokens=2, ignore_eos=True))
    app = build_app(served_model(llm, name, context_tokens=context_tokens), config)
    try:
        run_server(app, config, on_ready=lambda address: _greet(name, address))
    except OSError as error:
        sys.exit(f"openm1: cannot listen on {config.host}:{config.port}: {error}")


def served_model(llm: LLM, name: str, *, context_tokens: int | None = None) -> ServedModel:
    """What the server may know of an LLM. ValueError for a model without a tokenizer."""
    if llm.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer; a server needs one")
    try:
        chat_format = llm.chat_format
    except ValueError:  # A base model without a template still continues text.
        chat_format = None
    positions = llm.model.config.max_position_embeddings
    return ServedModel(
        name=name,
        policy=EnginePolicy(llm.engine, tokenizer=llm.tokenizer, burst_s=BURST_S),
        tokenizer=llm.tokenizer,
        chat_format=chat_format,
        context_tokens=min(context_tokens or positions, positions),
        cache_counts=lambda: _cache_counts(llm),
        read_weights=_read_weights,
        policy_version=lambda: llm.engine.policy_version,
    )


def read_keys(file: Path | None) -> dict[str, str]:
    """Keys by name: lines `NAME KEY` of a file, and OPENM1_API_KEY as "default"."""
    keys: dict[str, str] = {}
    for number, line in enumerate(file.read_text().splitlines() if file else [], start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] in keys:
            raise ValueError(f"{file}:{number} must be `NAME KEY`, each name once")
        keys[words[0]] = words[1]
    if key := os.environ.get("OPENM1_API_KEY"):
        keys["default"] = key
    return keys


def _cache_counts(llm: LLM) -> CacheCounts:
    memory = llm.engine.memory
    return CacheCounts(**{name: getattr(memory, name) for name in CacheCounts.__slots__})


def _read_weights(folder: str) -> Iterable[tuple[str, Any]]:
    from openm1.model.m1 import M1ForCausalLM

    return M1ForCausalLM.from_pretrained(folder).named_parameters()


def _greet(name: str, address: str) -> None:
    print(
        f"{name} at {address}  (chat page; OpenAI base URL {address}/v1; Anthropic base URL "
        f"{address}; OpenAPI {address}/openapi.json)",
        file=sys.stderr,
        flush=True,
    )
