from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from openm1.common.page import (
    LEFT,
    MAX_POINTS,
    RIGHT,
    WIDTH,
    html_page,
    html_table,
    line_chart,
    reply_line,
)

NASTY = "<b>&'\""


def drawn(chart: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(chart).iter("polyline")
    return [
        [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]  # pyright: ignore
        for line in lines
    ]


def labels(chart: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(chart).iter("text")]


def test_a_chart_is_well_formed_and_spans_its_x():
    chart = line_chart(NASTY, {NASTY: [(3, 0.0), (7, 1.0)], "other": [(3, 0.5)]}, marks=[5])
    (first, second) = drawn(chart)
    assert [x for x, _ in first] == [LEFT, WIDTH - RIGHT]
    assert first[0][1] > second[0][1] > first[1][1]
    assert labels(chart)[-2:] == ["3", "7"]
    (mark,) = re.findall(r'class="mark" x1="([\d.]+)"', chart)
    assert float(mark) == (LEFT + WIDTH - RIGHT) / 2


def test_what_is_not_finite_is_left_out():
    chart = line_chart("t", {"a": [(0, math.nan), (1, 2.0), (2, math.inf)], "b": [(0, math.nan)]})
    assert [len(line) for line in drawn(chart)] == [1]
    assert line_chart("t", {"a": [(0, math.nan)], "b": []}) == ""


def test_a_long_curve_is_thinned_to_its_ends():
    chart = line_chart("t", {"a": [(i, i % 7) for i in range(12_345)]})
    (line,) = drawn(chart)
    assert len(line) <= MAX_POINTS + 1
    assert (line[0][0], line[-1][0]) == (LEFT, WIDTH - RIGHT)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.0, 1.0), ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ((0.1, 0.9), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ((9.0, 31.0), ["0", "10", "20", "30", "40"]),
        ((0.0, 40_000.0), ["0k", "10k", "20k", "30k", "40k"]),
        # The last digits of a correlation are no landscape.
        ((1 - 1e-9, 1.0), ["0.99990", "0.99995", "1.00000", "1.00005"]),
    ],
)
def test_ticks_are_round_and_tell_each_other_apart(values, expected: list[str]):
    found = labels(line_chart("t", {"a": list(enumerate(values))}))[:-2]
    assert len(set(found)) == len(found)
    assert found == expected


def test_texts_are_no_markup():
    page = html_page(
        NASTY, html_table([NASTY], [[NASTY]]) + reply_line(NASTY, NASTY, is_right=True)
    )
    assert "<b>" not in page
    assert page.count("&lt;b&gt;&amp;") == 5
