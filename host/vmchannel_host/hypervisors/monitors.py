# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tells of one instance and carries out commands on it: a QMP session, or libvirt's word of a domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.model import Migration, RunState


class MonitorError(HypervisorError):
    """The monitor is of no use now."""


class MonitorMute(MonitorError):
    """No answer in time: who should answer is stopped or hung, or talks to another client."""


class MonitorClosed(MonitorError):
    """Nobody listens, or the connection ended."""


class NobodyListens(MonitorClosed):
    """There is no socket at the path, or no process behind it."""


class CommandRefused(MonitorError):
    """It answered with an error."""


class InstanceMonitor(Protocol):
    """Tells of one instance. A monitor that is closed is never opened again: another one takes its place."""

    @property
    def path(self) -> str:
        """What people call it: the path of a QMP socket, or libvirt's URI."""
        ...

    @property
    def open(self) -> bool:
        """Whether it still tells."""
        ...

    @property
    def ends_with_process(self) -> bool:
        """Whether its stream ends with the process, come what may.

        Then a stream that does not end holds something back, which may be that a migration completed. What
        tells through a third program proves nothing by its silence: the last that was watched counts (S1).
        """
        ...

    async def wait_closed(self) -> None:
        """Wait until it has told everything."""
        ...

    async def quit(self, *, timeout_s: float) -> None:
        """Have QEMU drain its I/O and leave. Returns when it has said that it does.

        Raises:
            CommandRefused: it does not.
            MonitorError: nobody said so; it may be done nevertheless.
        """
        ...

    async def run_state(self, *, timeout_s: float) -> tuple[RunState, Migration]:
        """Ask afresh. All that happened before was told when this returns.

        Raises:
            MonitorError: no answer.
        """
        ...

    async def resettable(self, *, timeout_s: float) -> bool:
        """Ask whether `reset` may prove a reboot: no device keeps state that it does not reach (S8).

        Raises:
            MonitorError: no answer.
        """
        ...

    async def reset(self, *, timeout_s: float) -> None:
        """Carry out `system_reset`; return when it has returned and its own RESET event was told (S8).

        Raises:
            MonitorError: no proof; it may be done nevertheless.
            TimeoutError: the same.
        """
        ...


class Tap(Protocol):
    """The events of one name, from some moment on."""

    async def wait_for(self, wanted: Callable[[Mapping[str, object]], bool]) -> None:
        """Wait for the first of which `wanted` says so, from its data."""
        ...


@runtime_checkable
class QmpSession(InstanceMonitor, Protocol):
    """A monitor through which any command can be given: ports are plugged by it.

    Known by its methods, not by its class: on a host without bare QEMU the QMP library may be missing.
    """

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float
    ) -> object:
        """Send a command and wait at most `timeout_s` seconds for its reply.

        Raises:
            CommandRefused: QEMU answered with an error.
            MonitorError: no reply. The command may still be carried out, at any time.
        """
        ...

    async def give_fd(self, name: str, fd: int, *, timeout_s: float) -> None:
        """Hand QEMU a copy of a file descriptor, under a name that a command can use once.

        Raises: as `execute`.
        """
        ...

    def tap(self, name: str) -> AbstractContextManager[Tap]:
        """Collect the events of that name that arrive from now on."""
        ...
