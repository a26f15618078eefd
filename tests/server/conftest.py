"""One nano and one server for all tests of a worker; who needs limits starts another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from openm1.engine.config import EngineConfig
from openm1.engine.llm import LLM

from .running import Running, running


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM("nano", config=EngineConfig(memory_budget_bytes=2**28))


@pytest.fixture(scope="session")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm, admin_key="admin", default_max_tokens=1024) as running_server:
        yield running_server
