"""The server against its own engine: the same replies asked for over HTTP and in process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from typing import Any

from openm1.cli.serve import served_model
from openm1.engine.config import EngineConfig
from openm1.engine.llm import LLM
from openm1.server.app import build_app
from openm1.server.config import ServerConfig
from openm1.server.run import SWITCH_INTERVAL_S, DrainingServer, listen
from openm1.types import Message, SamplingParams

QUESTIONS = [f"{i % 10} +{i % 7} *3 -{i % 9} +4" for i in range(32)]
NUM_TOKENS = 256


class BareEngine:
    """All replies from `LLM.generate`, without a server."""

    name = "bare engine"

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        encode = llm.chat_format.encode
        self._prompts = [encode([Message(role="user", content=text)]) for text in QUESTIONS]

    def replies_s(self) -> float:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        self._llm.generate(self._prompts, params)
        return time.perf_counter() - began


class ServerUnderLoad:
    """The same engine behind a server in a thread, its clients in a process of their own."""

    def __init__(self, llm: LLM, *, stream: bool) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        config = ServerConfig(port=0)
        listener = listen(config)
        self._server = DrainingServer(build_app(served_model(llm, "nano"), config), config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        port = listener.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.server", str(port), str(int(stream))]
        self._clients = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def replies_s(self) -> float:
        assert self._clients.stdin is not None and self._clients.stdout is not None
        print("go", file=self._clients.stdin, flush=True)
        return float(self._clients.stdout.readline())

    def close(self) -> None:
        self._clients.communicate()
        self._server.drain()
        self._thread.join()


def contestants(*, stream: bool) -> tuple[ServerUnderLoad, BareEngine]:
    llm = LLM("nano", config=EngineConfig(memory_budget_bytes=2**29))
    return ServerUnderLoad(llm, stream=stream), BareEngine(llm)


async def ask(port: int, text: str, *, stream: bool) -> None:
    """One request over a plain socket: a client should cost as little as it can."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    reply = await reader.read(-1)
    assert reply.startswith(b"HTTP/1.1 200"), reply[:300]
    # Nothing may be missing: the stream's end, or the count of the whole.
    end = b"data: [DONE]" if stream else b'"completion_tokens":%d' % NUM_TOKENS
    assert end in reply, reply[-300:]
    writer.close()


async def ask_all(port: int, *, stream: bool) -> float:
    began = time.perf_counter()
    await asyncio.gather(*[ask(port, text, stream=stream) for text in QUESTIONS])
    return time.perf_counter() - began


if __name__ == "__main__":
    for _ in sys.stdin:
        took = asyncio.run(ask_all(int(sys.argv[1]), stream=bool(int(sys.argv[2]))))
        print(took, flush=True)
