"""The report's Figure 1, point by point."""

from __future__ import annotations

import json

import pytest

from openm1.cli.main import main
from openm1.planner.figure import figure_points, report_coefficients, report_flops
from openm1.planner.models import read_shape

# How well the drawing is met. Its points are read off to some thousandths at short lengths.
TOLERANCE = {"deepseek-r1": 0.01, "qwen3-235b-a22b": 0.01, "minimax-m1": 0.03}


@pytest.mark.parametrize("model", TOLERANCE)
def test_every_point_of_the_figure(model: str) -> None:
    shape, points = read_shape(model), figure_points()[model]
    assert len(points) == 16 and points[-1][0] == 131_072
    for length, flops in points:
        assert report_flops(shape, length) == pytest.approx(flops, rel=TOLERANCE[model])


def test_the_command_prints_a_point(capsys: pytest.CaptureFixture[str]) -> None:
    for model, points in figure_points().items():
        main(["plan", "flops", "--model", model, "--generate", "65536", "--convention", "report",
              "--json"])  # fmt: skip
        total = json.loads(capsys.readouterr().out)["total_flops"]
        assert total == pytest.approx(dict(points)[65_536], rel=TOLERANCE[model])


def test_the_quadratic_terms() -> None:
    squares = {model: report_coefficients(read_shape(model))[1] for model in TOLERANCE}
    assert squares == {
        "deepseek-r1": 61 * 128 * (192 + 2 * 128),
        "qwen3-235b-a22b": 94 * 64 * 3 * 128,
        "minimax-m1": 8 * 64 * 3 * 128,
    }


def test_a_model_that_is_not_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'nano'.*deepseek-r1"):
        report_flops(read_shape("nano"), 1024)
