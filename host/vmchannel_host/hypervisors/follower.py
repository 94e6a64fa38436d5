# SPDX-License-Identifier: LGPL-2.1-or-later
"""Follows one QMP socket path for ever: connects, finds out whose it is, keeps its instance up to date.

Contained: whatever one socket does (stall, lie, flood, vanish), only its own instance becomes UNKNOWN.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.instances import InstanceTable, Watched
from vmchannel_host.hypervisors.monitors import CommandRefused, MonitorClosed, MonitorMute, NobodyListens
from vmchannel_host.hypervisors.process import ProcessGone, VerifiedProcess
from vmchannel_host.hypervisors.qmp_monitor import (
    Monitor,
    read_chardevs,
    read_facts,
    read_plugged,
    read_run_state,
    read_uuid,
    watch_migration,
)
from vmchannel_host.hypervisors.source import Conflict
from vmchannel_host.model import Migration, ProcessIdentity, VmUuid

log = logging.getLogger(__name__)

_PORT_EVENTS = frozenset({"VSERPORT_CHANGE", "DEVICE_DELETED"})
_STATE_EVENTS = frozenset(
    {"STOP", "RESUME", "SHUTDOWN", "RESET", "POWERDOWN", "SUSPEND", "SUSPEND_DISK", "WAKEUP", "MIGRATION"}
    | {"GUEST_PANICKED", "GUEST_CRASHLOADED", "WATCHDOG", "BLOCK_IO_ERROR", "MIGRATION_PASS"}
)


@dataclass(frozen=True, slots=True)
class Timings:
    """How long things may take, in seconds."""

    connect_s: float = 2.0  # to the end of QMP's greeting
    command_s: float = 2.0
    poll_s: float = 60.0  # asked again, though no event came (hot-plug of a port has none)
    port_poll_s: float = 1.0  # of ports without an id: QEMU sends no VSERPORT_CHANGE of them
    migration_poll_s: float = 1.0  # while QEMU refuses to send MIGRATION events
    first_retry_s: float = 0.1
    last_retry_s: float = 5.0
    calm_s: float = 0.02  # between two questions, so that a storm of events costs little


class Identify(Protocol):
    """Opens and verifies the process behind a monitor socket, outside the event loop."""

    def __call__(self, pid: int) -> Awaitable[VerifiedProcess]: ...


class SocketFollower:
    """One QMP socket path."""

    def __init__(
        self,
        path: str,
        table: InstanceTable,
        *,
        identify: Identify,
        adopt: Callable[[VerifiedProcess], Watched],
        on_close: Callable[[], None],
        directory: Callable[[int], str],
        timings: Timings,
    ) -> None:
        self.path = path
        self.attempted = asyncio.Event()  # the path has been tried: what can be known is known
        self.conflict: Conflict | None = None
        self.connected = False
        self._table = table
        self._identify = identify
        self._adopt = adopt
        self._on_close = on_close
        self._directory = directory
        self._timings = timings
        self._retry = asyncio.Event()
        self._dirty = asyncio.Event()
        self._ports_dirty = False
        self._migration_watched = False
        self._poll_due = False
        self._watched: Watched | None = None
        self._last_problem = ""

    async def run(self) -> None:
        """Follow the path until cancelled. Never raises an error of the socket."""
        pause_s = self._timings.first_retry_s
        while True:
            try:
                await self._session()
                pause_s = self._timings.first_retry_s
            except HypervisorError as error:
                if isinstance(error, NobodyListens):
                    self.conflict = None
                self._report(error)
                pause_s = min(pause_s * 2, self._timings.last_retry_s)
            except Exception:
                log.exception("following a QMP socket failed path=%s", self.path)
                pause_s = self._timings.last_retry_s
            self.attempted.set()
            await self._wait_retry(pause_s)

    def retry_now(self) -> None:
        """The socket at the path is another one: do not wait for the next attempt."""
        self._retry.set()

    def look_at_ports(self, identity: ProcessIdentity) -> None:
        """Ask for the ports anew if they are that instance's. QEMU may tell of them late, or not at all."""
        if self._watched is not None and self._watched.identity == identity:
            self._ports_dirty = True
            self._dirty.set()

    def follows(self, vm: VmUuid) -> bool:
        """Whether its monitor is that of an instance of the VM."""
        return self._watched is not None and self._watched.identity.vm_uuid == vm

    async def refresh(self, *, timeout_s: float) -> None:
        """Ask run state and migration afresh; no answer makes the instance UNKNOWN. Never raises."""
        watched = self._watched
        if watched is None or watched.monitor is None or watched.facts is None:
            return
        asked_at = watched.migration_events
        try:
            state = await watched.monitor.run_state(timeout_s=timeout_s)
            watched.learn_state(*state, asked_at=asked_at)
        except HypervisorError:
            watched.mute = True
            self._dirty.set()  # the follower's own loop finds out when it answers again
        self._table.changed(watched)

    async def _session(self) -> None:
        monitor = await Monitor.connect(self.path, timeout_s=self._timings.connect_s)
        self.connected = True
        try:
            watched = await self._whose(monitor)
            await self._wait_turn(monitor, watched)
            self.conflict, self._last_problem = None, ""
            await self._follow(monitor, watched)
        except Conflict as conflict:
            self.conflict = conflict
            raise
        finally:
            self.connected = False
            self._detach(monitor)
            await monitor.close()
            self._on_close()

    async def _whose(self, monitor: Monitor) -> Watched:
        """Find the verified process behind the monitor; both must name the same VM."""
        says = await read_uuid(monitor, timeout_s=self._timings.command_s)
        try:
            process = await self._identify(monitor.peer_pid)
        except ProcessGone as error:
            # If it still answers, an heir of the listening socket serves it: which process, nobody can say.
            await monitor.execute("query-status", timeout_s=self._timings.command_s)
            raise Conflict(f"monitor {self.path!r} of VM {says} answers, but {error}", says) from error
        except HypervisorError as error:
            raise Conflict(f"monitor {self.path!r} of VM {says}: {error}", says) from error
        if process.identity.vm_uuid != says:
            process.close()
            mine = process.identity.vm_uuid
            raise Conflict(f"monitor {self.path!r} says VM {says}, its process says VM {mine}", says, mine)
        return self._adopt(process)

    async def _wait_turn(self, monitor: Monitor, watched: Watched) -> None:
        """Stand by while another monitor of the same process is in use."""
        while watched.monitor is not None and watched.monitor.open:
            self.attempted.set()
            async with asyncio.TaskGroup() as tasks:
                waits = [tasks.create_task(m.wait_closed()) for m in (watched.monitor, monitor)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
            if not monitor.open:
                raise MonitorClosed(f"{self.path}: closed")

    async def _follow(self, monitor: Monitor, watched: Watched) -> None:
        watched.attach(monitor)
        self._watched, self._ports_dirty, self._migration_watched = watched, True, False
        monitor.on_event(self._on_event)
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(self._ask_forever(monitor, watched), name=f"ask {self.path}")
            polling = tasks.create_task(self._poll_ports(monitor, watched), name=f"ports {self.path}")
            await monitor.wait_closed()
            asking.cancel()
            polling.cancel()

    async def _ask_forever(self, monitor: Monitor, watched: Watched) -> None:
        while True:
            self._dirty.clear()
            monitor.heard.clear()
            try:
                await self._ask(monitor, watched)
            except MonitorMute:
                watched.mute = True
            except MonitorClosed:
                return  # _follow sees it too
            self._table.changed(watched)
            self.attempted.set()
            await asyncio.sleep(self._timings.calm_s)
            await self._wait_for_news(monitor, watched)

    async def _ask(self, monitor: Monitor, watched: Watched) -> None:
        timeout_s = self._timings.command_s
        if not self._migration_watched:
            try:
                await watch_migration(monitor, timeout_s=timeout_s)
                self._migration_watched = True
            except CommandRefused:
                log.debug("no MIGRATION events yet path=%s", self.path)
        asked_at = watched.migration_events
        if self._poll_due and watched.facts is not None and not watched.mute:
            plugged = await read_plugged(monitor, timeout_s=timeout_s)
            self._ports_dirty = self._ports_dirty or plugged != watched.facts.plugged
        self._poll_due = False
        if self._ports_dirty or watched.facts is None or watched.mute:
            self._ports_dirty = False
            directory = self._directory(watched.identity.pid)
            try:
                facts = await read_facts(
                    monitor, directory=directory, connecting=watched.connecting, timeout_s=timeout_s
                )
                watched.learn(facts, asked_at=asked_at)
            except MonitorMute:
                self._ports_dirty = True
                raise
        else:
            state = await read_run_state(monitor, timeout_s=timeout_s)
            watched.learn_state(*state, asked_at=asked_at)

    async def _wait_for_news(self, monitor: Monitor, watched: Watched) -> None:
        """Wait until there is a reason to ask again."""
        moving = watched.last_migration in (Migration.OUTGOING, Migration.INCOMING)
        polling = moving and not self._migration_watched
        news = monitor.heard if watched.mute else self._dirty
        try:
            async with asyncio.timeout(self._timings.migration_poll_s if polling else self._timings.poll_s):
                await news.wait()
        except TimeoutError:
            self._poll_due = not polling

    async def _poll_ports(self, monitor: Monitor, watched: Watched) -> None:
        """See what QEMU sends no events of: a guest that opens or closes a port without an id."""
        while True:
            await asyncio.sleep(self._timings.port_poll_s)
            facts = watched.facts
            if facts is None or not facts.silent or watched.mute:
                continue
            directory = self._directory(watched.identity.pid)
            try:
                now = await read_chardevs(
                    monitor,
                    directory=directory,
                    connecting=watched.connecting,
                    timeout_s=self._timings.command_s,
                )
            except HypervisorError:
                self._dirty.set()  # the follower's own loop finds out what is wrong
                continue
            if facts.silent != frozenset(now.values()):
                self._ports_dirty = True
                self._dirty.set()

    def _on_event(self, name: str, data: Mapping[str, object]) -> None:
        if self._watched is not None:
            self._watched.hear(name, data)
        if name in _PORT_EVENTS:
            self._ports_dirty = True
        if name in _PORT_EVENTS or name in _STATE_EVENTS:
            self._dirty.set()

    def _detach(self, monitor: Monitor) -> None:
        watched, self._watched = self._watched, None
        if watched is not None and watched.monitor is monitor:
            watched.monitor = None
            self._table.changed(watched)

    def _report(self, error: HypervisorError) -> None:
        """One line when the problem changes, not one for each attempt."""
        text = str(error)
        if text != self._last_problem:
            self._last_problem = text
            level = logging.WARNING if isinstance(error, MonitorMute | Conflict) else logging.INFO
            log.log(level, "QMP socket not usable: %s", text[:500])

    async def _wait_retry(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._retry.wait()
        except TimeoutError:
            return
        finally:
            self._retry.clear()
