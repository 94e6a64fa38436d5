# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket on which a hub serves local applications."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from typing import Final

from fence_vmchannel.access import Credentials
from fence_vmchannel.errors import LinkError
from fence_vmchannel.links.stream import peer_credentials, try_connect

BACKLOG: Final = 1024
"""With asyncio's 100, 99 of 200 simultaneous clients failed (measured)."""

GUEST_SOCKET: Final = "/run/vmchannel/guest.sock"
HOST_SOCKET: Final = "/run/vmchannel/host.sock"


def sessions_path(socket_path: str) -> str:
    """Where the hub on that socket leaves its sessions when it stops in order."""
    return socket_path.removesuffix(".sock") + ".sessions"


class LocalListener:
    """A listening unix socket that one process serves: a lock beside it (`PATH.lock`) sees to that."""

    def __init__(
        self, path: str, *, mode: int = 0o660, gid: int | None = None, backlog: int = BACKLOG
    ) -> None:
        """Take the path over and listen; does not wait.

        Raises:
            LinkError: another hub serves the path, something else lies there, or a permission is missing.
        """
        self.path = path
        try:
            self._lock = lock_path(path)
            try:
                _remove_stale(path)
                self._socket = _listen(path, mode, gid, backlog)
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise LinkError(f"cannot serve {path}: {error.strerror}") from error
        self._open = True

    def fileno(self) -> int:
        """Readable when a client waits."""
        return self._socket.fileno()

    def accept(self) -> tuple[socket.socket, Credentials] | None:
        """The next client and who he is; None when none waits.

        Raises:
            OSError: descriptors have run out (EMFILE): wait before trying again.
        """
        while True:
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return None
            except ConnectionAbortedError:
                continue
            sock.setblocking(False)
            try:
                return sock, peer_credentials(sock)
            except OSError:
                sock.close()

    def close(self) -> None:
        """Stop serving and remove the socket. May be called twice."""
        if self._open:
            self._open = False
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            self._socket.close()
            os.close(self._lock)


def lock_path(path: str) -> int:
    """Hold `PATH.lock`; the descriptor is the lock. Raises LinkError if another process holds it, OSError."""
    fd = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise LinkError(f"another hub serves {path}") from error
    return fd


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise LinkError(f"cannot serve {path}: it is there, and is no socket")
    except FileNotFoundError:
        return
    try:
        client = try_connect(path)
    except ConnectionRefusedError:  # nobody listens: left by a process that was killed
        os.unlink(path)
        return
    if client is not None:
        client.close()
    raise LinkError(f"cannot serve {path}: another program listens there")


def _listen(path: str, mode: int, gid: int | None, backlog: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.bind(path)
        os.chmod(path, mode)  # nobody can connect before listen()
        if gid is not None:
            os.chown(path, -1, gid)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
