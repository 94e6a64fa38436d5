# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tell people on a terminal what happens while it happens."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import TextIO

_TIME_COLUMNS = 9


class Ink(Enum):
    """What a line is, and its colour (ECMA-48 SGR)."""

    TITLE = "1"
    COMMAND = "1;36"
    PLAIN = "0"
    HOST = "2"
    GOOD = "32"
    BAD = "1;31"


def wants_colour(out: TextIO, environment: Mapping[str, str]) -> bool:
    """Colour on a terminal, or where FORCE_COLOR asks for it; never where NO_COLOR is set."""
    if environment.get("NO_COLOR"):
        return False
    return bool(environment.get("FORCE_COLOR")) or out.isatty()


class Narrator:
    """Writes lines with the seconds since the beginning before them."""

    def __init__(self, out: TextIO, *, colour: bool, clock: Callable[[], float], columns: int = 140) -> None:
        self._out = out
        self._columns = columns
        self._colour = colour
        self._clock = clock
        self._began = clock()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began

    def title(self, text: str) -> None:
        self._out.write("\n")
        self._line(text, Ink.TITLE)

    def tell(self, text: str) -> None:
        self._line(text, Ink.PLAIN)

    def command(self, where: str, text: str) -> None:
        self._out.write("\n")
        self._line(f"{where}# {text}", Ink.COMMAND)

    def output(self, text: str) -> None:
        """What a program wrote, whole."""
        for line in text.splitlines():
            self._line(f"    {line}", Ink.PLAIN)

    def host(self, text: str) -> None:
        """A line of the host daemon's log, cut to the width."""
        self._line(f"  host | {text}"[: self._columns - _TIME_COLUMNS], Ink.HOST)

    def good(self, text: str) -> None:
        self._line(f"  ok   {text}", Ink.GOOD)

    def bad(self, text: str) -> None:
        self._line(f"  FAIL {text}", Ink.BAD)

    def _line(self, text: str, ink: Ink) -> None:
        text = "".join(
            c if c.isprintable() else "?" for c in text
        )  # a guest's text must not steer the terminal
        if self._colour and ink is not Ink.PLAIN:
            text = f"\x1b[{ink.value}m{text}\x1b[0m"
        self._out.write(f"{self.elapsed_s:6.1f} s {text}\n")
        self._out.flush()


def terminal_narrator() -> Narrator:
    """One that writes to standard output."""
    colour = wants_colour(sys.stdout, os.environ)
    columns = max(60, shutil.get_terminal_size((140, 24)).columns)
    return Narrator(sys.stdout, colour=colour, clock=time.monotonic, columns=columns)
