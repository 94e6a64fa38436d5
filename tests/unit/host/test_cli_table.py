# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables and facts of vmchannelctl fit their terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.cli.table import Column, cut, display_width, facts, seconds, size, table, wrapped

COLUMNS = [
    Column("NAME", shrink=True),
    Column("STATE"),
    Column("BYTES", right=True),
    Column("WHY", shrink=True),
]


def test_a_table_is_as_wide_as_its_values_need() -> None:
    assert table(COLUMNS, [["vm1", "on", "12", "x"], ["longer", "off", "1", ""]], 80) == [
        "NAME    STATE  BYTES  WHY",
        "vm1     on        12  x",
        "longer  off        1  -",
    ]


def test_only_columns_that_may_shrink_are_cut_the_widest_first() -> None:
    [_, line] = table(COLUMNS, [["n" * 10, "s" * 20, "1", "w" * 60]], 80)
    assert line == "n" * 10 + "  " + "s" * 20 + "      1  " + "w" * 38 + "…"


@given(st.lists(st.lists(st.text(max_size=120), min_size=4, max_size=4), max_size=4), st.integers(10, 200))
def test_no_line_is_wider_than_the_terminal_nor_broken_by_a_name(rows: list[list[str]], width: int) -> None:
    lines = table(COLUMNS, rows, width)
    assert len(lines) == len(rows) + 1
    for line in lines:
        assert display_width(line) <= width
        assert line.isprintable()


def test_wide_characters_count_twice() -> None:
    assert display_width("日本") == 4
    assert cut("日本語", 5) == "日本…"
    assert cut("日本語", 4) == "日…"
    assert cut("日本語", 6) == "日本語"
    assert display_width("e\u0301") == 1


def test_facts_stand_in_one_column_and_long_ones_go_on_below_themselves() -> None:
    lines = facts([("host", "hv1"), ("journal", "word " * 20)], 40)
    assert lines[:3] == [
        "host:    hv1",
        "journal: word word word word word word",
        "         word word word word word word",
    ]
    assert all(len(line) <= 40 for line in lines)


def test_a_word_that_is_too_long_is_broken() -> None:
    assert all(len(line) <= 30 for line in wrapped("x: ", "y" * 100, 30))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0B"), (999, "999B"), (1000, "1.0K"), (1_500_000, "1.4M"), (50_000_000, "48M"), (5 << 40, "5.0T")],
)
def test_sizes_are_short(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("elapsed_ms", "text"), [(0, "0ms"), (12, "12ms"), (1234, "1.2s"), (123_456, "123s")]
)
def test_times_are_short(elapsed_ms: int, text: str) -> None:
    assert seconds(elapsed_ms) == text
