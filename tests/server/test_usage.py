"""What was used is what is billed, in SQLite and, where there is one, in PostgreSQL."""

from __future__ import annotations

import os
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from openm1.engine.llm import LLM
from openm1.server.usage import (
    TIERS,
    UsageMeter,
    UsageRecord,
    open_database,
    read_bill,
    tier_of,
    usage_url,
)

from .running import chat_body, running, wait_until

POSTGRES = os.environ.get("OPENM1_TEST_POSTGRES_URL")


def record(key: str = "ann", prompt: int = 10, **more) -> UsageRecord:
    fields = {
        "key_name": key,
        "model": "nano",
        "endpoint": "/v1/chat/completions",
        "prompt_tokens": prompt,
        "cached_tokens": 1,
        "completion_tokens": 5,
        "reasoning_tokens": 2,
        "finish_reason": "stop",
    }
    return UsageRecord(**(fields | more))


@pytest.mark.parametrize(
    ("prompt_tokens", "tier"),
    [
        (0, "0-32K"),
        (32_768, "0-32K"),
        (32_769, "32-128K"),
        (131_072, "32-128K"),
        (131_073, "128K-1M"),
        (5_000_000, "128K-1M"),
    ],
)
def test_tiers(prompt_tokens: int, tier: str) -> None:
    assert tier_of(prompt_tokens) == tier


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/usage.sqlite"
    if POSTGRES is None:
        pytest.skip("OPENM1_TEST_POSTGRES_URL names no database")
    with open_database(POSTGRES).begin() as connection:
        connection.execute(text("DELETE FROM openm1_usage"))
    return POSTGRES


def test_a_bill_adds_up_by_key_and_tier(url: str) -> None:
    meter = UsageMeter(url)
    for _ in range(300):
        meter.record(record())
    meter.record(record(prompt=40_000))
    meter.record(record("bob", prompt=200_000, completion_tokens=1_000_000))
    meter.close()
    lines = read_bill(url)
    assert [(line.key_name, line.tier) for line in lines] == [
        ("ann", "0-32K"),
        ("ann", "32-128K"),
        ("bob", "128K-1M"),
    ]
    assert (lines[0].num_requests, lines[0].prompt_tokens, lines[0].reasoning_tokens) == (
        300,
        3000,
        600,
    )
    prices = {tier: (1.0, 10.0) for tier in TIERS}
    assert lines[2].price(prices) == pytest.approx(0.2 + 10.0)
    assert read_bill(url, since=datetime.now(UTC) + timedelta(days=1)) == []
    assert len(read_bill(url, since=datetime.now(UTC) - timedelta(days=1))) == 3


def test_what_cannot_be_written_is_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("openm1.server.usage.RETRY_S", 0.01)
    url = f"sqlite:///{tmp_path}/usage.sqlite"
    meter = UsageMeter(url)
    with sqlite3.connect(tmp_path / "usage.sqlite") as database:
        database.execute("ALTER TABLE openm1_usage RENAME TO away")
    meter.record(record())
    wait_until(lambda: meter.error is not None)
    with sqlite3.connect(tmp_path / "usage.sqlite") as database:
        database.execute("ALTER TABLE away RENAME TO openm1_usage")
    meter.record(record())
    meter.close()
    assert meter.error is None
    assert read_bill(url)[0].num_requests == 2


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////nowhere/at/all/x", "mongodb://x/y"])
def test_databases_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(ValueError, match="cannot be opened"):
        UsageMeter(url)


def test_the_default_is_a_file_of_the_users(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert usage_url(None) == f"sqlite:///{tmp_path}/openm1/usage.sqlite"
    assert usage_url("postgresql://x") == "postgresql://x"


def test_replies_are_metered_per_key_however_they_end(llm: LLM, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/usage.sqlite"
    with running(llm, api_keys={"ann": "a", "bob": "b"}, usage_url=url) as server:
        path = "/v1/chat/completions"
        usage = server.post(path, chat_body(n=2), Authorization="Bearer a").json()["usage"]
        server.post(path, chat_body(stream=True), Authorization="Bearer b")
        server.post("/v1/messages", {"max_tokens": 3, **chat_body()}, **{"x-api-key": "b"})
        server.post(path, chat_body(temperature=-1), Authorization="Bearer b")
        server.check_idle()
    ann, bob = read_bill(url)
    assert (ann.key_name, ann.num_requests) == ("ann", 2)
    assert ann.completion_tokens == usage["completion_tokens"]
    assert (bob.key_name, bob.num_requests, bob.completion_tokens) == ("bob", 2, 13 + 3)
