"""`openm1 plan` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openm1.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    main(["plan", *(str(arg) for arg in args)])
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    return json.loads(run(capsys, *args, "--json"))


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["flops"],
        ["memory"],
        ["run"],
        ["price"],
        ["price", "--device", "cpu", "--devices", "1", "--model", "nano", "--usd-per-hour", "0"],
    ],
)
def test_nothing_imports_torch(args: list[str]) -> None:
    code = (
        "import sys\nfrom openm1.cli.main import main\n"
        f"try:\n    main({['plan', *args]!r})\nexcept SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_flops(capsys: pytest.CaptureFixture[str]) -> None:
    table = run(capsys, "flops", "--generate", 100_000)
    assert "70 lightning" in table and "MLA absorbed" in table and "0.344" in table
    plan = as_json(capsys, "flops", "--model", "nano", "--prompt", 100, "--generate", 10)
    assert plan["total_flops"] == sum(line["flops"] for line in plan["lines"])
    step = as_json(capsys, "flops", "--model", "nano", "--train", 512, "--batch", 2)
    half = as_json(capsys, "flops", "--model", "nano", "--train", 512)
    assert step["total_flops"] == 2 * half["total_flops"]


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert "8 x 141 GB" in run(capsys, "memory")
    assert "fits in 90%" in run(capsys, "memory", "--device", "h200")
    assert "does not fit" in run(capsys, "memory", "--device", "h800")
    plan = as_json(capsys, "memory", "--device", "h800", "--pipeline", 8, "--train", 4096)
    assert plan["num_devices"] == 64 and plan["optimizer_bytes"] > plan["gradients_bytes"]
    fleets = as_json(
        capsys, "memory", "--model", "deepseek-r1", "--weights", "fp8", "--context", 65536
    )["fleets"]
    stages = {row["device"]: row["fit"]["layout"]["pipeline"] for row in fleets}
    assert stages["h200"] == 1 < stages["h800"]


def test_run_and_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert "258,048" in run(capsys, "run")
    assert as_json(capsys, "run")["usd_per_hour"] == pytest.approx(2.072, abs=5e-4)
    prices = as_json(capsys, "price")
    assert [row["generated_tokens"] for row in prices["thoughts"]] == [40_960, 81_920]
    assert [row[0]["output_cny"] for row in prices["tiers"]] == [8, 16, 24]


@pytest.mark.parametrize("command", ["flops", "memory", "price"])
def test_plots(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    run(capsys, command, "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ("flops --model gpt-9", "model is 'gpt-9'"),
        ("flops --generate -3", "generated_tokens is -3"),
        ("flops --train 512 --generate 3", "--train goes with"),
        ("flops --batch 2", "give --train"),
        ("flops --model nano --convention report", "draws only"),
        ("flops --mla absorbed", "no latent attention"),
        ("flops --convention report --prompt 5", "has no prompt"),
        ("memory --usable 2", "usable is 2.0"),
        ("memory --device h200 --usable 0", "usable is 0.0"),
        ("memory --context 0", "context_tokens 0"),
        ("memory --train 10", "need a --device"),
        ("memory --pipeline 2", "need a --device"),
        ("memory --recompute", "give --train"),
        ("memory --device h200 --weights fp8 --train 10", "quantised"),
        ("run --days 0", "days is 0.0"),
        ("run --devices 8", "takes 16"),
        ("price --device h100", "give --usd-per-hour"),
        ("price --devices 3", "devices is 3"),
        ("price --thoughts 0", "generated_tokens 0"),
        ("price --bandwidth-utilisation 2", "bandwidth utilisation is 2.0"),
        ("price --weights bfloat16", "do not hold one sequence"),
    ],
)
def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str], args: str, reason: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(capsys, *args.split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("openm1: ") and err.count("\n") == 1 and reason in err
