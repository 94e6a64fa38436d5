# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who listens on a unix socket and who is connected to it: sock_diag(7), which `ss -xp` asks too."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from vmchannel_host.doctor.facts import Program

# linux/unix_diag.h, linux/sock_diag.h, linux/netlink.h
_SOCK_DIAG: Final = 4  # netlink protocol
_BY_FAMILY: Final = 20
_REQUEST_DUMP: Final = 0x301
_DONE, _ERROR = 3, 2
_SHOW: Final = 0x01 | 0x02 | 0x04  # name, inode of the path, peer
_NAME, _VFS, _PEER = 0, 1, 2
_HEADER: Final = struct.Struct("=IHHII")
_QUESTION: Final = struct.Struct("=BBHIIIII")
_MESSAGE: Final = struct.Struct("=BBBBIII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_ESTABLISHED, _LISTEN = 1, 10

MAX_SOCKETS: Final = 100_000


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """One unix socket of the network namespace that has a process."""

    inode: int
    path: str  # that it, or its listener, is bound to; "" for none
    path_inode: int  # of the file at that path; 0 when not told
    listening: bool
    peer: int  # inode of the other end; 0 when not told


def list_sockets(*, timeout_s: float) -> list[UnixSocket] | None:
    """All unix sockets, or None when the kernel does not tell. Blocks at most for `timeout_s` seconds."""
    states = 1 << _ESTABLISHED | 1 << _LISTEN
    question = _QUESTION.pack(socket.AF_UNIX, 0, 0, states, 0, _SHOW, 0xFFFFFFFF, 0xFFFFFFFF)
    request = _HEADER.pack(_HEADER.size + len(question), _BY_FAMILY, _REQUEST_DUMP, 1, 0) + question
    deadline = time.monotonic() + timeout_s
    found: list[UnixSocket] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as netlink:
            netlink.settimeout(timeout_s)
            netlink.send(request)
            while time.monotonic() < deadline and len(found) < MAX_SOCKETS:
                sockets, done = parse_answer(netlink.recv(1 << 18))
                found += sockets
                if done is not None:
                    return found if done else None
    except (OSError, ValueError):
        pass
    return None


def parse_answer(data: bytes) -> tuple[list[UnixSocket], bool | None]:
    """The sockets of one datagram; then True at the end of the dump, False after an error, else None.

    Raises:
        ValueError: it is malformed.
    """
    found: list[UnixSocket] = []
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        if not _HEADER.size <= length <= len(data):
            raise ValueError("a netlink message has another length than it says")
        if kind in (_DONE, _ERROR):
            return found, kind == _DONE
        if kind == _BY_FAMILY:
            found.append(_parse_socket(data[_HEADER.size : length]))
        data = data[(length + 3) & ~3 :]
    return found, None


def _parse_socket(body: bytes) -> UnixSocket:
    if len(body) < _MESSAGE.size:
        raise ValueError("a socket's message is too short")
    _, _, state, _, inode, _, _ = _MESSAGE.unpack_from(body)
    attributes = dict(_attributes(body[_MESSAGE.size :]))
    name = attributes.get(_NAME, b"")
    path = "" if name[:1] == b"\0" else os.fsdecode(name.rstrip(b"\0"))  # not the abstract ones
    vfs, peer = attributes.get(_VFS, b""), attributes.get(_PEER, b"")
    return UnixSocket(inode, path, _u32(vfs), state == _LISTEN, _u32(peer))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            raise ValueError("an attribute has another length than it says")
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]


def _u32(data: bytes) -> int:
    return int.from_bytes(data[:4], sys.byteorder) if len(data) >= 4 else 0


class SocketTable:
    """The sockets of a host, found by the path that they or their listeners are bound to."""

    def __init__(self, sockets: Iterable[UnixSocket]) -> None:
        self._by_path: dict[str, list[UnixSocket]] = {}
        self._by_inode: dict[int, list[UnixSocket]] = {}
        for one in sockets:
            if one.path:
                self._by_path.setdefault(one.path, []).append(one)
                self._by_inode.setdefault(one.path_inode, []).append(one)

    def ends_at(self, path: str) -> tuple[list[int], list[int]]:
        """Inodes of the sockets that listen on a path, and of the clients whose connections are served.

        A connection that waits in the backlog has no inode on the listener's side: it is not among them.
        """
        found = {one.inode: one for one in self._by_path.get(path, ())}
        for one in self._by_inode.get(_inode(path), ()):  # bound by a relative path, or through a link
            if os.path.basename(one.path) == os.path.basename(path):
                found[one.inode] = one
        listeners = [one.inode for one in found.values() if one.listening]
        return listeners, [one.peer for one in found.values() if not one.listening and one.peer]


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1


def owners(inodes: Iterable[int], *, expired: Callable[[], bool]) -> dict[int, list[Program]]:
    """The processes that hold these sockets open. Looks at every process until the time has `expired`."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, list[Program]] = {}
    if not wanted:
        return found
    for entry in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        if expired():
            break
        for inode in _sockets_of(entry, wanted):
            found.setdefault(inode, []).append(Program(int(entry), command_of(entry)))
    return found


def _sockets_of(pid: str, wanted: dict[str, int]) -> set[int]:
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return set()
    found: set[int] = set()
    for descriptor in descriptors:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
        except OSError:
            continue
        if target in wanted:
            found.add(wanted[target])
    return found


def command_of(pid: str) -> str:
    """The command line of a process, cut; "" when it cannot be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).split(b"\0")
    except OSError:
        return ""
    return os.fsdecode(b" ".join(words).strip())[:80]
