# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes figures into docs/benchmarks.md: each part has a block of its own, with the machine's line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.figures import Figure

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
PAGE: Final = DOCS / "benchmarks.md"


def with_figures(page: str, part: str, machine: str, figures: Sequence[Figure]) -> str:
    """The page with that part's block replaced.

    Raises:
        ValueError: the page has no block for it.
    """
    rows = "\n".join(f"    {line}".rstrip() for line in (machine, header(), *(one.row() for one in figures)))
    begin, end = f"<!-- begin {part} -->", f"<!-- end {part} -->"
    block = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not block.search(page):
        raise ValueError(f"no block for {part}")
    return block.sub(lambda _: f"{begin}\n{rows}\n{end}", page)


def header() -> str:
    """The heads of the columns of `Figure.row`."""
    return f"{'':46} {'median':>9} {'p99':>9}"
