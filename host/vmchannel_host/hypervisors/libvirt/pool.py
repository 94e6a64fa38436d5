# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt connections for calls: never two calls on one of them.

libvirt's client before 10.3 keeps a pointer into the stack of one caller's thread when another thread's call
joins it on the same connection (virNetClientIOEventLoop in virnetclient.c; CVE-2024-4418, open in Debian 12).
Following that pointer ends the process; a libvirtd that hangs makes sure that it is followed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final, Generic, Protocol, TypeVar

MAX_IDLE: Final = 4
"""Connections that are kept open for the next call."""


class Connection(Protocol):
    """What a pool needs of `libvirt.virConnect`."""

    def isAlive(self) -> int:  # noqa: N802 - libvirt's name
        """Whether its socket is open; asks nobody."""
        ...


C = TypeVar("C", bound=Connection)


class ConnectionPool(Generic[C]):
    """One connection for each call under way; whoever calls bounds how many that are. From any thread."""

    def __init__(self, open_connection: Callable[[], C], close_connection: Callable[[C], None]) -> None:
        """Both may block. `open_connection` raises what `borrow` raises, the other nothing."""
        self._open_connection = open_connection
        self._close_connection = close_connection
        self._lock = threading.Lock()
        self._idle: list[C] = []
        self._closed = False

    @contextmanager
    def borrow(self) -> Generator[C]:
        """A connection that is nobody else's. Blocks while one is opened."""
        connection = self._take()
        try:
            yield connection
        finally:
            self._give_back(connection)

    def close(self) -> None:
        """Close what is idle now, and the rest when it is given back: libvirt cannot close under a call."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            self._close_connection(connection)

    def _take(self) -> C:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._open_connection()
            if connection.isAlive():
                return connection
            self._close_connection(connection)

    def _give_back(self, connection: C) -> None:
        with self._lock:
            kept = not self._closed and len(self._idle) < MAX_IDLE and bool(connection.isAlive())
            if kept:
                self._idle.append(connection)
        if not kept:
            self._close_connection(connection)
