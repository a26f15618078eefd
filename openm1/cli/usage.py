"""The bill of `openm1 usage`, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from openm1.server.usage import BillLine

Prices = Mapping[str, tuple[float, float]]


def bill_table(lines: Sequence[BillLine], prices: Prices, currency: str) -> Table:
    """A row for each key and tier, and the sum."""
    table = Table(title="Usage by key and length of prompt")
    table.add_column("key")
    table.add_column("prompt", no_wrap=True)
    for name in ("replies", "tokens read", "cached", "written", "thought", currency):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            line.key_name,
            line.tier,
            f"{line.num_requests:,}",
            f"{line.prompt_tokens:,}",
            f"{line.cached_tokens:,}",
            f"{line.completion_tokens:,}",
            f"{line.reasoning_tokens:,}",
            f"{line.price(prices):.6f}",
        )
    table.add_section()
    total = sum(line.price(prices) for line in lines)
    table.add_row("total", *[""] * 6, f"{total:.6f}")
    return table


def bill_json(lines: Sequence[BillLine], prices: Prices, currency: str) -> dict[str, Any]:
    return {
        "currency": currency,
        "lines": [{**asdict(line), "price": line.price(prices)} for line in lines],
        "total": sum(line.price(prices) for line in lines),
    }
