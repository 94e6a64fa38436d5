# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text for a terminal: tables that fit its width, blocks of facts, sizes and times. Pure."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from vmchannel_host.printable import printable

_GAP = "  "
_LONGEST_CELL = 400  # characters


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    title: str
    shrink: bool = False  # may be cut where the table is too wide
    right: bool = False  # numbers

    @property
    def narrowest(self) -> int:
        """The least width when cut."""
        return max(6, len(self.title))


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A head and one line for each row, of at most `width` cells. Long values are cut, never wrapped."""
    texts = [[printable(cell, _LONGEST_CELL) or "-" for cell in row] for row in rows]
    natural = [
        max([display_width(column.title), *(display_width(row[index]) for row in texts)])
        for index, column in enumerate(columns)
    ]
    widths = _shrink(columns, natural, width - len(_GAP) * (len(columns) - 1))
    head = [column.title for column in columns]
    return [_line(columns, widths, cells, width) for cells in [head, *texts]]


def facts(pairs: Sequence[tuple[str, str]], width: int) -> list[str]:
    """`name: value` lines; long values go on below themselves."""
    longest = max((len(name) for name, _ in pairs), default=0)
    lines: list[str] = []
    for name, value in pairs:
        lines += wrapped(f"{name + ':':<{longest + 2}}", value, width)
    return lines


def wrapped(lead: str, text: str, width: int) -> list[str]:
    """Text behind a lead, broken at spaces; later lines stand below its first."""
    shown = printable(text, 4000) or "-"
    return textwrap.wrap(
        lead + shown,
        max(width, len(lead) + 20),
        subsequent_indent=" " * len(lead),
        drop_whitespace=True,
        break_on_hyphens=False,
    )


def cut(text: str, width: int) -> str:
    """The text in at most `width` cells, its end replaced by an ellipsis where it is longer."""
    if display_width(text) <= width:
        return text
    out, used = "", 0
    for character in text:
        used += _cells(character)
        if used > width - 1:
            break
        out += character
    return out + "…"


def display_width(text: str) -> int:
    """How many cells of a terminal the text takes."""
    return sum(map(_cells, text))


def size(count: int) -> str:
    """Bytes for people: `1.5M`."""
    value = float(count)
    for unit in ("B", "K", "M", "G"):
        if value < 1000:
            return f"{value:.0f}{unit}" if unit == "B" or value >= 10 else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}T"


def seconds(elapsed_ms: float) -> str:
    """A time that passed, for people."""
    value = elapsed_ms / 1000
    if value < 1:
        return f"{elapsed_ms:.0f}ms"
    return f"{value:.1f}s" if value < 100 else f"{value:.0f}s"


def _shrink(columns: Sequence[Column], natural: Sequence[int], room: int) -> list[int]:
    """Take from the widest column that may shrink, one cell at a time, until all fit or none can."""
    widths = list(natural)
    while sum(widths) > room:
        candidates = [
            index
            for index, column in enumerate(columns)
            if column.shrink and widths[index] > column.narrowest
        ]
        if not candidates:
            break
        widest = max(candidates, key=lambda index: widths[index])
        widths[widest] -= 1
    return widths


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str], width: int) -> str:
    parts: list[str] = []
    for column, cell_width, cell in zip(columns, widths, cells, strict=True):
        text = cut(cell, cell_width)
        pad = " " * (cell_width - display_width(text))
        parts.append(pad + text if column.right else text + pad)
    # Fixed columns may together be too wide for a very narrow terminal: the line is cut all the same.
    return cut(_GAP.join(parts).rstrip(), width)


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
