# SPDX-License-Identifier: LGPL-2.1-or-later
"""How often a test repeats what it repeats: a few times in `make test`, in full in `make test-all`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OPTION = "--full-counts"


@dataclass(frozen=True, slots=True)
class Count:
    """Chooses between a small and a full count. Ask once in a test: the number goes into its record."""

    full_counts: bool
    record: Callable[[str, object], None]

    def __call__(self, small: int, full: int, of: str) -> int:
        """How many of `of` ("connect cycles") this run does."""
        number = full if self.full_counts else small
        self.record("count", f"{number:,} {of}")
        return number
