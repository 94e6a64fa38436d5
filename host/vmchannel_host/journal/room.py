# SPDX-License-Identifier: LGPL-2.1-or-later
"""Room for `off` on a disk that is full: pages that the journal owns already and does not use. Blocking.

Nothing that SQLite writes may need a block that the disk does not have yet, or a commit would succeed into
the log and then never reach the file:

- The file grows here only: its blocks are allocated first, then SQLite may use them (`max_page_count`). What
  is not in use is on SQLite's list of free pages; RESERVE_PAGES of them are kept for `off`.
- SQLite's index of the log (`-shm`) is allocated; for the moment in which it is made anew, at the opening, a
  small file (`.spare`) is given up.
- The log (`-wal`) is allocated up to WAL_BYTES and outlives an orderly stop: a daemon that is started again
  on a full disk could not make it anew. Its content is made void then, so that it can be laid over no other
  file.

A file system that never overwrites in place (btrfs, ZFS) takes new blocks for every write: there nothing can
be kept, and SQLite's own "disk full" refuses everything.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vmchannel_host.journal.keys import sync_directory
from vmchannel_host.journal.types import JournalDisk

RESERVE_PAGES: Final = 1024
"""Pages kept for `off`, of 4 KiB; each takes one to four."""

STEP_PAGES: Final = 256
"""By how much the file grows beyond that at once: growing takes some 50 ms."""

WAL_BYTES: Final = 8 << 20
"""Twice what SQLite lets the log grow to before it is copied into the file (1000 pages)."""

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SLACK_PAGES: Final = 4  # for the row itself, whose pages are not of its own only
_WAL_HEADER_BYTES: Final = 32
_INDEX_BYTES: Final = 32_768  # indexes a log of 16 MB
_SPARE: Final = ".spare"
_SPARE_BYTES: Final = 65_536


class Room:
    """Keeps the room of one open journal. Its calls are made outside a transaction."""

    def __init__(self, connection: sqlite3.Connection, path: Path, descriptors: Descriptors) -> None:
        self._connection = connection
        self._path = path
        self._descriptors = descriptors
        self._allocated = False  # all that SQLite may use now is really there
        self._spared = False  # so is what the next opening needs
        self.short = ""  # why only `off` may write; "" while there is room

    def make(self) -> None:
        """Make what room is missing, if there is any; `short` tells.

        Raises:
            JournalDisk: the disk failed.
            sqlite3.Error: so did SQLite.
        """
        try:
            if not self._allocated:
                self._allocate_all()
            missing = RESERVE_PAGES - self._pragma("freelist_count")
            if missing > 0:
                self._grow(missing + STEP_PAGES)
            self._keep_for_opening()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise JournalDisk(f"{self._path}: {error.strerror}") from error
            self._is_short()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            self._is_short()
        else:
            self.short = ""

    def _is_short(self) -> None:
        self.short = f"{self._path}: the disk is full; what room is left is kept for `off`"

    def _allocate_all(self) -> None:
        # SQLite writes one byte of each of its index's pages to have it allocated. Where a block is smaller
        # than a page the rest is missing, and on a full disk touching it is a SIGBUS (measured on ext4).
        os.posix_fallocate(self._descriptors.index(), 0, _INDEX_BYTES)
        pages = self._pragma("page_count")
        self._pragma(f"max_page_count = {pages}")
        os.posix_fallocate(
            self._descriptors.file, 0, pages * self._pragma("page_size")
        )  # a copy may have holes
        # Zeros behind the log's last frame mean nothing to SQLite, as old frames do.
        with _opened(_beside(self._path, "-wal")) as wal:
            os.posix_fallocate(wal, 0, WAL_BYTES)
        self._allocated = True

    def _keep_for_opening(self) -> None:
        if self._spared:
            return
        with _opened(_beside(self._path, _SPARE), os.O_CREAT) as file:
            os.posix_fallocate(file, 0, _SPARE_BYTES)  # of one that the disk had no room for: the rest
        self._spared = True

    def _grow(self, by_pages: int) -> None:
        pages, size = self._pragma("page_count"), self._pragma("page_size")
        target = pages + by_pages
        os.posix_fallocate(self._descriptors.file, 0, target * size)
        os.fsync(self._descriptors.file)
        self._pragma(f"max_page_count = {target}")
        room = self._pragma("freelist_count") + by_pages - _SLACK_PAGES
        try:
            # A value that is stored and removed again leaves its pages on the list of free ones.
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("INSERT INTO meta VALUES ('room', zeroblob(?))", (room * (size - 4),))
            self._connection.execute("DELETE FROM meta WHERE key = 'room'")
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            self._pragma(f"max_page_count = {self._pragma('page_count')}")

    def _pragma(self, text: str) -> int:
        return int(self._connection.execute(f"PRAGMA {text}").fetchone()[0])


class Descriptors:
    """Descriptors of the file and of SQLite's index of the log.

    They stay open for longer than any connection: closing one lets go all locks that this process has on its
    file (fcntl(2)), SQLite's included.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, and free what was kept for this moment: SQLite makes its index anew.

        Raises:
            OSError: it cannot be opened.
        """
        self._path = path
        self._index = -1
        self.file: Final = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        _beside(path, _SPARE).unlink(missing_ok=True)
        sync_directory(path.parent)  # only then can the blocks be used

    def index(self) -> int:
        """That of the index, once a connection has made it."""
        if self._index < 0:
            self._index = os.open(_beside(self._path, "-shm"), os.O_RDWR | os.O_CLOEXEC)
        return self._index

    def close(self) -> None:
        """Close both, after all connections."""
        if self._index >= 0:
            os.close(self._index)
        os.close(self.file)


def checkpoint(connection: sqlite3.Connection) -> bool:
    """Copy the whole log into the file; False when a reader prevented it."""
    busy, in_log, copied = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
    return not busy and in_log == copied


def void_log(path: Path) -> None:
    """Make a log void that was copied into its file. The file must be closed."""
    with _opened(_beside(path, "-wal")) as wal:
        os.pwrite(wal, bytes(_WAL_HEADER_BYTES), 0)
        os.fsync(wal)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@contextmanager
def _opened(path: Path, flags: int = 0) -> Generator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
