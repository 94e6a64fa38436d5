# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the demo writes: times, colour only where it is wanted, and no control character of a guest."""

from __future__ import annotations

import io
from itertools import count

import pytest

from tests.rig.narrate import Narrator, wants_colour


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_each_line_begins_with_the_seconds_since_the_beginning() -> None:
    out, seconds = io.StringIO(), count()
    narrator = Narrator(out, colour=False, clock=lambda: float(next(seconds)))
    narrator.tell("one")
    narrator.good("two")
    assert out.getvalue() == "   1.0 s one\n   2.0 s   ok   two\n"


@pytest.mark.parametrize(
    ("out", "environment", "wanted"),
    [
        (Terminal(), {}, True),
        (io.StringIO(), {}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
    ],
)
def test_colour_is_for_terminals_and_for_who_asks(
    out: io.StringIO, environment: dict[str, str], wanted: bool
) -> None:
    assert wants_colour(out, environment) is wanted


def test_a_log_line_is_cut_to_the_width_of_the_terminal() -> None:
    out = io.StringIO()
    Narrator(out, colour=False, clock=lambda: 0.0, columns=60).host("x" * 500)
    assert len(out.getvalue().rstrip("\n")) == 60


def test_text_of_a_guest_cannot_steer_the_terminal() -> None:
    out = io.StringIO()
    Narrator(out, colour=False, clock=lambda: 0.0).output("red\x1b[31m\rand\x07 more")
    assert out.getvalue() == "   0.0 s     red?[31m\n   0.0 s     and? more\n"
