# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hypervisors that behave, and hypervisors that do not: one class for each fault."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from vmchannel_host.hypervisors import (
    BeforeKill,
    CannotStart,
    Definitions,
    Ended,
    HypervisorError,
    HypervisorEvent,
    NotProven,
    PlugError,
    Plugged,
    PlugProblem,
    Seen,
)
from vmchannel_host.model import (
    BootId,
    EndCause,
    EndProof,
    HostName,
    Instance,
    InstanceEnded,
    InstanceReset,
    IoState,
    Look,
    Migration,
    PortName,
    ProcessIdentity,
    RunState,
    UnknownProcess,
    VmUuid,
)

HOST = HostName("hv1")
BOOT = BootId("boot-1")
EXECUTABLE = "/usr/bin/qemu-system-x86_64"


class FakeHypervisor:
    """VMs in memory; every action takes `delay_s` and is logged in `acts`."""

    def __init__(self, clock: Callable[[], float], *, delay_s: float = 0.01) -> None:
        self.clock = clock
        self.delay_s = delay_s
        self.instances: dict[ProcessIdentity, Instance] = {}
        self.watched_ends: dict[ProcessIdentity, InstanceEnded] = {}
        self.acts: list[str] = []
        self.looks = 0
        self.silent: tuple[tuple[VmUuid, str], ...] = ()
        self.conflicts: tuple[str, ...] = ()
        self.unknown: tuple[UnknownProcess, ...] = ()
        self.io = IoState.DRAINED
        self.cause = EndCause.QUIT
        self.startable: set[VmUuid] = set()
        self.mute: set[ProcessIdentity] = set()  # monitors that do not answer
        self.saved: dict[VmUuid, bool] = {}  # VMs with saved memory, and whether it can be removed
        self.boot_s = 0.5  # from start to running
        self.plugged: dict[VmUuid, set[PortName]] = {}  # ports that were attached
        self.defined = Definitions({})
        self.plug_fails: PlugError | None = None
        self._next_pid = 100
        self._events: asyncio.Queue[HypervisorEvent] = asyncio.Queue()
        self._acts_begun: dict[str, asyncio.Event] = {}

    # what a test does to it

    def add(
        self,
        vm: VmUuid,
        name: str,
        *,
        run_state: RunState = RunState.RUNNING,
        migration: Migration = Migration.NONE,
        resettable: bool = True,
        noticed: bool = True,
    ) -> ProcessIdentity:
        """A new process of a VM; without an event when it is not `noticed`."""
        self._next_pid += 1
        identity = ProcessIdentity(self._next_pid, self._next_pid * 10, EXECUTABLE, vm, BOOT)
        instance = Instance(identity, name, run_state, migration, resettable=resettable)
        self.instances[identity] = instance
        if noticed:
            self.change(instance)
        return identity

    def change(self, instance: Instance) -> None:
        """An instance appears, or changes."""
        self.instances[instance.identity] = instance
        self._events.put_nowait(Seen(instance))

    def vanish(self, identity: ProcessIdentity, *, watched: bool, io: IoState = IoState.DRAINED) -> None:
        """The process ends without us."""
        instance = self.instances.pop(identity)
        if watched:
            departed = instance.migration in (Migration.OUTGOING, Migration.COMPLETED)
            end = InstanceEnded(HOST, identity, EndProof.PIDFD, EndCause.NONE, io, departed, elapsed_ms=0)
            self.watched_ends[identity] = end
            self._events.put_nowait(Ended(end))

    def absence(self, identity: ProcessIdentity) -> EndProof | None:
        """What a process table says of a recorded process."""
        if identity.boot_id != BOOT:
            return EndProof.OTHER_BOOT
        return None if identity in self.instances else EndProof.ABSENT

    def note(self, act: str) -> None:
        """Something is being done: its name, a blank, to what."""
        self.acts.append(act)
        self._begun(act.split()[0]).set()

    async def begun(self, act: str) -> None:
        """Wait until it was first told to do that ("off", "reset", "start", "look")."""
        await self._begun(act).wait()

    def _begun(self, act: str) -> asyncio.Event:
        return self._acts_begun.setdefault(act, asyncio.Event())

    def count(self, act: str) -> int:
        """How often something was done."""
        return sum(one.split()[0] == act for one in self.acts)

    # the protocol

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def events(self) -> AsyncIterator[HypervisorEvent]:
        while True:
            yield await self._events.get()

    def look_at_ports(self, identity: ProcessIdentity) -> None:
        """Its ports never change."""

    def interruptions(self, identity: ProcessIdentity) -> int:
        instance = self.instances.get(identity)
        return instance.interruptions if instance is not None else -1

    async def catch_up(self, identity: ProcessIdentity, *, timeout_s: float) -> None:
        await asyncio.sleep(self.delay_s)
        if identity not in self.instances or identity in self.mute:
            raise HypervisorError("no monitor tells what happened to it")

    async def look(self, *, timeout_s: float, vm: VmUuid | None = None, monitors: bool = True) -> Look:
        self.looks += 1
        self._begun("look").set()
        at = self.clock()
        await asyncio.sleep(self.delay_s)
        saved = tuple((vm_uuid, "a managed save of it exists") for vm_uuid in self.saved)
        silent = self.silent + saved
        return Look(HOST, at, tuple(self.instances.values()), silent, self.conflicts, self.unknown)

    async def discard_memory(self, vm: VmUuid, *, timeout_s: float) -> tuple[str, ...]:
        if not self.saved.get(vm, False):
            return ()
        self.note(f"discard {vm}")
        del self.saved[vm]
        return ("managed save removed",)

    async def off(
        self,
        identity: ProcessIdentity,
        *,
        quit_timeout_s: float,
        timeout_s: float,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        self.note(f"off {identity.pid}")
        if before_kill is not None and self.cause is EndCause.KILL and self.io is not IoState.NONE:
            await before_kill()
        await asyncio.sleep(self.delay_s)
        return self.end(identity)

    def end(self, identity: ProcessIdentity) -> InstanceEnded:
        """End a process and prove it."""
        instance = self.instances.pop(identity, None)
        if instance is None:
            watched = self.watched_ends.get(identity)
            return watched or InstanceEnded(
                HOST, identity, EndProof.ABSENT, EndCause.NONE, IoState.UNPROVEN, departed=False, elapsed_ms=0
            )
        departed = instance.migration in (Migration.OUTGOING, Migration.COMPLETED)
        end = InstanceEnded(HOST, identity, EndProof.PIDFD, self.cause, self.io, departed, elapsed_ms=13)
        self.watched_ends[identity] = end
        self._events.put_nowait(Ended(end))
        return end

    async def reset(self, identity: ProcessIdentity, *, timeout_s: float) -> InstanceReset:
        self.note(f"reset {identity.pid}")
        await asyncio.sleep(self.delay_s)
        instance = self.instances.get(identity)
        if instance is None or instance.run_state is not RunState.RUNNING:
            raise HypervisorError("not running")
        return InstanceReset(HOST, identity, elapsed_ms=4)

    def can_start(self, vm: VmUuid, name: str) -> bool:
        return vm in self.startable

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        self.note(f"start {name}")
        if vm not in self.startable:
            raise CannotStart("no start command is configured")
        await asyncio.sleep(self.delay_s)
        identity = self.add(vm, name, run_state=RunState.PRELAUNCH)
        asyncio.get_running_loop().call_later(self.boot_s, self._boot, identity)

    def definitions(self) -> Definitions:
        return self.defined

    async def attach_port(self, vm: VmUuid, port: PortName, *, timeout_s: float) -> Plugged:
        ports = await self._plugging(vm, f"attach {port}")
        there = port in ports
        ports.add(port)
        return Plugged(not there, (port,), () if there else ("it is there until the VM ends",))

    async def detach_port(
        self, vm: VmUuid, port: PortName | None, *, force: bool, timeout_s: float
    ) -> Plugged:
        ports = await self._plugging(vm, f"detach {port}")
        gone = tuple(sorted(ports if port is None else ports & {port}))
        ports.difference_update(gone)
        return Plugged(bool(gone), gone)

    async def _plugging(self, vm: VmUuid, act: str) -> set[PortName]:
        self.note(act)
        await asyncio.sleep(self.delay_s)
        if self.plug_fails is not None:
            raise self.plug_fails
        runs = any(identity.vm_uuid == vm for identity in self.instances)
        if not runs and vm not in self.defined.names:
            raise PlugError(PlugProblem.NOT_RUNNING, "it does not run here", "start it")
        return self.plugged.setdefault(vm, set())

    def _boot(self, identity: ProcessIdentity) -> None:
        instance = self.instances.get(identity)
        if instance is not None:
            self.change(replace(instance, run_state=RunState.RUNNING))


class HungHypervisor(FakeHypervisor):
    """`off` of the VMs in `hung` (of all, when it is empty) never returns."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.hung: set[VmUuid] = set()

    async def off(
        self,
        identity: ProcessIdentity,
        *,
        quit_timeout_s: float,
        timeout_s: float,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        if not self.hung or identity.vm_uuid in self.hung:
            self.note(f"off {identity.pid}")
            await asyncio.Event().wait()
        return await super().off(
            identity, quit_timeout_s=quit_timeout_s, timeout_s=timeout_s, before_kill=before_kill
        )


class LateHypervisor(FakeHypervisor):
    """`off` takes `late_s`, longer than it was told to, and then works."""

    late_s = 60.0

    async def off(
        self,
        identity: ProcessIdentity,
        *,
        quit_timeout_s: float,
        timeout_s: float,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        self.note(f"off {identity.pid}")
        await asyncio.sleep(self.late_s)
        return self.end(identity)


class FailingHypervisor(FakeHypervisor):
    """`off` says that nothing was proven."""

    async def off(
        self,
        identity: ProcessIdentity,
        *,
        quit_timeout_s: float,
        timeout_s: float,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        self.note(f"off {identity.pid}")
        raise NotProven("the process does not end")


class LyingHypervisor(FakeHypervisor):
    """`off` shows a proof, but the process goes on."""

    async def off(
        self,
        identity: ProcessIdentity,
        *,
        quit_timeout_s: float,
        timeout_s: float,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        self.note(f"off {identity.pid}")
        return InstanceEnded(
            HOST, identity, EndProof.PIDFD, EndCause.QUIT, IoState.DRAINED, departed=False, elapsed_ms=1
        )


class MixedUpHypervisor(FakeHypervisor):
    """`off` proves the end of another process than the one that was named."""

    async def off(
        self,
        identity: ProcessIdentity,
        *,
        quit_timeout_s: float,
        timeout_s: float,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        self.note(f"off {identity.pid}")
        other = replace(identity, pid=identity.pid + 1)
        return InstanceEnded(
            HOST, other, EndProof.PIDFD, EndCause.QUIT, IoState.DRAINED, departed=False, elapsed_ms=1
        )


class ForgetfulHypervisor(FakeHypervisor):
    """Looks answer from memory: what was seen before they were asked for."""

    async def look(self, *, timeout_s: float, vm: VmUuid | None = None, monitors: bool = True) -> Look:
        self.looks += 1
        self._begun("look").set()
        return Look(HOST, self.clock() - 1.0, (), ())


class BlindHypervisor(FakeHypervisor):
    """Looks fail."""

    async def look(self, *, timeout_s: float, vm: VmUuid | None = None, monitors: bool = True) -> Look:
        raise HypervisorError("/proc cannot be read")


class ForkingHypervisor(FakeHypervisor):
    """During its first look a VM is started that makes itself a daemon: what was listed forks and leaves."""

    forks = ""  # the VM's name; "" when none is started
    vm = VmUuid("")

    async def look(self, *, timeout_s: float, vm: VmUuid | None = None, monitors: bool = True) -> Look:
        if not self.forks:
            return await super().look(timeout_s=timeout_s, vm=vm, monitors=monitors)
        name, self.forks = self.forks, ""
        at = self.clock()
        first = self.add(self.vm, name, run_state=RunState.UNKNOWN, migration=Migration.UNKNOWN)
        await asyncio.sleep(self.delay_s)
        self.add(self.vm, name, noticed=False)
        self.vanish(first, watched=True)
        await asyncio.sleep(self.delay_s)
        return Look(HOST, at, ())


class RevivingHypervisor(FakeHypervisor):
    """Somebody else starts the VM again, `lives` times, as soon as it is off."""

    lives = 2

    def end(self, identity: ProcessIdentity) -> InstanceEnded:
        instance = self.instances.get(identity)
        end = super().end(identity)
        if instance is not None and self.lives > 0:
            self.lives -= 1
            self.add(instance.vm_uuid, instance.name)
        return end


class MigratingHypervisor(FakeHypervisor):
    """The VM migrates away between the request and the action."""

    def end(self, identity: ProcessIdentity) -> InstanceEnded:
        instance = self.instances.get(identity)
        if instance is not None:
            self.instances[identity] = replace(
                instance, run_state=RunState.POSTMIGRATE, migration=Migration.COMPLETED
            )
        return super().end(identity)


class UnresettableHypervisor(FakeHypervisor):
    """`system_reset` brings no RESET event."""

    async def reset(self, identity: ProcessIdentity, *, timeout_s: float) -> InstanceReset:
        self.note(f"reset {identity.pid}")
        await asyncio.sleep(timeout_s)
        raise HypervisorError("no RESET event")


class SecondCopyHypervisor(FakeHypervisor):
    """While the VM is being reset, a second copy of it appears."""

    async def reset(self, identity: ProcessIdentity, *, timeout_s: float) -> InstanceReset:
        self.add(identity.vm_uuid, self.instances[identity].name, run_state=RunState.PAUSED)
        return await super().reset(identity, timeout_s=timeout_s)


class SlowStartHypervisor(FakeHypervisor):
    """The start command takes `start_s`; only then is there a process."""

    start_s = 3.0

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        self.note(f"start {name}")
        await asyncio.sleep(self.start_s)
        self.add(vm, name)


class BarrenHypervisor(FakeHypervisor):
    """The start command says that it worked, and nothing comes of it."""

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        self.note(f"start {name}")


class BreakingStartHypervisor(FakeHypervisor):
    """The start command fails."""

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        self.note(f"start {name}")
        raise CannotStart("exit status 1: no such disk")
