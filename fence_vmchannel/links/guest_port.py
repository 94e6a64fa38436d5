# SPDX-License-Identifier: LGPL-2.1-or-later
"""A link over a virtio-serial port, from the guest's side.

What virtio_console does, measured on Linux 6.1: one open at a time (EBUSY); while the host is away poll says
IN|HUP, read gives 0 bytes and write EAGAIN, and the descriptor stays good; HUP without IN means unplugged
(ENODEV for ever). One write takes at most 32,768 bytes. A quick absence of the host is not visible at all:
the greeting of the session finds it.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from typing import Final, Protocol

from fence_vmchannel.errors import LinkError, PortBusy, PortNotFound
from fence_vmchannel.links.base import EdgePoll

BUFFER_SIZE: Final = 4_096
"""What one read of a port gives at most: one buffer of virtio_console (virtio_console.c, PAGE_SIZE)."""

_BUFFERS: Final = 16
"""Buffers read in one call of `readv`, which goes on to the next as long as each is full."""

WRITE_SIZE: Final = 32_768
"""What one write of a port takes at most (virtio_console.c, port_fops_write)."""


class PortDevice(Protocol):
    """The system calls on an open port; tests give a device that goes away on demand."""

    def fileno(self) -> int:
        """See `Link.fileno`."""
        ...

    def changes(self) -> int:
        """EPOLL bits if the readiness changed since the last call, else 0."""
        ...

    def watch_writes(self) -> None:
        """Let `changes` tell once when it can be written, as after opening; at once if it can be now."""
        ...

    def read(self) -> bytes:
        """The next bytes: one buffer of the port, or several."""
        ...

    def write(self, data: memoryview) -> int:
        """os.write."""
        ...

    def close(self) -> None:
        """os.close."""
        ...


class PortFile:
    """A port's device node, open."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._poll = EdgePoll(fd, watch_writes=True)
        self._open = True
        self._buffers = memoryview(bytearray(_BUFFERS * BUFFER_SIZE))
        self._parts = [
            self._buffers[at : at + BUFFER_SIZE] for at in range(0, len(self._buffers), BUFFER_SIZE)
        ]
        self._full = False  # the last buffer was: more of a large write is likely to wait

    def fileno(self) -> int:
        """See `PortDevice`."""
        return self._poll.fileno()

    def changes(self) -> int:
        """See `PortDevice`."""
        return self._poll.changes()

    def watch_writes(self) -> None:
        """See `PortDevice`."""
        self._poll.watch_writes()

    def read(self) -> bytes:
        """See `PortDevice`."""
        if self._full:
            data = bytes(self._buffers[: os.readv(self._fd, self._parts)])
        else:
            data = os.read(self._fd, BUFFER_SIZE)
        self._full = bool(data) and len(data) % BUFFER_SIZE == 0
        return data

    def write(self, data: memoryview) -> int:
        """See `PortDevice`."""
        return os.write(self._fd, data)

    def close(self) -> None:
        """See `PortDevice`."""
        if self._open:
            self._open = False
            self._poll.close()
            os.close(self._fd)


class GuestPort:
    """An open virtio-serial port as a `Link`. `present` tells whether the host is connected."""

    def __init__(self, device: PortDevice, name: str) -> None:
        self._device = device
        self._name = name
        self._present = False  # until the first edge, which comes at once
        self._readable = False
        self._writable = False

    @property
    def name(self) -> str:
        """The port's name."""
        return self._name

    @property
    def present(self) -> bool:
        """Whether the host is connected, as far as the port shows it."""
        return self._present

    def fileno(self) -> int:
        """See `Link`."""
        return self._device.fileno()

    def refresh(self) -> None:
        """See `Link`."""
        mask = self._device.changes()
        if not mask:
            return
        if mask & select.EPOLLHUP and not mask & select.EPOLLIN:
            raise LinkError(f"port {self._name} was unplugged")
        if mask & select.EPOLLHUP:
            self._writable = False
            self._device.watch_writes()  # it can be written again when the host comes
        else:
            self._present = True
        if mask & select.EPOLLIN:
            self._readable = True
        if mask & select.EPOLLOUT:
            self._writable = True

    def receive(self) -> bytes:
        """See `Link`. What the host wrote before it left is delivered before `present` turns false."""
        if not self._readable:
            return b""
        try:
            data = self._device.read()
        except (BlockingIOError, InterruptedError):
            self._readable = False
            return b""
        except OSError as error:
            raise LinkError(f"port {self._name}: {error.strerror}") from error
        if not data:  # not an end of file: the host is away
            self._readable = self._present = self._writable = False
            self._device.watch_writes()
        return data

    def send(self, data: memoryview) -> int:
        """See `Link`."""
        if not self._writable or not self._present:
            return 0
        try:
            return self._device.write(data[:WRITE_SIZE])
        except (BlockingIOError, InterruptedError):
            self._writable = False
            self._device.watch_writes()
            return 0
        except OSError as error:
            raise LinkError(f"port {self._name}: {error.strerror}") from error

    def close(self) -> None:
        """See `Link`."""
        self._device.close()


def open_node(node: str, name: str, opener: Callable[[str, int], int] = os.open) -> GuestPort:
    """Open the device node `node` of the port `name`.

    Raises:
        PortBusy: another program has it open; who, the caller finds out (`discovery.holder_of`).
        PortNotFound: the node is not there (any more).
        LinkError: any other reason, permission for instance.
    """
    try:
        fd = opener(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise PortBusy(f"port {name} ({node}) is held by another program") from error
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise PortNotFound(f"port {name} has gone ({node}: {error.strerror})") from error
        raise LinkError(f"port {name}: cannot open {node}: {error.strerror}") from error
    try:
        return GuestPort(PortFile(fd), name)
    except OSError as error:
        os.close(fd)
        raise LinkError(f"port {name}: {node} cannot be watched: {error.strerror}") from error
