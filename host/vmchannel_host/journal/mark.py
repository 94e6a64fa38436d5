# SPDX-License-Identifier: LGPL-2.1-or-later
"""The last record's number and hash, kept beside the journal: one that was put back to an older state shows.

Written after each commit without waiting for the disk, so it may lie behind the journal, never ahead of it.
It outlives the daemon however that ends; after a crash of the host it may be some seconds old. Blocking.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from vmchannel_host.journal.chain import Head

_BYTES: Final = 256


def mark_path(path: Path) -> Path:
    """Where a journal's mark lies."""
    return path.with_name(path.name + ".mark")


class Mark:
    """The mark of one open journal."""

    def __init__(self, path: Path) -> None:
        """Open it, or make an empty one.

        Raises:
            OSError: it cannot be used.
        """
        self._descriptor = os.open(
            mark_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )

    def read(self) -> tuple[str, int, str] | None:
        """The journal's id, the number and hash (hex) of its last record; None when it cannot be told."""
        words = os.pread(self._descriptor, _BYTES, 0).decode("ascii", "replace").split()
        return (words[0], int(words[1]), words[2]) if len(words) == 3 and words[1].isdecimal() else None

    def write(self, head: Head) -> None:
        """Name the last record; it must be durable already."""
        line = f"{head.journal_id} {head.seq} {head.hash.hex()}"
        os.pwrite(self._descriptor, f"{line:<{_BYTES - 1}}\n".encode("ascii"), 0)

    def sync(self) -> None:
        """Wait for the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)
