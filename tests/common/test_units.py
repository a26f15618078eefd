"""Sizes as people write them."""

from __future__ import annotations

import pytest

from openm1.common.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("7 B", 7),
        ("1.5 GB", 1_500_000_000),
        ("4GiB", 4 * 2**30),
        ("4gib", 4 * 2**30),
        (" 20 KB ", 20_000),
        ("0.5TiB", 2**39),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "much", "-1", "4 GBs", "1e9", "4 4"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="allowed is a number, with B, KB, MB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**29, "1.50 GiB")]
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert format_bytes(count) == text
