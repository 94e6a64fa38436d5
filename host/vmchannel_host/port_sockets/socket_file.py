# SPDX-License-Identifier: LGPL-2.1-or-later
"""A listening socket at a path that somebody else has named: made, given away and removed with care.

The directory is opened once, without following a symbolic link, and everything is done inside it: whoever can
rename a directory above it leads nothing astray. There is no lock file beside the socket: of two daemons the
journal's lock stops the second, and the directory belongs to others.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from typing import Final

from fence_vmchannel.access import Credentials
from fence_vmchannel.links.stream import peer_credentials, try_connect
from vmchannel_host.port_sockets.places import Place, SocketProblem

BACKLOG: Final = 64
"""Connections that wait until they are accepted: those of QEMUs, which try again or begin with it."""

MODE: Final = 0o600

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PortSocket:
    """One listening socket. Blocks as long as its file system does."""

    def __init__(self, place: Place, directory: int, sock: socket.socket, file: os.stat_result) -> None:
        self.place = place
        self._directory = directory
        self._socket = sock
        self._file = (file.st_dev, file.st_ino)
        self._open = True

    @classmethod
    def listen(cls, place: Place, *, uid: int | None) -> PortSocket:
        """Make the socket; a dead one at its path is replaced.

        Args:
            place: where.
            uid: of the QEMU that connects; None: not known, then it is for the directory's owner.

        Raises:
            SocketProblem: something else is there, or it cannot be made there.
        """
        try:
            directory = _open_directory(place.directory)
        except OSError as error:
            raise _directory_problem(place, error) from error
        try:
            owner = os.fstat(directory).st_uid if uid is None else uid
            _check_directory(place, directory, owner)
            _remove_dead(place, directory)
            sock, file = _bind(place, directory)
        except OSError as error:
            os.close(directory)
            raise _problem(place, error) from error
        except BaseException:
            os.close(directory)
            raise
        made = cls(place, directory, sock, file)
        try:
            made.give_to(owner)
            sock.listen(BACKLOG)  # nobody can connect before
        except OSError as error:
            made.close()
            raise _problem(place, error) from error
        except BaseException:
            made.close()
            raise
        return made

    def fileno(self) -> int:
        """Readable when a connection waits."""
        return self._socket.fileno()

    def accept(self) -> tuple[socket.socket, Credentials] | None:
        """The next connection and who made it; None when none waits.

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

    def in_place(self) -> bool:
        """Whether the file at the path is still this socket's."""
        try:
            found = os.lstat(self.place.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._file

    def owner(self) -> int | None:
        """Who owns the file now: libvirt gives it to its QEMU's user. None when it is gone."""
        try:
            return os.stat(self.place.name, dir_fd=self._directory, follow_symlinks=False).st_uid
        except OSError:
            return None

    def check_directory(self, uid: int) -> None:
        """See that no stranger to a QEMU of that user could put a socket of his in this one's place.

        QEMU cannot tell who listens: whoever does is the host, for its guest.

        Raises:
            SocketProblem: one could.
        """
        _check_directory(self.place, self._directory, uid)

    def give_to(self, uid: int) -> None:
        """Let that user's QEMU connect.

        Raises:
            SocketProblem: it cannot be given away.
        """
        if uid == self.owner():
            return
        # By a descriptor: the name may lead elsewhere by now. A second link would be another program's file.
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            file = os.open(self.place.name, flags, dir_fd=self._directory)
        except OSError as error:  # whoever writes in the directory has removed it
            raise _problem(self.place, error) from error
        try:
            found = os.fstat(file)
            if (found.st_dev, found.st_ino) != self._file or found.st_nlink != 1:
                raise SocketProblem(
                    "somebody else replaces the file", f"see who writes in {self.place.directory}"
                )
            os.chown(f"/proc/self/fd/{file}", uid, -1)
        except OSError as error:
            raise _problem(self.place, error) from error
        finally:
            os.close(file)

    def close(self) -> None:
        """Listen no more, and remove the file if it is still this socket's. May be called twice."""
        if not self._open:
            return
        self._open = False
        with suppress(OSError):
            found = os.stat(self.place.name, dir_fd=self._directory, follow_symlinks=False)
            if (found.st_dev, found.st_ino) == self._file:
                os.unlink(self.place.name, dir_fd=self._directory)
        self._socket.close()
        os.close(self._directory)


def _open_directory(path: str) -> int:
    """Open a directory to which no symbolic link leads. Raises OSError."""
    found = os.open("/", _DIRECTORY)
    for part in filter(None, path.split("/")):
        try:
            below = os.open(part, _DIRECTORY, dir_fd=found)
        finally:
            os.close(found)
        found = below
    return found


def _check_directory(place: Place, directory: int, uid: int) -> None:
    status = os.fstat(directory)
    if status.st_mode & stat.S_IWOTH:
        reason = f"every user may write in {place.directory} (mode {stat.S_IMODE(status.st_mode):04o})"
    elif status.st_uid not in (0, os.geteuid(), uid):
        reason = f"{place.directory} belongs to uid {status.st_uid}, and QEMU runs as uid {uid}"
    else:
        return
    raise SocketProblem(reason, "use a directory of root's, or of QEMU's user")


def _remove_dead(place: Place, directory: int) -> None:
    """Remove the socket of a listener that has ended; anything else is left alone."""
    try:
        mode = os.stat(place.name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "no socket"
        raise SocketProblem(f"something is there, and it is {what}", "remove it")
    try:
        listener = try_connect(_inside(place, directory))
    except ConnectionRefusedError:
        os.unlink(place.name, dir_fd=directory)
        return
    who = ""
    if listener is not None:
        with listener:
            who = f" (pid {peer_credentials(listener).pid})"
    raise SocketProblem(f"another program listens there{who}", "end it, or give the chardev another path")


def _bind(place: Place, directory: int) -> tuple[socket.socket, os.stat_result]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), MODE)  # bind() gives the file the socket's mode, less the umask
        sock.bind(_inside(place, directory))
        file = os.stat(place.name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISSOCK(file.st_mode) or file.st_uid != os.geteuid():
            raise SocketProblem("somebody else replaces the file", f"see who writes in {place.directory}")
    except BaseException:
        sock.close()
        raise
    return sock, file


def _inside(place: Place, directory: int) -> str:
    """A path that begins in the open directory: there is no bindat()."""
    return f"/proc/self/fd/{directory}/{place.name}"


def _directory_problem(place: Place, error: OSError) -> SocketProblem:
    if error.errno == errno.ENOENT:
        return SocketProblem(f"there is no directory {place.directory}", "make it, for root or QEMU's user")
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        reason = f"{place.directory} is no directory, or a symbolic link leads to it"
        return SocketProblem(reason, "write its real path")
    return SocketProblem(f"{place.directory}: {error.strerror}", "let the daemon enter that directory")


def _problem(place: Place, error: OSError) -> SocketProblem:
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = f"let the daemon write there: for systemd, ReadWritePaths={place.directory} in a drop-in"
        return SocketProblem(f"it cannot be made: {error.strerror}", remedy)
    return SocketProblem(f"it cannot be made: {error.strerror or error}", "mend what it names")
