# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text from elsewhere stays on its line."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmchannel_guest.text import one_line


@given(st.text(alphabet=st.characters(codec=None), max_size=50), st.integers(0, 60))
def test_any_text_becomes_one_printable_line_within_the_limit(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert line.isprintable()
    assert len(line) <= max(limit, 3)


def test_printable_text_stays_as_it_is() -> None:
    assert one_line("vm2: läuft ok") == "vm2: läuft ok"


def test_line_breaks_and_terminal_controls_are_escaped() -> None:
    assert one_line("a\nb\x1b[2J\u2028c") == "a\\nb\\x1b[2J\\u2028c"
