# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a fuzz target is, and reading decisions out of fuzzed bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Target:
    """One parser under attack."""

    name: str
    run: Callable[[bytes], None]
    """Parses; lets pass what is documented; raises anything else, `AssertionError` for a broken promise."""
    seeds: tuple[bytes, ...]
    """Inputs that reach deep, and every input that once broke it."""


class Plan:
    """Fuzzed bytes as a sequence of decisions. Past the end everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def over(self) -> bool:
        """Whether all bytes are used."""
        return self._at >= len(self._data)

    def take(self, size: int) -> bytes:
        """The next bytes; fewer at the end."""
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece

    def number(self, size: int = 1) -> int:
        """An unsigned number of so many bytes."""
        return int.from_bytes(self.take(size), "big")

    def one_of(self, options: Sequence[_T]) -> _T:
        """One of at most 256 options."""
        return options[self.number() % len(options)]

    def sized(self) -> bytes:
        """Bytes with a length of 16 bits in front."""
        return self.take(self.number(2))
