# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every command of vmchannelctl has: a place to write to, somebody to ask, and a way to end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TextIO


class ExitCode(IntEnum):
    """How a command ended (man vmchannelctl, EXIT STATUS)."""

    DONE = 0
    FAILED = 1  # failed or unknown
    USAGE = 2  # usage or configuration
    REFUSED = 3  # refused by the policy
    NOT_REACHED = 4  # the daemon was not reached


@dataclass(frozen=True, slots=True)
class Console:
    """Where a command writes, and whom it may ask."""

    out: TextIO
    err: TextIO
    width: int
    ask: Callable[[str], str] | None = None  # puts a question to the user; None: nobody is there to answer

    def lines(self, lines: Sequence[str]) -> None:
        """Write lines to stdout."""
        for line in lines:
            self.out.write(line + "\n")

    def json(self, value: object, *, indent: int | None = 2) -> None:
        """Write JSON to stdout."""
        self.out.write(json.dumps(value, indent=indent, ensure_ascii=True) + "\n")
        self.out.flush()
