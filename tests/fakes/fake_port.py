# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtio-serial ports without a VM: one that a test drives, and a pseudo-terminal with a sysfs."""

from __future__ import annotations

import errno
import os
import select
import tty
from collections import deque
from collections.abc import Callable
from pathlib import Path

from fence_vmchannel.discovery import PortPaths
from fence_vmchannel.links.base import Link
from fence_vmchannel.links.guest_port import GuestPort, PortFile

_AWAY = select.EPOLLIN | select.EPOLLHUP


class ScriptedPort:
    """A `PortDevice` that behaves as virtio_console was measured to; the test plays the host.

    Its edges are the real ones: IN|HUP when the host goes, OUT when it comes, HUP alone when unplugged; OUT
    only while it is watched for.
    """

    def __init__(self) -> None:
        self.written = bytearray()
        self.reads = 0
        self.room = 1 << 20
        self._waiting: deque[bytes] = deque()
        self._connected = False
        self._unplugged = False
        self._edge: int | None = _AWAY  # a fresh registration reports once
        self._watching_writes = True
        self._event = os.eventfd(1, os.EFD_NONBLOCK)
        self._closed = False

    # --- what the host does ---

    def connect(self, *, room: int = 1 << 20) -> None:
        """The host connects."""
        self._connected, self.room = True, room
        self._change(select.EPOLLOUT)

    def disconnect(self) -> None:
        """The host goes away; what it wrote stays readable."""
        self._connected = False
        self._change(_AWAY)

    def deliver(self, data: bytes) -> None:
        """The host writes."""
        self._waiting.extend(data[i : i + 4096] for i in range(0, len(data), 4096))
        self._change(select.EPOLLIN | (select.EPOLLOUT if self.room else 0))

    def drain(self, room: int) -> None:
        """The host reads: there is room again."""
        self.room = room
        self._change(select.EPOLLOUT)

    def unplug(self) -> None:
        """The port is removed from the VM."""
        self._unplugged = True
        self._change(select.EPOLLHUP)

    # --- `PortDevice` ---

    def fileno(self) -> int:
        return self._event

    def changes(self) -> int:
        edge, self._edge = self._edge, None
        if edge is None:
            return 0
        os.eventfd_read(self._event)
        if edge & select.EPOLLOUT:
            self._watching_writes = False
        return edge

    def watch_writes(self) -> None:
        if not self._watching_writes:
            self._watching_writes = True
            if self._connected and self.room:
                self._change(select.EPOLLOUT)

    def read(self) -> bytes:
        self.reads += 1
        if self._unplugged:
            raise OSError(errno.ENODEV, "No such device")
        if self._waiting:
            return self._waiting.popleft()
        if self._connected:
            raise BlockingIOError(errno.EAGAIN, "again")
        return b""

    def write(self, data: memoryview) -> int:
        if self._unplugged:
            raise OSError(errno.ENODEV, "No such device")
        if not self._connected or not self.room:
            raise BlockingIOError(errno.EAGAIN, "again")
        taken = min(len(data), 32_768, self.room)
        self.room -= taken
        self.written += data[:taken]
        return taken

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._event)

    def _change(self, edge: int) -> None:
        if not self._watching_writes:
            edge &= ~select.EPOLLOUT
        if not edge:
            return
        if self._edge is None:
            os.eventfd_write(self._event, 1)
        self._edge = edge


class PtyPort:
    """A pseudo-terminal that plays a named port: the guest finds it in sysfs."""

    def __init__(self, directory: Path, name: str, *, entry: str = "vport0p1") -> None:
        self._master, slave = os.openpty()
        tty.setraw(slave)
        self.node = os.ttyname(slave)
        self._slave = slave  # kept open: a pty whose last slave closes loses what the host wrote
        sysfs, dev = directory / "sysfs", directory / "dev"
        (sysfs / entry).mkdir(parents=True)
        (sysfs / entry / "name").write_text(name + "\n", encoding="utf-8")
        dev.mkdir(exist_ok=True)
        (dev / entry).symlink_to(self.node)
        self.paths = PortPaths(sysfs=str(sysfs), dev=str(dev))

    async def connect(self) -> Link:
        """The host's end, as a `Connector` gives it."""
        return GuestPort(PortFile(os.dup(self._master)), "host end")

    def close(self) -> None:
        """Free the terminal."""
        os.close(self._slave)
        os.close(self._master)


def busy_opener() -> Callable[[str, int], int]:
    """Opens nothing: the port is held."""

    def refuse(path: str, flags: int) -> int:
        raise OSError(errno.EBUSY, "Device or resource busy")

    return refuse
