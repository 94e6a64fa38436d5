# SPDX-License-Identifier: LGPL-2.1-or-later
"""Gone is not written: what a QEMU had open for writing, and whether its image locks are free (S1).

A SIGKILLed process can leave a write under way: an io_uring write landed 7.5 s after the pidfd had fired, and
the process's lock went only then. QEMU locks every image that it opens (block/file-posix.c: open file
description locks, shared, on byte 100 + n for a permission n held and 200 + n for one denied to others).
What `fdinfo` showed as locked before the kill is probed after it with F_OFD_GETLK.

What counts as storage: regular files and block devices open O_RDWR, as the block layer opens every writable
image. Not counted: O_WRONLY (logs, serial output, pid file: the block layer never opens so) and unlocked
files on memory file systems (guest RAM). A counted file without a lock of its own cannot be probed, nor can
anything behind a connection that the process opened itself: then nothing is claimed.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import stat
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from vmchannel_host.hypervisors.cmdline import CommandLine

_LOCK = re.compile(r"^lock:\s+\d+: OFDLCK\s+\S+\s+\S+\s+-?\d+\s+\S+\s+(\d+)\s+(\d+)$", re.MULTILINE)
_FIRST_LOCK_BYTE, _LAST_LOCK_BYTE = 100, 299
"""RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE (200), with room for 64 permissions and more."""

_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})
_TCP_LISTEN = "0A"
_UNIX_CONNECTED = "03"
_FLOCK = "hhqqi4x"
"""struct flock on 64-bit Linux: type, whence, start, length, pid."""

MAX_FILES = 1024
"""Descriptors looked at; a process with more is not judged."""


@dataclass(frozen=True, slots=True)
class LockedFile:
    """A writable image, held open by us so that it can be probed after the process is gone."""

    path: str  # as the process saw it; for messages
    fd: int
    ranges: tuple[tuple[int, int], ...]  # (start, length) of the process's image locks

    def free(self) -> bool:
        """Whether nobody holds any of these locks. Asks the kernel; a network file system asks its server.

        Raises:
            OSError: it cannot be asked.
        """
        return all(_is_free(self.fd, start, length) for start, length in self.ranges)


@dataclass(frozen=True, slots=True)
class OpenStorage:
    """What a process had open for writing at one moment. Close it after use."""

    files: tuple[LockedFile, ...]
    unprovable: str = ""  # why an end by SIGKILL could not be proven settled; "" when it could

    @property
    def nothing(self) -> bool:
        """Nothing was open for writing, so nothing can be under way."""
        return not self.files and not self.unprovable

    def close(self) -> None:
        for file in self.files:
            os.close(file.fd)

    def free(self) -> bool:
        """Whether every image lock of the process is gone. False when it cannot be said. May block."""
        if self.unprovable:
            return False
        try:
            return all(file.free() for file in self.files)
        except OSError:
            return False


def look_at_storage(pid: int, command: CommandLine, *, proc: Path = Path("/proc")) -> OpenStorage:
    """List what a living process has open for writing. Blocks; a dead network file system may block for long.

    The caller holds a pidfd that is still silent afterwards, else the answer is of no value.
    """
    if command.network_storage:
        return OpenStorage((), "its command line names storage that is not a local file")
    base = proc / str(pid)
    files: list[LockedFile] = []
    sockets: set[str] = set()
    try:
        memory = _memory_devices(base)
        names = _descriptors(base)
        for name in names:
            _look_at_descriptor(base, name, memory, files, sockets)
        _check_sockets(base, sockets)
        _descriptors(base)
    except (OSError, ValueError, _Unprovable) as error:
        _close_all(files)
        return OpenStorage((), f"{error}")
    return OpenStorage(tuple(files))


async def wait_settled(probe: Callable[[], Awaitable[bool]], *, until: float, poll_s: float = 0.02) -> bool:
    """Probe until the locks are free or `until` (loop time, seconds) has passed; says which.

    Args:
        probe: asks once whether they are free, outside the event loop; a probe that fails says no.
        until: loop time at which to give up.
        poll_s: seconds between two probes.
    """
    loop = asyncio.get_running_loop()
    while not await probe():
        if loop.time() + poll_s >= until:
            return False
        await asyncio.sleep(poll_s)
    return True


class _Unprovable(Exception):
    pass


def _descriptors(base: Path) -> list[str]:
    """The numbers of its descriptors. One that is ending shows none, while its threads may still write."""
    everything = os.listdir(base / "fd")
    if not everything:
        raise _Unprovable("it shows no open files: it is ending")
    # 0 to 2 are what its starter gave it: a log file, the system log's socket.
    names = [name for name in everything if int(name) > 2]
    if len(names) > MAX_FILES:
        raise _Unprovable(f"it has more than {MAX_FILES} files open")
    return names


def _look_at_descriptor(
    base: Path, name: str, memory: frozenset[int], files: list[LockedFile], sockets: set[str]
) -> None:
    link = base / "fd" / name
    try:
        target = os.readlink(link)
        if target.startswith("socket:["):
            sockets.add(target[len("socket:[") : -1])
            return
        if not target.startswith("/") or target.startswith("/memfd:"):
            return
        fdinfo = (base / "fdinfo" / name).read_text("ascii", "replace")
        status = os.stat(link)
    except FileNotFoundError:
        return  # closed since it was listed
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)) or not _is_read_write(fdinfo):
        return
    ranges = _image_locks(fdinfo)
    if not ranges:
        if stat.S_ISREG(status.st_mode) and status.st_dev in memory:
            return
        raise _Unprovable(f"{target[:200]!r} is open for writing without image locks")
    fd = os.open(link, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    files.append(LockedFile(target, fd, ranges))


def _is_read_write(fdinfo: str) -> bool:
    match = re.search(r"^flags:\s+([0-7]+)$", fdinfo, re.MULTILINE)
    if match is None:
        raise _Unprovable("fdinfo shows no flags")
    return int(match[1], 8) & os.O_ACCMODE == os.O_RDWR


def _image_locks(fdinfo: str) -> tuple[tuple[int, int], ...]:
    found = ((int(first), int(last)) for first, last in _LOCK.findall(fdinfo))
    return tuple(
        (first, last - first + 1)
        for first, last in found
        if _FIRST_LOCK_BYTE <= first <= last <= _LAST_LOCK_BYTE
    )


def _memory_devices(base: Path) -> frozenset[int]:
    """Device numbers of the memory file systems that the process sees (proc(5), mountinfo)."""
    devices: set[int] = set()
    for line in (base / "mountinfo").read_text("utf-8", "surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        if right.split(" ")[0] in _MEMORY_FILE_SYSTEMS:
            major, minor = left.split(" ")[2].split(":")
            devices.add(os.makedev(int(major), int(minor)))
    return frozenset(devices)


def _check_sockets(base: Path, sockets: set[str]) -> None:
    """Refuse connections that the process opened itself: storage may lie behind any of them."""
    if not sockets:
        return
    for table in ("tcp", "tcp6"):
        _check_tcp(base / "net" / table, sockets)
    for line in _table(base / "net/unix"):
        fields = line.split()
        # An accepted connection bears the name it was accepted on; one that was opened bears none.
        if len(fields) == 7 and fields[5] == _UNIX_CONNECTED and fields[6] in sockets:
            raise _Unprovable("it has opened a connection to a unix socket, which may be storage")


def _check_tcp(path: Path, sockets: set[str]) -> None:
    rows = [line.split() for line in _table(path)]
    mine = [row for row in rows if len(row) > 9 and row[9] in sockets]
    listening = {row[1].rpartition(":")[2] for row in mine if row[3] == _TCP_LISTEN}
    for row in mine:
        if row[3] != _TCP_LISTEN and row[1].rpartition(":")[2] not in listening:
            raise _Unprovable("it has opened a TCP connection, which may be storage")


def _table(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()[1:]
    except FileNotFoundError:
        return []  # a kernel without that protocol


def _is_free(fd: int, start: int, length: int) -> bool:
    # A write lock conflicts with every lock of others; F_OFD_GETLK needs no write access to ask.
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    return bool(struct.unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK)


def _close_all(files: list[LockedFile]) -> None:
    for file in files:
        os.close(file.fd)
