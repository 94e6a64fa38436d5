# SPDX-License-Identifier: LGPL-2.1-or-later
"""A link over a connected unix stream socket, and how to connect one without blocking."""

from __future__ import annotations

import errno
import select
import socket
import struct
from typing import Final

from fence_vmchannel.access import Credentials
from fence_vmchannel.errors import LinkError
from fence_vmchannel.links.base import READ_SIZE, EdgePoll

_SO_PEERGROUPS: Final = 59
"""asm-generic/socket.h, Linux 4.13; Python has no name for it."""

_GROUPS_SIZE = 4096  # bytes: 1,024 groups; getsockopt takes no larger buffer
_ENDED = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class SocketLink:
    """A connected unix stream socket as a `Link`. Takes the socket over."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(False)
        self.present = True  # a socket's other end is there until `receive` raises
        self._socket = sock
        self._name = name
        self._poll = EdgePoll(sock.fileno())
        self._readable = True
        self._writable = True
        self._ending = False  # the other end has closed: read to the very end

    @property
    def name(self) -> str:
        """For logs."""
        return self._name

    def fileno(self) -> int:
        """See `Link`."""
        return self._poll.fileno()

    def refresh(self) -> None:
        """See `Link`."""
        mask = self._poll.changes()
        if mask & _ENDED:
            self._ending = True
        if mask & (select.EPOLLIN | _ENDED):
            self._readable = True
        if mask & (select.EPOLLOUT | _ENDED):
            self._writable = True

    def receive(self) -> bytes:
        """See `Link`."""
        if not self._readable:
            return b""
        try:
            data = self._socket.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            self._readable = False
            return b""
        except OSError as error:
            raise LinkError(f"{self._name}: {error.strerror}") from error
        if not data:
            raise LinkError(f"{self._name}: the other end closed the connection")
        if len(data) < READ_SIZE and not self._ending:
            self._readable = False  # epoll(7): a short read of a stream means that it is empty
        return data

    def send(self, data: memoryview) -> int:
        """See `Link`."""
        if not self._writable:
            return 0
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            self._writable = False
            self._poll.watch_writes()
            return 0
        except OSError as error:
            raise LinkError(f"{self._name}: {error.strerror}") from error

    def close(self) -> None:
        """See `Link`."""
        self._poll.close()
        self._socket.close()


def try_connect(path: str) -> socket.socket | None:
    """Connect to the unix socket `path` without waiting; None when its backlog is full: try again soon.

    A unix socket connects at once or not at all. EAGAIN means a full backlog, not "in progress": waiting for
    writability, as asyncio does, ends in ENOTCONN.

    Raises:
        OSError: there is no such socket, nobody listens, or permission is missing.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        if error.errno in (errno.EAGAIN, errno.EINTR):
            return None
        raise
    return sock


def peer_credentials(sock: socket.socket) -> Credentials:
    """Who is at the other end of a unix socket: for a server the client, for a client the listener."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return Credentials(pid, uid, gid, _peer_groups(sock))


def _peer_groups(sock: socket.socket) -> frozenset[int]:
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE)
    except OSError:  # an old kernel, or more groups than fit: only the primary group counts then
        return frozenset()
    return frozenset(struct.unpack(f"{len(raw) // 4}I", raw))
