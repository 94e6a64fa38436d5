# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding virtio-serial ports by name, with sysfs and kernel uevents only: no udev needed.

A port's name is data that whoever configures the VM chose (it may be 300 characters with slashes): it is
compared, never made part of a path. `name` of a new port may come up to some milliseconds after its `add`
event, with a `change` event, so every event leads to a new scan.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Final

from fence_vmchannel.errors import LinkError, PortBusy, PortNotFound
from fence_vmchannel.links.guest_port import GuestPort, open_node
from fence_vmchannel.records import Record

SYSFS_PORTS: Final = "/sys/class/virtio-ports"
_NETLINK_KOBJECT_UEVENT: Final = 15
_KERNEL_GROUP: Final = 1
_MAX_NAME_BYTES = 4096  # a sysfs attribute is one page


class PortPaths(Record):
    """Where the system shows its ports and how a node is opened; tests give their own."""

    sysfs: str = SYSFS_PORTS
    dev: str = "/dev"
    proc: str = "/proc"
    open: Callable[[str, int], int] = os.open


SYSTEM_PATHS: Final = PortPaths()


class FoundPort(Record):
    """A port of this machine."""

    name: str  # untrusted text, never empty
    node: str  # path of its device node


class Holder(Record):
    """A process that has a port open."""

    pid: int
    command: str  # its command line, cut; untrusted text

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command})"


class Uevent(Record):
    """One message of the kernel about a device."""

    action: str  # add, change, remove, ...
    subsystem: str
    device: str  # DEVNAME, for instance "vport0p1"


def scan_ports(paths: PortPaths = SYSTEM_PATHS) -> list[FoundPort]:
    """All ports that have a name now, in the order of their nodes. A port that goes meanwhile is left out."""
    found: list[FoundPort] = []
    try:
        entries = sorted(os.listdir(paths.sysfs))
    except OSError:  # no virtio-serial device, or its driver is not loaded
        return found
    for entry in entries:
        name = _read_name(os.path.join(paths.sysfs, entry, "name"))
        if name:
            found.append(FoundPort(name, os.path.join(paths.dev, entry)))
    return found


def find_port(name: str, paths: PortPaths = SYSTEM_PATHS) -> FoundPort:
    """The port called `name`. Look it up at every open: a port that returns may get another node.

    Raises:
        PortNotFound: there is none; the text names the ports that exist.
    """
    ports = scan_ports(paths)
    for port in ports:
        if port.name == name:
            return port
    there = ", ".join(repr(port.name[:64]) for port in ports[:10])
    raise PortNotFound(
        f"this machine has no port {name!r}; " + (f"it has {there}" if there else "it has none at all")
    )


def open_port(name: str, paths: PortPaths = SYSTEM_PATHS) -> GuestPort:
    """Find and open the port called `name`; does not wait.

    Raises:
        PortNotFound: there is none.
        PortBusy: another program has it; the text names the process and its command, as far as it can be
        seen. LinkError: it cannot be opened, for want of permission for instance.
    """
    port = find_port(name, paths)
    try:
        return open_node(port.node, name, paths.open)
    except PortBusy as error:
        raise port_busy(port, holder_of(port.node, paths)) from error


def port_busy(port: FoundPort, holder: Holder | None) -> PortBusy:
    """The error for a port that `holder` has open."""
    by = str(holder) if holder else "a process that this user may not see"
    return PortBusy(f"port {port.name} ({port.node}) is held by {by}")


def holder_of(node: str, paths: PortPaths = SYSTEM_PATHS) -> Holder | None:
    """The process that has the device node open, or None when none can be seen (that needs root).

    Reads /proc of every process, which may take some 10 ms.
    """
    try:
        wanted = os.stat(node).st_rdev
    except OSError:
        return None
    for pid in _processes(paths.proc):
        if any(device == wanted for device in _open_devices(f"{paths.proc}/{pid}/fd")):
            return Holder(pid, _command(f"{paths.proc}/{pid}"))
    return None


def parse_uevent(datagram: bytes) -> Uevent | None:
    """Read one datagram of NETLINK_KOBJECT_UEVENT; None if it is not the kernel's (udev sends some too)."""
    head, _, rest = datagram.partition(b"\0")
    action, at, path = head.partition(b"@")
    if not at or not path.startswith(b"/"):
        return None
    fields: dict[str, str] = {}
    for line in rest.split(b"\0"):
        key, equals, value = line.partition(b"=")
        if equals:
            fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
    return Uevent(action.decode("utf-8", "replace"), fields.get("SUBSYSTEM", ""), fields.get("DEVNAME", ""))


class UeventListener:
    """The kernel's uevents about virtio ports, over a netlink socket; works without udev. Never blocks."""

    def __init__(self) -> None:
        """Raises LinkError where netlink is not available (some containers): rescan from time to time
        instead.
        """
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
                _NETLINK_KOBJECT_UEVENT,
            )
        except OSError as error:
            raise LinkError(f"no kernel uevents: {error.strerror}") from error
        try:
            self._socket.bind((0, _KERNEL_GROUP))
        except OSError as error:
            self._socket.close()
            raise LinkError(f"no kernel uevents: {error.strerror}") from error

    def fileno(self) -> int:
        """Readable when an event waits."""
        return self._socket.fileno()

    def ports_changed(self) -> bool:
        """Take all waiting events; whether one was about a port, or some were lost: scan again then."""
        changed = False
        while True:
            try:
                datagram, sender = self._socket.recvfrom(65_536)
            except (BlockingIOError, InterruptedError):
                return changed
            except OSError:  # ENOBUFS: the queue ran over
                changed = True
                continue
            if sender[0] != 0:  # not from the kernel: netlink(7), nl_pid
                continue
            event = parse_uevent(datagram)
            changed = changed or (event is not None and event.subsystem == "virtio-ports")

    def close(self) -> None:
        """Free the socket."""
        self._socket.close()


def _read_name(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_NAME_BYTES).decode("utf-8", "replace").rstrip("\n")
    except OSError:  # a port without a name has no such file
        return ""


def _processes(proc: str) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for entry in os.listdir(proc):
            if entry.isdigit():
                yield int(entry)


def _open_devices(directory: str) -> Iterator[int]:
    try:
        entries = os.listdir(directory)
    except OSError:  # gone, or another user's
        return
    for entry in entries:
        with contextlib.suppress(OSError):
            status = os.stat(f"{directory}/{entry}")
            if status.st_rdev:
                yield status.st_rdev


def _command(directory: str) -> str:
    for name in ("cmdline", "comm"):
        with contextlib.suppress(OSError), open(f"{directory}/{name}", "rb") as file:
            text = file.read(400).replace(b"\0", b" ").decode("utf-8", "replace").strip()
            if text:
                return text[:200]
    return "unknown command"
