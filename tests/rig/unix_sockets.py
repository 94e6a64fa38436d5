# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which unix sockets somebody listens on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_ACCEPTS = 1 << 16  # __SO_ACCEPTCON, among the flags of /proc/net/unix


def all_listening(paths: Iterable[Path]) -> bool:
    """Whether somebody listens on each, without connecting: that would take a monitor's one place.

    A path that is there may be bound only; it refuses.
    """
    listening: set[str] = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, _, *name = line.split(maxsplit=7)
        if name and int(flags, 16) & _ACCEPTS:
            listening.add(name[0])
    return {str(path) for path in paths} <= listening
