"""What each key has used, in the tiers the model was priced in at its launch."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    func,
    insert,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

TIERS = {"0-32K": 32 * 1024, "32-128K": 128 * 1024, "128K-1M": None}
"""Longest prompt of each tier; None is open. K is 1024."""

RETRY_S = 5.0
# Records of so long are written together: each on its own costs more than all else about a reply.
GATHER_S = 0.2

_metadata = MetaData()
_USAGE = Table(
    "openm1_usage",
    _metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False, index=True),
    Column("key_name", String(200), nullable=False, index=True),
    Column("model", String(200), nullable=False),
    Column("endpoint", String(100), nullable=False),
    Column("tier", String(20), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("finish_reason", String(20), nullable=False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageRecord:
    """One reply."""

    key_name: str
    model: str
    endpoint: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    finish_reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BillLine:
    """What one key used of one tier."""

    key_name: str
    tier: str
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int

    def price(self, prices: Mapping[str, tuple[float, float]]) -> float:
        read, written = prices[self.tier]
        return (self.prompt_tokens * read + self.completion_tokens * written) / 1e6


def tier_of(prompt_tokens: int) -> str:
    """What lies above the last tier's million is in it as well."""
    return next(n for n, most in TIERS.items() if most is None or prompt_tokens <= most)


class UsageMeter:
    """Writes records from a thread of its own, so that no reply waits for a database."""

    def __init__(self, url: str) -> None:
        """Raises ValueError where the database cannot be opened."""
        self._engine = open_database(url)
        self._records: queue.SimpleQueue[dict[str, object] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self.error: str | None = None
        """Why the last write failed; what could not be written is kept and tried again."""
        self._thread = threading.Thread(target=self._write_all, name="openm1-usage", daemon=True)
        self._thread.start()

    def record(self, record: UsageRecord) -> None:
        self._records.put(_row(record))

    def close(self) -> None:
        """Returns when all records are written, or have failed to be once more."""
        self._closing.set()
        self._records.put(None)
        self._thread.join()
        self._engine.dispose()

    def _write_all(self) -> None:
        rows: list[dict[str, object]] = []
        closing = False
        while not closing:
            closing = self._collect(rows)
            if rows and self._write(rows):
                rows.clear()

    def _collect(self, rows: list[dict[str, object]]) -> bool:
        """Adds what has come, waiting if nothing has; True when there is no more to come."""
        with suppress(queue.Empty):
            row = self._records.get(timeout=RETRY_S if rows else None)
            if row is not None:
                self._closing.wait(GATHER_S)
            while row is not None:
                rows.append(row)
                row = self._records.get_nowait()
            return True
        return False

    def _write(self, rows: Sequence[dict[str, object]]) -> bool:
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(_USAGE), rows)
        except SQLAlchemyError as error:
            self.error = str(error)
            return False
        self.error = None
        return True


def usage_url(given: str | None) -> str:
    """The usage database: what was given, or a file of SQLite in the user's state folder."""
    if given is not None:
        return given
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "openm1"
    state.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{state / 'usage.sqlite'}"


def open_database(url: str) -> Engine:
    """Makes the table where there is none yet; ValueError says why that could not be."""
    try:
        # A database in memory is one connection, whichever thread asks.
        in_memory = make_url(url).get_backend_name() == "sqlite" and not make_url(url).database
        options = (
            {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
            if in_memory
            else {"pool_pre_ping": True}
        )
        engine = create_engine(url, **options)
        _metadata.create_all(engine)
    except (ArgumentError, NoSuchModuleError, SQLAlchemyError, ImportError) as error:
        raise ValueError(f"the usage database {url!r} cannot be opened: {error}") from error
    return engine


def read_bill(url: str, *, since: datetime | None = None) -> list[BillLine]:
    """Usage by key and tier, keys in order, tiers from the shortest."""
    sums = [
        func.count().label("num_requests"),
        *(
            func.sum(_USAGE.c[name]).label(name)
            for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
        ),
    ]
    query = select(_USAGE.c.key_name, _USAGE.c.tier, *sums).group_by(
        _USAGE.c.key_name, _USAGE.c.tier
    )
    if since is not None:
        query = query.where(_USAGE.c.at >= since)
    engine = open_database(url)
    try:
        with engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
    finally:
        engine.dispose()
    lines = [
        BillLine(
            key_name=row["key_name"],
            tier=row["tier"],
            **{name: int(row[name]) for name in row if name not in ("key_name", "tier")},
        )
        for row in rows
    ]
    return sorted(lines, key=lambda line: (line.key_name, list(TIERS).index(line.tier)))


def _row(record: UsageRecord) -> dict[str, object]:
    return {
        "at": datetime.now(UTC),
        "tier": tier_of(record.prompt_tokens),
        **{name: getattr(record, name) for name in UsageRecord.__dataclass_fields__},
    }
