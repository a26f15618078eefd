"""The calls in docs/server.md, as they stand there but for the address."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .running import PATIENCE_S, THOUGHT, Running

PAGE = Path(__file__).parents[2] / "docs/server.md"


def calls(language: str, beginning: str) -> list[str]:
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [block for block in blocks if block.startswith(beginning)]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        *(([sys.executable, "-c"], code) for code in calls("python", "from ")),
        *((["sh", "-c"], code) for code in calls("sh", "curl ")),
    ],
    ids=["openai", "anthropic", "curl"],
)
def test_a_call_can_be_copied(server: Running, command: list[str], code: str) -> None:
    if code.startswith("curl") and shutil.which("curl") is None:
        pytest.skip("curl is missing")
    code = code.replace("http://127.0.0.1:8000", server.address)
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert THOUGHT in done.stdout
