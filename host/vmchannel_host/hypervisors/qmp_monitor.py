# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection to a QMP monitor: time-outs on every step, bounded memory, and its stream read to the end.

A thin shell around qemu.qmp. What is added: the pid behind the socket (SO_PEERCRED), events handed on in the
reader itself (so their order among the replies is known), and a bound on unanswered commands.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress

from qemu.qmp import ConnectError, ExecuteError, QMPError, Runstate

from vmchannel_host.hypervisors.chardev_words import Connecting
from vmchannel_host.hypervisors.monitors import (
    CommandRefused,
    MonitorClosed,
    MonitorMute,
    NobodyListens,
)
from vmchannel_host.hypervisors.qmp_client import Client, EventHandler, EventTap, fetch_error
from vmchannel_host.hypervisors.qmp_state import (
    MAX_PORTS,
    NAMED,
    UNNAMED,
    Chardev,
    Device,
    MonitorFacts,
    connecting_of,
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

MAX_UNANSWERED = 32
"""Commands that a mute monitor may owe us before further ones are refused at once."""


class Monitor:
    """A negotiated QMP session. Commands may be sent by several tasks."""

    def __init__(self, path: str, sock: socket.socket, client: Client) -> None:
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
        client = Client()
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

    @property
    def ends_with_process(self) -> bool:
        """QEMU holds the other end of the socket, and nobody else."""
        return True

    async def quit(self, *, timeout_s: float) -> None:
        """See `InstanceMonitor.quit`."""
        await self.execute("quit", timeout_s=timeout_s)

    async def run_state(self, *, timeout_s: float) -> tuple[RunState, Migration]:
        """See `InstanceMonitor.run_state`. QEMU writes events and replies in order."""
        return await read_run_state(self, timeout_s=timeout_s)

    async def resettable(self, *, timeout_s: float) -> bool:
        """See `InstanceMonitor.resettable`."""
        return await read_resettable(self, timeout_s=timeout_s)

    async def reset(self, *, timeout_s: float) -> None:
        """See `InstanceMonitor.reset`.

        QEMU 7.2 was seen to write the event just before the command's own return, as well as after it: the
        command is carried out before its reply is queued. Both are taken; the reply must come too.
        """
        with self.tap("RESET") as tap:
            await self.execute("system_reset", timeout_s=timeout_s)
            async with asyncio.timeout(timeout_s):
                await self._wait_for_reset(tap)

    async def _wait_for_reset(self, tap: EventTap) -> None:
        """Wait for the event; a monitor that closes first means that QEMU left instead (-no-reboot)."""
        async with asyncio.TaskGroup() as tasks:
            event = tasks.create_task(tap.wait_for(_by_our_command), name="reset event")
            closed = tasks.create_task(self.wait_closed(), name="monitor closed")
            await asyncio.wait((event, closed), return_when=asyncio.FIRST_COMPLETED)
            proven = event.done()
            event.cancel()
            closed.cancel()
        if not proven:
            raise MonitorClosed(f"{self.path}: closed before the RESET event")

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
            closing.add_done_callback(fetch_error)  # disconnect() raises whatever ended the reader, by design
            self._sock.close()


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


async def read_facts(
    monitor: Monitor, *, directory: str, connecting: Iterable[Connecting], timeout_s: float
) -> MonitorFacts:
    """Ask for everything. `timeout_s` holds for each command; see `parse_chardevs` for the others."""
    name = parse_name(await monitor.execute("query-name", timeout_s=timeout_s))
    devices = await _devices(monitor, timeout_s)
    chardevs = await read_chardevs(monitor, directory=directory, connecting=connecting, timeout_s=timeout_s)
    ports, silent = await _ports(monitor, devices, chardevs, timeout_s)
    resettable = _is_resettable(devices, await _network(monitor, timeout_s))
    run_state, migration = await read_run_state(monitor, timeout_s=timeout_s)
    version, plugged = monitor.version, hash(devices)
    return MonitorFacts(
        name=name,
        run_state=run_state,
        migration=migration,
        ports=ports,
        resettable=resettable,
        silent=silent,
        version=version,
        plugged=plugged,
        connecting=connecting_of(chardevs),
    )


async def read_plugged(monitor: Monitor, *, timeout_s: float) -> int:
    """Ask for what tells whether a device came or went: `MonitorFacts.plugged`."""
    return hash(await _devices(monitor, timeout_s))


async def read_chardevs(
    monitor: Monitor, *, directory: str, connecting: Iterable[Connecting], timeout_s: float
) -> dict[str, Chardev]:
    """Ask for the chardevs at unix sockets, by label: whether the guest has their ports open."""
    told = await monitor.execute("query-chardev", timeout_s=timeout_s)
    return parse_chardevs(told, directory, connecting)


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
    monitor: Monitor, devices: tuple[Device, ...], chardevs: Mapping[str, Chardev], timeout_s: float
) -> tuple[tuple[Port, ...], frozenset[Chardev]]:
    serial = [device for device in devices if device.is_serial_port][:MAX_PORTS]
    if not serial:
        return (), frozenset()
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


def _by_our_command(data: Mapping[str, object]) -> bool:
    return data.get("reason") == "host-qmp-system-reset" and data.get("guest") is False


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
