"""`openm1 serve` as a process: its address, its signals, its bill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from .running import PATIENCE_S, chat_body

OPENM1 = str(Path(sys.executable).parent / "openm1")
START_S = 300
"""The first start on a machine compiles the kernels."""


@contextmanager
def process(*args: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [OPENM1, "serve", "--port", "0", *args]
    started = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
    )
    watchdog = threading.Timer(START_S, started.kill)
    watchdog.start()
    try:
        assert started.stderr is not None
        for line in started.stderr:
            if found := re.search(r"at (http://\S+)", line):
                break
        else:
            raise AssertionError("it did not start")
        watchdog.cancel()
        # Whatever it says later must not fill the pipe.
        threading.Thread(target=started.stderr.read, daemon=True).start()
        yield started, found[1]
    finally:
        watchdog.cancel()
        started.kill()
        started.wait(PATIENCE_S)


def usage(url: str) -> dict:
    command = [OPENM1, "usage", "--json", "--db", url]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_sigterm_under_load_finishes_what_runs_and_bills_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/usage.sqlite"
    keys = tmp_path / "keys"
    keys.write_text("# who may come\nann secret\n")
    texts: list[str] = []
    begun = threading.Semaphore(0)

    def read(address: str) -> None:
        body = chat_body(stream=True, ignore_eos=True, max_tokens=400)
        headers = {"Authorization": "Bearer secret"}
        with httpx.stream(
            "POST", address + "/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE_S
        ) as reply:
            text = ""
            for part in reply.iter_text():
                if not text:
                    begun.release()
                text += part
        texts.append(text)

    with process("--usage-db", url, "--api-keys", str(keys)) as (server, address):
        threads = [threading.Thread(target=read, args=(address,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=PATIENCE_S)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(PATIENCE_S)
        assert server.wait(PATIENCE_S) == 0
    assert len(texts) == 8
    assert all(text.rstrip().endswith("data: [DONE]") for text in texts)
    bill = usage(url)
    (line,) = bill["lines"]
    assert (line["key_name"], line["tier"], line["num_requests"]) == ("ann", "0-32K", 8)
    assert line["completion_tokens"] == 8 * 400
    read_tokens = line["prompt_tokens"]
    assert bill["total"] == pytest.approx((0.8 * read_tokens + 8 * 3200) / 1e6)
