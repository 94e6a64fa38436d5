# SPDX-License-Identifier: LGPL-2.1-or-later
"""A parser with a planted bug behind three checks: whether the instrumentation sees, or the fuzzer is blind.

Blind guessing passes the three checks once in 2**32 tries; a fuzzer that sees which branch was taken passes
them one after the other.
"""

from __future__ import annotations


class PlantedBugError(Exception):
    """The bug has been reached."""


def fuzz_planted(data: bytes) -> None:
    """Parse, and fail on what has all three marks."""
    if len(data) < 4:
        return
    if data[0] != 0xF5:
        return
    if data[1] != 0x56:
        return
    if data[2] != 0x4D or data[3] != 0x43:
        return
    raise PlantedBugError("three checks passed")
