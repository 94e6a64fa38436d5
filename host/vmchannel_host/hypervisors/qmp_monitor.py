# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection to a QMP monitor: time-outs on every step, bounded memory, and its stream read to the end.

A thin shell around qemu.qmp. What is added: the pid behind the socket (SO_PEERCRED), events handed on in the
reader itself (so their order among the replies is known), and a bound on unanswered commands.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, QMPError, Runstate

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.qmp_state import (
    MAX_PORTS,
    NAMED,
    UNNAMED,
    Chardev,
    Device,
    MonitorFacts,
    make_port,
    network_has_passthrough,
    parse_chardevs,
    parse_devices,
    parse_migration,
    parse_name,
    parse_run_state,
    parse_uuid,
    parse_version,
)
from vmchannel_host.model import Migration, Port, RunState, VmUuid

MAX_MESSAGE_BYTES = 128 * 1024
"""Longest line taken from a monitor, in bytes; query-chardev with 500 chardevs is half of it."""

READ_BYTES = 16 * 1024
"""Taken from a monitor at a time, in bytes; then the other tasks have their turn."""

MAX_UNANSWERED = 32
"""Commands that a mute monitor may owe us before further ones are refused at once."""

EventHandler = Callable[[str, Mapping[str, object]], None]


class MonitorError(HypervisorError):
    """The monitor is of no use now."""


class MonitorMute(MonitorError):
    """No answer in time: QEMU is stopped or hung, or another client holds the monitor."""


class MonitorClosed(MonitorError):
    """Nobody listens, or the connection ended."""


class NobodyListens(MonitorClosed):
    """There is no socket at the path, or no process behind it."""


class CommandRefused(MonitorError):
    """QEMU answered with an error."""


class Monitor:
    """A negotiated QMP session. Commands may be sent by several tasks."""

    def __init__(self, path: str, sock: socket.socket, client: _Client) -> None:
        self.path = path
        self.peer_pid = _peer_pid(sock)
        self._sock = sock
        self._client = client

    @classmethod
    async def connect(cls, path: str, *, timeout_s: float) -> Monitor:
        """Connect and negotiate, in at most `timeout_s` seconds.

        Raises:
            MonitorMute: the socket accepts but says nothing (or its backlog is full).
            NobodyListens: there is no socket, or no process behind it.
            MonitorClosed: what answers is not QMP.
        """
        sock = _connect_socket(path)
        client = _Client()
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(sock)
            return cls(path, sock, client)
        except TimeoutError as error:
            raise MonitorMute(f"{path}: no QMP greeting in {timeout_s:.3g} s") from error
        except (ConnectError, OSError) as error:
            raise MonitorClosed(f"{path}: {error}") from error
        finally:
            if client.runstate != Runstate.RUNNING:
                sock.close()

    @property
    def version(self) -> str:
        """QEMU's version by its greeting; "" when that does not tell it."""
        greeting = self._client.greeting
        return "" if greeting is None else parse_version(greeting.QMP.version)

    @property
    def open(self) -> bool:
        return self._client.runstate == Runstate.RUNNING

    @property
    def heard(self) -> asyncio.Event:
        """Set by every message that arrives. Its reader clears it."""
        return self._client.heard

    def on_event(self, handler: EventHandler) -> None:
        """Call `handler(name, data)` for each event in the stream's order. It must not block or raise."""
        self._client.handler = handler

    @contextmanager
    def tap(self, name: str) -> Generator[EventTap, None, None]:
        """Collect the events of that name that arrive from now on."""
        tap = EventTap(name)
        self._client.taps.append(tap)
        try:
            yield tap
        finally:
            self._client.taps.remove(tap)

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float
    ) -> object:
        """Send a command and wait at most `timeout_s` seconds for its reply.

        Raises:
            MonitorMute: no reply in time. The command may still be carried out, at any time.
            MonitorClosed: the connection ended before the reply.
            CommandRefused: QEMU answered with an error.
        """
        # `quit` must always get through: it may be what ends a QEMU that wakes up later.
        if len(self._client.unanswered) >= MAX_UNANSWERED and command != "quit":
            raise MonitorMute(f"{self.path}: {MAX_UNANSWERED} commands are unanswered")
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments)
        except TimeoutError as error:
            raise MonitorMute(f"{self.path}: no answer to {command} in {timeout_s:.3g} s") from error
        except ExecuteError as error:
            raise CommandRefused(f"{self.path}: {command}: {str(error)[:300]}") from error
        except (QMPError, OSError, EOFError) as error:
            raise MonitorClosed(f"{self.path}: closed before the answer to {command}") from error

    async def give_fd(self, name: str, fd: int, *, timeout_s: float) -> None:
        """Hand QEMU a copy of a file descriptor, under a name that a command can use once.

        Raises: as `execute`.
        """
        self._client.pass_fd(fd, self.path)
        await self.execute("getfd", {"fdname": name}, timeout_s=timeout_s)

    async def wait_closed(self) -> None:
        """Wait until the stream has been read to its end and every event in it was handed on."""
        while self.open:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Close the connection; waits at most a second for the library's tasks."""
        with suppress(OSError):  # closed already
            self._sock.shutdown(socket.SHUT_RDWR)  # nothing that is queued may hold up the end
        # A task of its own: cancelled in its middle, the library would leave tasks behind.
        closing = asyncio.get_running_loop().create_task(self._client.disconnect(), name=f"close {self.path}")
        try:
            await asyncio.wait((closing,), timeout=1.0)
        finally:
            if not closing.done():
                await asyncio.wait((closing,), timeout=1.0)
            closing.cancel()
            closing.add_done_callback(
                _fetch_error
            )  # disconnect() raises whatever ended the reader, by design
            self._sock.close()


class EventTap:
    """The events of one name; keeps the first 64."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._events: list[Mapping[str, object]] = []
        self._arrived = asyncio.Event()

    def put(self, data: Mapping[str, object]) -> None:
        if len(self._events) < 64:
            self._events.append(data)
            self._arrived.set()

    async def wait_for(self, wanted: Callable[[Mapping[str, object]], bool]) -> None:
        """Wait for the first event that is wanted."""
        while not any(wanted(data) for data in self._events):
            self._arrived.clear()
            await self._arrived.wait()


async def read_uuid(monitor: Monitor, *, timeout_s: float) -> VmUuid:
    """Ask the monitor whose it is."""
    return parse_uuid(await monitor.execute("query-uuid", timeout_s=timeout_s))


async def watch_migration(monitor: Monitor, *, timeout_s: float) -> None:
    """Switch on MIGRATION events. QEMU refuses during a migration: then poll query-migrate.

    Raises:
        CommandRefused: not now.
    """
    wanted = {"capabilities": [{"capability": "events", "state": True}]}
    await monitor.execute("migrate-set-capabilities", wanted, timeout_s=timeout_s)


async def read_run_state(monitor: Monitor, *, timeout_s: float) -> tuple[RunState, Migration]:
    """Ask for run state and migration, the status last: it is the newer word on `running`."""
    migrate, status = await asyncio.gather(  # sent at once; QEMU carries them out in this order
        monitor.execute("query-migrate", timeout_s=timeout_s),
        monitor.execute("query-status", timeout_s=timeout_s),
    )
    run_state = parse_run_state(status)
    return run_state, parse_migration(migrate, run_state)


async def read_facts(monitor: Monitor, *, directory: str, timeout_s: float) -> MonitorFacts:
    """Ask for everything. `timeout_s` holds for each command."""
    name = parse_name(await monitor.execute("query-name", timeout_s=timeout_s))
    devices = await _devices(monitor, timeout_s)
    ports, silent = await _ports(monitor, devices, directory, timeout_s)
    resettable = _is_resettable(devices, await _network(monitor, timeout_s))
    run_state, migration = await read_run_state(monitor, timeout_s=timeout_s)
    return MonitorFacts(name, run_state, migration, ports, resettable, silent, monitor.version)


async def read_chardevs(monitor: Monitor, *, directory: str, timeout_s: float) -> dict[str, Chardev]:
    """Ask for the chardevs that listen on unix sockets, by label: whether the guest has their ports open."""
    return parse_chardevs(await monitor.execute("query-chardev", timeout_s=timeout_s), directory)


async def read_resettable(monitor: Monitor, *, timeout_s: float) -> bool:
    """Ask whether `system_reset` may prove a reboot: no device keeps state that it does not reach (S8)."""
    return _is_resettable(*await asyncio.gather(_devices(monitor, timeout_s), _network(monitor, timeout_s)))


def _is_resettable(devices: tuple[Device, ...], network: object) -> bool:
    return not network_has_passthrough(network) and not any(device.is_passthrough for device in devices)


async def _devices(monitor: Monitor, timeout_s: float) -> tuple[Device, ...]:
    named, unnamed = await asyncio.gather(
        *(monitor.execute("qom-list", {"path": parent}, timeout_s=timeout_s) for parent in (NAMED, UNNAMED))
    )
    return parse_devices(NAMED, named) + parse_devices(UNNAMED, unnamed)


async def _network(monitor: Monitor, timeout_s: float) -> object:
    """The text of `info network`, or None when this QEMU does not tell."""
    arguments = {"command-line": "info network"}
    try:
        return await monitor.execute("human-monitor-command", arguments, timeout_s=timeout_s)
    except CommandRefused:
        return None


async def _ports(
    monitor: Monitor, devices: tuple[Device, ...], directory: str, timeout_s: float
) -> tuple[tuple[Port, ...], frozenset[Chardev]]:
    serial = [device for device in devices if device.is_serial_port][:MAX_PORTS]
    if not serial:
        return (), frozenset()
    chardevs = await read_chardevs(monitor, directory=directory, timeout_s=timeout_s)
    silent = not all(device.has_id for device in serial)
    ports: list[Port] = []
    for device in serial:
        try:
            name = await _property(monitor, device, "name", timeout_s)
            label = await _property(monitor, device, "chardev", timeout_s)
        except CommandRefused:
            continue  # unplugged since it was listed
        port = make_port(name, label, chardevs)
        if port is not None:
            ports.append(port)
    return tuple(ports), frozenset(chardevs.values() if silent else ())


async def _property(monitor: Monitor, device: Device, name: str, timeout_s: float) -> object:
    return await monitor.execute("qom-get", {"path": device.path, "property": name}, timeout_s=timeout_s)


class _Listener(EventListener):
    """Hands events on from the reader instead of keeping them: the library's own listener grows for ever."""

    def __init__(self, client: _Client) -> None:
        super().__init__()
        self._owner = client

    async def put(self, event: Message) -> None:
        name, data = event.get("event"), event.get("data")
        if not isinstance(name, str):
            return
        fields: Mapping[str, object] = cast(Mapping[str, object], data) if isinstance(data, dict) else {}
        for tap in self._owner.taps:
            if tap.name == name:
                tap.put(fields)
        if self._owner.handler is not None:
            self._owner.handler(name, fields)


class _Client(QMPClient):
    """The library's client with bounded memory, and quiet: the caller logs what matters."""

    def __init__(self) -> None:
        super().__init__(readbuflen=MAX_MESSAGE_BYTES)
        self.logger = logging.Logger("quiet", logging.CRITICAL + 1)  # noqa: LOG001 - for this object only
        self.events.event_filter = lambda _event: False
        self.handler: EventHandler | None = None
        self.taps: list[EventTap] = []
        self.unanswered: set[str] = set()
        self.heard = asyncio.Event()
        self.register_listener(_Listener(self))

    async def _establish_session(self) -> None:
        await super()._establish_session()
        if self._writer is not None:
            # asyncio's own 256 KiB would be thousands of events in one go: 80 ms for which all others wait.
            cast(Any, self._writer.transport).max_size = READ_BYTES
        if self._bh_tasks is not None:
            self._bh_tasks.add_done_callback(_fetch_error)

    def pass_fd(self, fd: int, path: str) -> None:
        """Send a descriptor beside the stream: QEMU keeps it for the next `getfd`.

        The blank that carries it may not fall into the middle of a command that is not yet sent whole.
        """
        if self._writer is None or self.runstate != Runstate.RUNNING:
            raise MonitorClosed(f"{path}: closed")
        if self._writer.transport.get_write_buffer_size():
            raise MonitorMute(f"{path}: QEMU does not read")
        try:
            self.send_fd_scm(fd)
        except BlockingIOError as error:
            raise MonitorMute(f"{path}: QEMU does not read") from error
        except OSError as error:
            raise MonitorClosed(f"{path}: {error.strerror or error}") from error

    def _schedule_disconnect(self) -> None:
        super()._schedule_disconnect()
        if self._dc_task is not None:
            self._dc_task.add_done_callback(_fetch_error)

    def _cb_outbound(self, msg: Message) -> Message:
        if isinstance(identifier := msg.get("id"), str):
            self.unanswered.add(identifier)
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        self.heard.set()
        if isinstance(identifier := msg.get("id"), str):
            self.unanswered.discard(identifier)
        return msg


def _fetch_error(done: asyncio.Future[Any]) -> None:
    """Errors of the library's tasks are those of the connection: `wait_closed` and `execute` report them."""
    if not done.cancelled():
        done.exception()


def _connect_socket(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except BlockingIOError as error:
        sock.close()
        raise MonitorMute(f"{path}: its backlog is full, QEMU accepts nobody") from error
    except OSError as error:
        sock.close()
        gone = error.errno in (errno.ENOENT, errno.ECONNREFUSED)
        kind = NobodyListens if gone else MonitorClosed
        raise kind(f"{path}: {error.strerror or error}") from error
    return sock


def _peer_pid(sock: socket.socket) -> int:
    """The pid of whoever called listen(); 0 when that process is outside this pid namespace."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def working_directory(proc: os.PathLike[str], pid: int) -> str:
    """The directory where a process's relative paths start; "/" when it cannot be read."""
    try:
        return os.readlink(os.path.join(proc, str(pid), "cwd"))
    except OSError:
        return "/"
