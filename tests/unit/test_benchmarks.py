# SPDX-License-Identifier: LGPL-2.1-or-later
"""The measurements run and sum up rightly. What they measure is no test's business."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks import core
from benchmarks.__main__ import PARTS
from benchmarks.curves import draw
from benchmarks.figures import figure, machine_line, ratio
from benchmarks.page import PAGE, with_figures
from benchmarks.scale import Size, curves
from fence_vmchannel.core.connection import Data


def test_a_figure_is_the_median_and_the_99th_percentile() -> None:
    row = figure("thing", "ms", [float(n) for n in range(101)])
    assert (row.median, row.p99, row.count) == (50.0, 99.0, 101)
    assert "thing" in row.row()
    assert len(row.row()) <= 80


def test_the_core_measurements_carry_every_message() -> None:
    assert core.round_trips(3).count == 3
    assert core.throughput(1, mebibytes=1).median > 0
    pair = core.Pair()
    pair.guest.send(pair.channel, b"counted")
    assert [event.data for _, event in pair.exchange() if isinstance(event, Data)] == [b"counted"]


def test_the_machine_is_named_with_the_figures() -> None:
    assert "cores" in machine_line()


def test_a_ratio_compares_median_with_median_and_p99_with_p99() -> None:
    slow, fast = figure("slow", "us", [10.0, 20.0, 90.0]), figure("fast", "us", [1.0, 2.0, 3.0])
    row = ratio("slow to fast", slow, fast)
    assert (row.unit, row.median, row.p99) == ("x", 10.0, 30.0)


def test_each_part_has_its_block_in_the_page() -> None:
    page = PAGE.read_text()
    for part in PARTS:
        assert "    the machine\n" in with_figures(page, part, "the machine", [figure("thing", "ms", [1.0])])
    with pytest.raises(ValueError, match="no block for nothing"):
        with_figures(page, "nothing", "", [])


def test_growth_is_drawn_as_svg() -> None:
    sizes = [Size(vms, 40.0 + vms / 10, vms / 100, [1.0, 2.0]) for vms in (10, 100, 1000)]
    root = ElementTree.fromstring(draw(curves(sizes)))
    assert len(root.findall(".//{*}polyline")) == 3
    assert len(root.findall(".//{*}circle")) == 9
