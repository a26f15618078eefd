"""Five hundred streams at once, a third of them cut off: nothing is lost, mixed up or kept."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
from pathlib import Path

import pytest

from openm1.engine.llm import LLM

from .running import Running, running

NUM_REQUESTS = 500
MEMORY_SLACK = 1.05


def body_of(index: int) -> dict:
    """Every request has a question and a seed of its own; at temperature 1 replies differ."""
    draw = random.Random(index)
    steps = " ".join(f"{draw.choice('+-')}{draw.randrange(10)}" for _ in range(4))
    return {
        "messages": [{"role": "user", "content": f"{draw.randrange(10)} {steps}"}],
        "temperature": 1.0,
        "seed": index,
        "max_tokens": 24,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def stream(port: int, body: dict, *, leave_after: int | None) -> str | None:
    """What the reply says, thought and answer; None for one that was left."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    try:
        if leave_after is not None:
            await reader.readuntil(b"data: ")
            await reader.read(leave_after)
            return None
        received = (await reader.read(-1)).decode()
    finally:
        writer.close()
    assert received.startswith("HTTP/1.1 200"), received[:300]
    assert received.rstrip().endswith("0") and "data: [DONE]" in received, received[-300:]
    text, num_tokens = "", None
    for line in received.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
            for choice in chunk["choices"]:
                delta = choice["delta"]
                text += (delta.get("reasoning") or "") + (delta.get("content") or "")
    assert num_tokens == body["max_tokens"]
    return text


async def storm(port: int, num_requests: int) -> list[str | None]:
    leavers = [30 * index if index % 3 == 2 else None for index in range(num_requests)]
    work = [stream(port, body_of(i), leave_after=leavers[i]) for i in range(num_requests)]
    return await asyncio.wait_for(asyncio.gather(*work), 300)


def alone(server: Running, index: int) -> str:
    reply = server.post(
        "/v1/chat/completions", {**body_of(index), "stream": False, "stream_options": None}
    )
    message = reply.json()["choices"][0]["message"]
    return (message["reasoning"] or "") + message["content"]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
def test_a_storm_of_streams(llm: LLM) -> None:
    with running(llm) as server:
        port = int(server.address.rsplit(":", 1)[1])
        asyncio.run(storm(port, NUM_REQUESTS))
        server.check_idle()
        gc.collect()
        before = resident_bytes()
        replies = asyncio.run(storm(port, NUM_REQUESTS))
        server.check_idle()
        gc.collect()
        after = resident_bytes()
        assert sum(reply is None for reply in replies) == NUM_REQUESTS // 3
        stayed = [index for index, reply in enumerate(replies) if reply is not None]
        assert [replies[index] for index in stayed] == [alone(server, index) for index in stayed]
        assert len({replies[index] for index in stayed}) > len(stayed) // 2
        assert after < MEMORY_SLACK * before, (before, after)
        server.check_idle()
