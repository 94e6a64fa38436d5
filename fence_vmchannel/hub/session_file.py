# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file in which a stopping hub leaves its sessions, on a tmpfs, for the one process that comes next."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Final

from fence_vmchannel.errors import LinkError
from fence_vmchannel.links.local import lock_path

MAX_FILE_BYTES: Final = 268_435_456


class SessionFile:
    """One path that one process at a time may use: a lock beside it (`PATH.lock`) sees to that."""

    def __init__(self, path: str) -> None:
        """Take the path over; does not wait.

        Raises:
            LinkError: another hub uses it, or a permission is missing.
        """
        self.path = path
        self._draft = path + ".new"
        try:
            self._lock = lock_path(path)
        except OSError as error:
            raise LinkError(f"cannot keep sessions in {path}: {error.strerror}") from error

    def take(self) -> bytes | None:
        """What the process before has left, which nobody can take again; None if it left nothing.

        Raises:
            LinkError: it is there, but is not a file of ours, or cannot be read.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._draft)  # of a process that was killed while it wrote
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LinkError(f"{self.path}: {error.strerror}") from error
        with open(fd, "rb") as file:
            os.unlink(self.path)
            self._check(os.fstat(fd))
            return file.read(MAX_FILE_BYTES)

    def put(self, data: bytes) -> None:
        """Leave `data`, all of it or nothing. No fsync: another boot has no use for it.

        Raises:
            OSError: it cannot be written, for want of room for instance.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(self._draft, flags, 0o600), "wb") as file:
                file.write(data)
            os.rename(self._draft, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(self._draft)
            raise

    def close(self) -> None:
        """Let the next process have it."""
        os.close(self._lock)

    def _check(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise LinkError(f"{self.path} is no file that only this user could have written")
        if found.st_size > MAX_FILE_BYTES:
            raise LinkError(f"{self.path} has {found.st_size} bytes, at most {MAX_FILE_BYTES} are read")
