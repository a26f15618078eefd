"""A server of nano on a free port of this machine, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from openm1.cli.serve import served_model
from openm1.engine.llm import LLM
from openm1.server.app import build_app, serving_of
from openm1.server.config import ServerConfig
from openm1.server.run import DrainingServer, listen
from openm1.server.served import StreamingPolicy
from openm1.server.serving import Serving

# Nothing here takes long; this only keeps a test that hangs from hanging.
PATIENCE_S = 60
QUESTION = "4 -9 +8 *9 +1"
THOUGHT, ANSWER = "4 -9 =5 +8 =3 *9 =7 +1 =8", "8"
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class Running:
    """One server with what is behind it."""

    address: str
    serving: Serving
    llm: LLM
    server: DrainingServer
    client: httpx.Client

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.client.get(path, headers=headers)

    def chat(self, **fields: Any) -> dict[str, Any]:
        reply = self.post("/v1/chat/completions", chat_body(**fields))
        assert reply.status_code == 200, reply.text
        return reply.json()

    def check_idle(self) -> None:
        """Waits for what is still ending, then asserts that nothing is held by anybody."""
        gate = self.serving.gate
        # A reply hands its place back a moment before it leaves.
        wait_until(lambda: not (self.llm.engine.has_work or gate.num_running or gate.num_waiting))
        self.llm.engine.check_integrity()
        memory = self.llm.engine.memory
        assert memory.in_use_bytes == memory.cached_bytes
        assert memory.num_pages_in_use == memory.num_pages_cached
        assert memory.num_states_in_use == memory.num_states_cached
        assert gate.num_waiting == 0


def chat_body(content: str = QUESTION, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


@contextmanager
def running(
    llm: LLM,
    *,
    context_tokens: int | None = None,
    policy: StreamingPolicy | None = None,
    **config: Any,
) -> Iterator[Running]:
    """`policy` writes in the place of the model."""
    config = ServerConfig(port=0, **config)
    served = served_model(llm, "nano", context_tokens=context_tokens)
    app = build_app(replace(served, policy=policy or served.policy), config)
    listener = listen(config)
    server = DrainingServer(app, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # To make a client takes longer than most requests; each still has a connection of its own.
        alone = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=address, timeout=PATIENCE_S, limits=alone) as client:
            yield Running(
                address=address, serving=serving_of(app), llm=llm, server=server, client=client
            )
    finally:
        server.drain()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Any) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)
