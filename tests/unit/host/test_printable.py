# SPDX-License-Identifier: LGPL-2.1-or-later
"""Untrusted text on logs and terminals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("vm1", "vm1"),
        ("büro", "büro"),
        ("a\nb\r\t", "a\\x0ab\\x0d\\x09"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202egnp", "\\u202egnp"),
        ("\udce9", "\\udce9"),
        ("\U000e0001", "\\U000e0001"),
        ("a\\x0a", "a\\\\x0a"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(max_size=300), st.integers(3, 40))
def test_the_result_is_printable_and_never_longer_than_the_limit(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit


def test_cut_text_says_so() -> None:
    assert printable("x" * 300, 10) == "xxxxxxx..."
    assert printable("x" * 10, 10) == "x" * 10
