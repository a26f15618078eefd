"""The OpenAPI document, and requests made from it that nobody thought of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .running import Running

FEW = 100
NUM_CASES = int(os.environ.get("OPENM1_OPENAPI_CASES", FEW))
"""`make test-clients` tries 2,000."""
# These take a minute or two; this only keeps a run that hangs from hanging.
PATIENCE_S = 1800


def test_the_document_names_every_path(server: Running) -> None:
    document = server.get("/openapi.json").json()
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/health",
        "/ready",
        "/metrics",
        "/rl/pause",
        "/rl/resume",
        "/rl/update_weights",
    } <= document["paths"].keys()
    assert "422" not in str(document["paths"])


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE_S)
def test_requests_made_from_the_document(server: Running) -> None:
    """All of schemathesis's checks: no 5xx, replies as documented, bad requests refused."""
    phases = "coverage,fuzzing" if NUM_CASES > FEW else "fuzzing"
    # Without a body there is next to nothing to vary.
    paths = server.get("/openapi.json").json()["paths"].values()
    num_bodies = sum("requestBody" in operation for path in paths for operation in path.values())
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        *("--config-file", str(Path(__file__).with_name("schemathesis.toml"))),
        *("run", server.address + "/openapi.json", "--checks", "all", "--no-color"),
        *("--phases", phases, "--max-examples", str(-(-NUM_CASES // num_bodies))),
        *("--header", "Authorization: Bearer admin", "--seed", "1", "--continue-on-failure"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout[-6000:]
    found = re.search(r"([\d,]+) generated", done.stdout)
    assert found and int(found[1].replace(",", "")) >= NUM_CASES, done.stdout[-2000:]
    server.check_idle()
