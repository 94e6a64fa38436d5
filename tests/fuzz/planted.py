# SPDX-License-Identifier: LGPL-2.1-or-later
"""A parser with a planted bug behind three checks: whether the instrumentation sees, or the fuzzer is blind.

Blind guessing passes the three checks once in 2**40 tries; a fuzzer that sees which branch was taken passes
them one after the other.
"""

from __future__ import annotations


class PlantedBugError(Exception):
    """The bug has been reached."""


def fuzz_planted(data: bytes) -> None:
    """Parse, and fail on the one input that has all three marks."""
    if len(data) < 5:
        return
    if data[0] != 0xF5:
        return
    if data[1] != len(data) ^ 0x5A:
        return
    if data[2] != 0x56 or data[3] != 0x4D or data[4] != 0x43:
        return
    raise PlantedBugError("three checks passed")
