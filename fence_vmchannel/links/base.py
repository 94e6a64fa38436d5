# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every link is: a non-blocking byte connection whose readiness comes in edges.

A link owns an epoll descriptor that watches its device with EPOLLET, and `fileno` is that descriptor. An
event loop or `poll` may watch it level-triggered without spinning, which the device itself would do: a
guest's port whose host is away is readable (with 0 bytes) for ever. The user of a link reads and writes until
nothing goes on, then waits for `fileno`.
"""

from __future__ import annotations

import select
from typing import Final, Protocol

READ_SIZE: Final = 65_536
"""Bytes asked for in one read."""


class Link(Protocol):
    """One byte connection to a peer. Nothing here blocks. An error (`LinkError`) ends the link: close it."""

    @property
    def name(self) -> str:
        """For logs."""
        ...

    @property
    def present(self) -> bool:
        """Whether somebody is at the other end now. A port outlives its host's absence; a socket does not."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when something has changed, until `refresh`."""
        ...

    def refresh(self) -> None:
        """Take in what has changed."""
        ...

    def receive(self) -> bytes:
        """The next bytes; b"" when there are none now (then see `present`). Raises LinkError at the end."""
        ...

    def send(self, data: memoryview) -> int:
        """Write some of `data`; returns how many bytes were taken, maybe 0. Raises LinkError."""
        ...

    def close(self) -> None:
        """Free the descriptors. May be called twice."""
        ...


_READING: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


class EdgePoll:
    """The readiness of one descriptor, in edges.

    That it can be written is told once after `watch_writes`: a socket whose other end reads would else wake
    its writer after every message.
    """

    def __init__(self, fd: int, *, watch_writes: bool = False) -> None:
        self._fd = fd
        self._epoll = select.epoll()
        self._writes = watch_writes
        try:
            self._epoll.register(fd, _READING | select.EPOLLOUT if watch_writes else _READING)
        except BaseException:
            self._epoll.close()
            raise

    def fileno(self) -> int:
        """The epoll descriptor."""
        return self._epoll.fileno()

    def changes(self) -> int:
        """The present readiness (EPOLL bits) if it changed since the last call, else 0."""
        for _, mask in self._epoll.poll(0, 1):
            if self._writes and mask & select.EPOLLOUT:
                self._writes = False
                self._epoll.modify(self._fd, _READING)
            return mask
        return 0

    def watch_writes(self) -> None:
        """Tell also when the descriptor can be written: at once if it can be now."""
        if not self._writes:
            self._writes = True
            self._epoll.modify(self._fd, _READING | select.EPOLLOUT)

    def close(self) -> None:
        """Free the descriptor. May be called twice."""
        self._epoll.close()


def wait_for(link: Link, timeout_s: float | None) -> bool:
    """Block until `link` has changed, at most `timeout_s` seconds (None: for ever); False when the time is
    over.
    """
    poll = select.poll()
    poll.register(link.fileno(), select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000))
