"""The card of a shipped model, as data: what it learned and how well, beside its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openm1.model.hf import resolve_path

CARD_FILE = "card.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    families: dict[str, dict[str, Any]]
    """Per family: difficulty, held-out results, chance."""
    examples: list[dict[str, str]]
    """Held-out questions with their answers: {"family", "question", "answer"}."""
    training: dict[str, Any]
    also: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What else it was taught, measured in the same way: the honest no, the calculator."""


def read_card(path_or_name: str | Path) -> Card:
    """Raises ValueError where a model has no card."""
    path = resolve_path(path_or_name)
    if not (path / CARD_FILE).is_file():
        raise ValueError(f"{path_or_name} has no {CARD_FILE}; name the families with --tasks a,b")
    return Card(**json.loads((path / CARD_FILE).read_text()))
