# SPDX-License-Identifier: LGPL-2.1-or-later
"""The admin API's unix socket: one owner, tight mode, no stale file in the way. Blocking, but briefly."""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import socket
import struct
from pathlib import Path
from typing import Final

_UCRED: Final = struct.Struct("3i")


class AdminSocketError(Exception):
    """The socket cannot be served; the message names the path and why."""


class AdminSocket:
    """A bound socket, its path and the lock that makes both ours."""

    def __init__(self, path: Path, *, group: str = "vmchannel", mode: int = 0o660) -> None:
        """Take the lock, remove what a dead daemon left, bind.

        The socket is made under another name with mode 0600 and renamed when owner and mode are right, so
        that nobody meets it half made, and a client never finds the path empty between two daemons.

        Args:
            path: of the socket; its lock is `PATH.lock`.
            group: gets the socket, where it exists.
            mode: of the socket.

        Raises:
            AdminSocketError: another daemon serves it, or the path cannot be used.
        """
        self._path = path
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._lock = os.open(path.with_name(path.name + ".lock"), _LOCK_FLAGS, 0o600)
        except OSError as error:
            raise AdminSocketError(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.socket: Final = _bind(path, _group_id(group), mode)
        except BlockingIOError as error:
            os.close(self._lock)
            raise AdminSocketError(f"{path}: another daemon serves it") from error
        except OSError as error:
            os.close(self._lock)
            raise AdminSocketError(f"{path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Stop listening, remove the path, let the lock go."""
        self.socket.close()
        self._path.unlink(missing_ok=True)  # ours: the lock is still held
        os.close(self._lock)


def peer_user(connection: socket.socket) -> str:
    """Who is at the other end: the user's name, or `uid N` where there is none (SO_PEERCRED)."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid = int(_UCRED.unpack(data)[1])
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


_LOCK_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return -1  # leave the group as it is: root's


def _bind(path: Path, gid: int, mode: int) -> socket.socket:
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    if path.exists() and not path.is_socket():
        raise OSError("it exists and is no socket")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(server.fileno(), 0o600)  # unix(7): bind takes the mode from here, less the umask
        server.bind(str(new))
        os.chown(new, -1, gid)
        new.chmod(mode)
        # A pending connect() meets a listener or the old socket, never a bound one that refuses.
        server.listen(128)
        new.rename(path)
    except BaseException:
        server.close()
        raise
    return server
