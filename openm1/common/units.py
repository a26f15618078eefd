"""Sizes as people write them."""

from __future__ import annotations

import re

BYTE_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def parse_bytes(text: str) -> int:
    """ "4GiB", "1.5 GB" or "4096" as a number; raises ValueError for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {name.lower(): factor for name, factor in BYTE_UNITS.items()}
    if match is None or match[2].lower() not in units:
        names = ", ".join(name for name in BYTE_UNITS if name)
        raise ValueError(f"size is {text!r}; allowed is a number, with {names} or without")
    return int(float(match[1]) * units[match[2].lower()])


def format_bytes(count: int) -> str:
    """Three digits or so, in binary units: "1.50 GiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
