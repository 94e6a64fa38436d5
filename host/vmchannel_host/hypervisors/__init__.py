# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hypervisors: what runs VMs on this host, each behind the same small protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeAlias

from vmchannel_host.model import (
    Instance,
    InstanceEnded,
    InstanceReset,
    Look,
    PortName,
    ProcessIdentity,
    VmUuid,
)


class HypervisorError(Exception):
    """An action could not be carried out, or its effect could not be proven. Unknown is failure (S1)."""


class NotProven(HypervisorError):
    """The deadline passed without proof."""


class CannotStart(HypervisorError):
    """No way is known, or left, to start the VM here."""


class PlugProblem(Enum):
    """Why a port was not attached or detached; the values are words of the admin API."""

    NOT_RUNNING = "not_running"  # no process of the VM runs here, so there is nothing to plug into
    BUSY = "busy"  # a fence, another plugging, several instances
    MIGRATING = "migrating"  # what is plugged into one end of a migration is missing at the other
    AMBIGUOUS = "ambiguous"  # two libvirts define it
    NO_MONITOR = "no_monitor"  # nobody there to ask
    UNSUPPORTED = "unsupported"  # what runs it gives us no way to plug
    NO_SLOT = "no_slot"  # no controller takes another port, and none can be added
    NOT_OURS = "not_ours"  # the VM was started, or defined, with that port
    UNSUITABLE = "unsuitable"  # a port of that name is there and cannot be served
    FAILED = "failed"  # the hypervisor refused; what was added is taken away again
    DEADLINE = "deadline"  # no answer in time: what was done is unknown; doing it again is safe


class PlugError(HypervisorError):
    """A port was not attached or detached.

    Attributes:
        problem: why.
        remedy: what to do about it; "" when there is nothing to say.
    """

    def __init__(self, problem: PlugProblem, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Plugged:
    """What became of an `attach_port` or `detach_port` that succeeded."""

    changed: bool  # False: it was so already
    ports: tuple[PortName, ...]  # that are there now (attach), or were taken away (detach)
    advice: tuple[str, ...] = ()  # what is left to do by hand, for people, a line each


@dataclass(frozen=True, slots=True)
class Definitions:
    """The VMs that have a persistent definition here, whether they run or not."""

    names: Mapping[VmUuid, str]  # untrusted text; the same object while it is true
    problems: tuple[str, ...] = ()  # for people: what may define further VMs, and does not tell


@dataclass(frozen=True, slots=True)
class Seen:
    """An instance appeared or changed (run state, ports, migration)."""

    instance: Instance


@dataclass(frozen=True, slots=True)
class Ended:
    """An instance's process has ended, and we watched it end."""

    evidence: InstanceEnded


HypervisorEvent = Seen | Ended

BeforeKill: TypeAlias = Callable[[], Awaitable[None]]
"""Makes durable that a process is about to be killed; when it raises, the SIGKILL is not sent."""


class Hypervisor(Protocol):
    """Runs VMs on this host. No method waits longer than the deadline it is given."""

    async def run(self) -> None:
        """Follow the VMs until cancelled."""
        ...

    def events(self) -> AsyncIterator[HypervisorEvent]:
        """All changes, in order, from the moment of the call. One consumer."""
        ...

    def look_at_ports(self, identity: ProcessIdentity) -> None:
        """Find out soon whether that instance's guest has its ports open: it spoke on one. Does not wait."""
        ...

    def interruptions(self, identity: ProcessIdentity) -> int:
        """`Instance.interruptions`, as far as heard; -1 when the instance is not watched. Does not wait."""
        ...

    async def catch_up(self, identity: ProcessIdentity, *, timeout_s: float) -> None:
        """Hear all that happened to the instance before this call, `interruptions` above all.

        Raises:
            HypervisorError: its monitor does not answer: what happened is unknown.
        """
        ...

    async def look(self, *, timeout_s: float, vm: VmUuid | None = None, monitors: bool = True) -> Look:
        """Scan afresh: processes first, then monitors. Never answered from memory.

        With `vm` only that VM's monitors are asked: which instances of others exist is as fresh,
        but what these do is what was heard of them last. Without `monitors` that holds for all: which
        instances exist, and whose they are, is what is asked, and a mute monitor costs no time.
        """
        ...

    async def off(
        self,
        identity: ProcessIdentity,
        *,
        quit_timeout_s: float,
        timeout_s: float,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        """End one instance: QMP quit, then SIGKILL through the pidfd of the verified process.

        A monitor that is mute does not stop it. Idempotent: an instance that has ended is reported as such.

        Args:
            identity: the process.
            quit_timeout_s: how long `quit` may take, seconds.
            timeout_s: how long all of it may take, seconds.
            before_kill: awaited before the first SIGKILL of a process that may have writes under way. Else a
                daemon that dies after the kill would not know whose end it was (S1). What it raises is
                passed on, and the SIGKILL is not sent.

        Raises:
            NotProven: `timeout_s` passed and the process was not seen to end. It may be alive.
            HypervisorError: the process at that pid is not the one named: nothing was done.
        """
        ...

    async def discard_memory(self, vm: VmUuid, *, timeout_s: float) -> tuple[str, ...]:
        """Remove saved memory from which the VM could be continued (S0); its processes have ended.

        Never fails: what is left, or cannot be seen, makes the VM silent in the next look. Returns what was
        removed, a line for each.
        """
        ...

    async def reset(self, identity: ProcessIdentity, *, timeout_s: float) -> InstanceReset:
        """`system_reset` the one running instance and prove it by its RESET event (S8).

        Raises:
            HypervisorError: not running, migrating, not resettable, no event: nothing is proven. The
                caller goes on with `off` and `start`.
        """
        ...

    def can_start(self, vm: VmUuid, name: str) -> bool:
        """Whether `start` has a way to start that VM here."""
        ...

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        """Run the VM's start command outside the daemon's unit. Its exit proves nothing: look afterwards.

        Raises:
            CannotStart: there is no start command, or it failed; the message carries its last line.
        """
        ...

    def definitions(self) -> Definitions:
        """The VMs that have a definition, as last told. Does not wait."""
        ...

    async def attach_port(self, vm: VmUuid, port: PortName, *, timeout_s: float) -> Plugged:
        """Plug a port into the running VM, and write it into its persistent definition where there is one.

        A VM that is defined and does not run gets it in its definition. Idempotent: a port of that name that
        can be served is left as it is, and one that is in one place only is added to the other. When a step
        fails, what was added before is taken away again.

        Args:
            vm: the VM; refused while more than one process of it runs here, while it migrates, and when it
                neither runs nor is defined.
            port: the name of the port; untrusted text.
            timeout_s: how long all of it may take, seconds; undoing a failure takes 2 s at most beyond it.

        Raises:
            PlugError: it was not attached.
        """
        ...

    async def detach_port(
        self, vm: VmUuid, port: PortName | None, *, force: bool, timeout_s: float
    ) -> Plugged:
        """Take a port away from the running VM and from its persistent definition. Its guest is not asked.

        Idempotent: a port that is not there is gone.

        Args:
            vm: the VM; as for `attach_port`.
            port: the name of the port; None: every port that `attach_port` made.
            force: also a port that the VM was started or defined with. Without, it is refused (NOT_OURS).
            timeout_s: how long all of it may take, seconds.

        Raises:
            PlugError: a port is, or may be, still there.
        """
        ...
