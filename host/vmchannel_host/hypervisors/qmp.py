# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP sockets of bare QEMU as a source: found by globs, each followed, whoever is behind it."""

from __future__ import annotations

import asyncio
import glob
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from vmchannel_host.globs import matches_glob
from vmchannel_host.hypervisors.follower import SocketFollower, Timings
from vmchannel_host.hypervisors.process import VerifiedProcess
from vmchannel_host.hypervisors.process_watch import ProcessWatch
from vmchannel_host.hypervisors.source import Answer, Conflict
from vmchannel_host.model import ProcessIdentity, SocketMode, VmUuid

log = logging.getLogger(__name__)

MAX_SOCKETS = 4096
"""QMP sockets followed; further matches of the globs are ignored with a warning."""


@dataclass(frozen=True, slots=True)
class QmpSettings:
    """What the configuration says of `qmp`."""

    sockets: tuple[str, ...] = ()  # globs of QMP socket paths
    ask_s: float = 1.0  # how long a look waits for each monitor
    timings: Timings = field(default_factory=Timings)


class QmpSockets:
    """Implements `Source`."""

    def __init__(self, settings: QmpSettings, watch: ProcessWatch) -> None:
        self._settings = settings
        self._watch = watch
        self._followers: dict[str, tuple[SocketFollower, asyncio.Task[None]]] = {}
        self._sockets: Mapping[str, tuple[int, int]] = MappingProxyType({})

    def leads_to(self, pid: int, sockets: tuple[str, ...]) -> bool:
        """Whether a socket on a command line is one that the configuration names, there or removed since."""
        if not sockets:
            return False
        directory = "" if all(map(os.path.isabs, sockets)) else self._watch.directory(pid)
        paths = [os.path.normpath(os.path.join(directory, path)) for path in sockets]
        return any(matches_glob(path, pattern) for path in paths for pattern in self._settings.sockets)

    async def find(self, *, timeout_s: float) -> None:
        """Start a follower for each new path, drop those whose path is gone and that hold no connection."""
        found = await self._watch.calls.call("find sockets", self._find_sockets, timeout_s=timeout_s)
        if not self._watch.runs:
            return  # a look by processes alone
        ports = self._ports()
        for path in list(self._followers):
            follower, task = self._followers[path]
            if path in found and found[path] != self._sockets.get(path):
                follower.retry_now()
            if task.done() or (path not in found and not follower.connected):
                task.cancel()
                del self._followers[path]
        for path in sorted(found.keys() - self._followers.keys() - ports):
            if len(self._followers) >= MAX_SOCKETS:
                log.warning("more than %d QMP sockets: %r is not followed", MAX_SOCKETS, path)
                break
            follower = self._follower(path)
            self._followers[path] = (follower, self._watch.spawn(follower.run(), f"follow {path}"))
        self._sockets = found

    def look_at_ports(self, identity: ProcessIdentity) -> None:
        """See `Source`."""
        for follower, _ in self._followers.values():
            follower.look_at_ports(identity)

    async def ask(self, vm: VmUuid | None, *, deadline: float) -> Answer:
        """Ask all at the same time; mute ones together cost `ask_s`."""
        loop = asyncio.get_running_loop()
        followers = [follower for follower, _ in self._followers.values()]
        until = min(deadline, loop.time() + self._settings.ask_s)
        try:
            async with asyncio.timeout_at(until):
                for follower in followers:
                    await follower.attempted.wait()  # a daemon that has just started
        except TimeoutError:
            log.debug("some monitors have not been tried yet")
        timeout_s = min(self._settings.ask_s, max(deadline - loop.time(), 0.05))
        async with asyncio.TaskGroup() as tasks:
            for follower in followers:
                if follower.connected and (vm is None or follower.follows(vm)):
                    tasks.create_task(follower.refresh(timeout_s=timeout_s), name=f"refresh {follower.path}")
        return Answer()  # a mute monitor leaves its process, whose state is unknown then

    def conflicts(self) -> Iterable[Conflict]:
        """Monitors that contradict their process."""
        return [
            follower.conflict for follower, _ in self._followers.values() if follower.conflict is not None
        ]

    async def discard_memory(self, vm: VmUuid, *, timeout_s: float) -> tuple[str, ...]:
        """A bare QEMU has no saved memory of which anything here knows."""
        return ()

    def _find_sockets(self) -> dict[str, tuple[int, int]]:
        """Path to (inode, change time) of each QMP socket that the globs match. Blocks."""
        found: dict[str, tuple[int, int]] = {}
        for pattern in self._settings.sockets:
            for path in glob.iglob(pattern):
                try:
                    status = os.stat(path)
                except OSError:
                    continue
                if stat.S_ISSOCK(status.st_mode):
                    found[path] = (status.st_ino, status.st_ctime_ns)
        return found

    def _ports(self) -> frozenset[str]:
        """Where ports are, and so no monitors.

        That a QEMU connects to a path does not say so if another one's command line names it too: whoever
        writes a VM's command line must not hide another one's monitor.
        """
        listened_at: set[str] = set()
        connected_to: set[str] = set()
        named: set[str] = set()
        for watched in self._watch.table.all():
            for port in watched.instance().ports:
                (listened_at if port.mode is SocketMode.BIND else connected_to).add(port.chardev_path)
            command = watched.process.command
            others = set(command.sockets) - {one.path for one in command.connecting}
            directory = "" if all(map(os.path.isabs, others)) else self._watch.directory(watched.identity.pid)
            named |= {os.path.normpath(os.path.join(directory, path)) for path in others}
        return frozenset(listened_at | (connected_to - named))

    async def _identify(self, pid: int) -> VerifiedProcess:
        return await self._watch.identify(pid, timeout_s=self._settings.timings.command_s)

    def _follower(self, path: str) -> SocketFollower:
        return SocketFollower(
            path,
            self._watch.table,
            identify=self._identify,
            adopt=self._watch.adopt,
            on_close=self._watch.rescan.set,
            directory=self._watch.directory,
            timings=self._settings.timings,
        )
