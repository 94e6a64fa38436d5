# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports plugged into, and out of, running bare QEMUs by QMP.

QEMU need not be able to create a socket of ours: it gets one that is bound already, as a descriptor, and
listens on it itself. So who connects sees QEMU's pid behind it (SO_PEERCRED names who called listen()), as
with any other port, and the directory stays root's.

Nothing here keeps a state: what we plugged in bears ids of ours, so that it is found again after a restart, a
time-out or a crash in the middle.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from vmchannel_host.hypervisors import HypervisorError, PlugError, Plugged, PlugProblem
from vmchannel_host.hypervisors.instances import InstanceTable, Watched
from vmchannel_host.hypervisors.monitors import CommandRefused, MonitorMute, QmpSession
from vmchannel_host.hypervisors.plug_words import (
    CONTROLLER_ID,
    MAX_PATH,
    PORT_ID,
    free_id,
    is_ours,
    moving_problem,
    parse_empty_slots,
    port_id,
    socket_path,
    start_arguments,
)
from vmchannel_host.hypervisors.qemu_ports import Qemu, SerialPort
from vmchannel_host.hypervisors.qmp_state import NAMED, Device
from vmchannel_host.model import PortName, ProcessIdentity, VmUuid

UNDO_S: Final = 2.0
"""How long undoing a failed attach may take, seconds, also when its time is over."""

_log = logging.getLogger(__name__)


class Plugging:
    """Attaches and detaches ports of the instances that are watched."""

    def __init__(
        self,
        table: InstanceTable,
        sockets: str,
        directory: Callable[[int], str],
        look: Callable[[ProcessIdentity], None],
    ) -> None:
        """
        Args:
            table: the instances.
            sockets: the directory for the sockets; made at need, for this user only.
            directory: the working directory of a process, where its relative paths begin.
            look: has the ports of an instance asked for anew; QEMU sends no event of a new one.
        """
        self._table = table
        self._sockets = sockets
        self._directory = directory
        self._look = look

    async def attach(self, vm: VmUuid, port: PortName, *, timeout_s: float) -> Plugged:
        """See `Hypervisor.attach_port`."""
        async with self._talking(vm, timeout_s) as qemu:
            present = await qemu.ports(port)
            if present and present[0].label not in await qemu.chardevs():
                reason = f"it has a port named {port!r} whose chardev is no unix socket that is known"
                raise PlugError(PlugProblem.UNSUITABLE, reason, "give the port such a chardev, or detach it")
            if not present:
                await self._plug_in(qemu, vm, port)
            kept = bool(present) and not is_ours(present[0].device)
            return Plugged(not present, (port,), () if kept else await _advice(qemu, port))

    async def detach(self, vm: VmUuid, port: PortName | None, *, force: bool, timeout_s: float) -> Plugged:
        """See `Hypervisor.detach_port`."""
        async with self._talking(vm, timeout_s) as qemu:
            found = await qemu.ports(port)
            ours = [one for one in found if is_ours(one.device)]
            others = [one for one in found if one not in ours] if port is not None else []
            if others and not force:
                raise PlugError(
                    PlugProblem.NOT_OURS,
                    "the VM was started with that port",
                    "take it out of the VM's start command; `--force` takes it away until the next start",
                )
            for one in (*ours, *others):
                await _pull_out(qemu, one)
                self._forget_socket(vm, PortName(one.name))
            await _drop_leftovers(qemu, port)
            advice = ("the VM's start command still has it: its next start brings it back",) if others else ()
            return Plugged(
                bool(ours or others), tuple(PortName(one.name) for one in (*ours, *others)), advice
            )

    @asynccontextmanager
    async def _talking(self, vm: VmUuid, timeout_s: float) -> AsyncGenerator[Qemu, None]:
        """The VM's one QEMU, when it does not migrate; its ports are asked for anew afterwards."""
        watched = self._instance(vm)
        if not isinstance(watched.monitor, QmpSession) or watched.mute:
            reason = f"no monitor of {watched.identity} answers"
            raise PlugError(PlugProblem.NO_MONITOR, reason, "see `vmchannelctl doctor`")
        directory = self._directory(watched.identity.pid)
        qemu = Qemu(watched.monitor, timeout_s, directory, watched.connecting)
        try:
            await _check_state(qemu)
            yield qemu
        except HypervisorError as error:
            raise _as_problem(error) from error
        finally:
            self._look(watched.identity)

    def _instance(self, vm: VmUuid) -> Watched:
        found = [one for one in self._table.all() if one.identity.vm_uuid == vm and not one.process.ended()]
        if not found:
            reason = "it does not run here, and a bare QEMU has no definition to write a port into"
            remedy = "add the port to its start command (docs/operations.md, What a VM needs)"
            raise PlugError(PlugProblem.NOT_RUNNING, reason, remedy)
        if len(found) > 1:
            reason = f"{len(found)} processes of it run here: a migration, or a doubt about identity"
            raise PlugError(PlugProblem.BUSY, reason, "wait until one is left; see `vmchannelctl vms`")
        return found[0]

    # in

    async def _plug_in(self, qemu: Qemu, vm: VmUuid, port: PortName) -> None:
        ident, path = port_id(port), socket_path(self._sockets, vm, port)
        try:
            await self._listen(qemu, ident, path)
            await _add_port(qemu, ident, port)
        except HypervisorError as error:
            left = await self._undo(qemu, ident, path)
            problem = _as_problem(error)
            raise PlugError(problem.problem, f"{problem}{left}", problem.remedy) from error

    async def _listen(self, qemu: Qemu, ident: str, path: str) -> None:
        """Add the chardev: a unix socket on which QEMU listens."""
        if ident in await qemu.chardevs():  # left over from an attach that was cut short
            await qemu.execute("chardev-remove", {"id": ident})
        with self._bound(path) as bound:
            await qemu.monitor.give_fd(ident, bound.fileno(), timeout_s=qemu.left_s)
            address = {"type": "fd", "data": {"str": ident}}
            data = {"addr": address, "server": True, "wait": False}
            try:
                await qemu.execute("chardev-add", {"id": ident, "backend": {"type": "socket", "data": data}})
            except CommandRefused:
                with suppress(CommandRefused):  # QEMU has taken it out already
                    await qemu.execute("closefd", {"fdname": ident})
                raise

    def _bound(self, path: str) -> socket.socket:
        if len(os.fsencode(path)) > MAX_PATH:
            reason = f"{path}: longer than a unix socket's path may be ({MAX_PATH} bytes)"
            raise PlugError(PlugProblem.FAILED, reason, "set a shorter `paths.run` in host.yaml")
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            os.makedirs(self._sockets, mode=0o700, exist_ok=True)
            with suppress(FileNotFoundError):
                os.unlink(path)  # of a QEMU that has ended: no process of the VM has this port
            bound.bind(path)
        except OSError as error:
            bound.close()
            reason = f"{path}: {error.strerror or error}"
            raise PlugError(PlugProblem.FAILED, reason, "see `paths.run` in host.yaml") from error
        return bound

    async def _undo(self, qemu: Qemu, ident: str, path: str) -> str:
        """Take away what a failed attach has added; returns what is left, as the end of a sentence."""
        qemu.extend(UNDO_S)
        device = Device(f"{NAMED}/{ident}", "child<virtserialport>")
        try:
            with suppress(CommandRefused):  # there is none
                await _pull_device(qemu, device)
            with suppress(CommandRefused):
                await qemu.execute("chardev-remove", {"id": ident})
        except HypervisorError as error:
            _log.warning("cannot undo a failed attach: %s", error)
            return f"; what was added before is not known to be gone ({ident})"
        with suppress(OSError):
            os.unlink(path)
        return ""

    def _forget_socket(self, vm: VmUuid, port: PortName) -> None:
        """QEMU cannot remove it where only root may."""
        with suppress(OSError):
            os.unlink(socket_path(self._sockets, vm, port))


async def _check_state(qemu: Qemu) -> None:
    run_state, migration = await qemu.monitor.run_state(timeout_s=qemu.left_s)
    if problem := moving_problem(run_state, migration):
        raise PlugError(PlugProblem.MIGRATING, problem, "wait for its end")


async def _add_port(qemu: Qemu, ident: str, port: PortName) -> None:
    """Add the port to the first controller that takes it: QEMU knows best which has a free slot."""
    wanted = {"driver": "virtserialport", "id": ident, "chardev": ident, "name": port}
    refusals: list[str] = []
    for bus in await qemu.buses():
        try:
            await qemu.execute("device_add", {**wanted, "bus": bus})
        except CommandRefused as refused:
            refusals.append(str(refused))
            continue
        return
    bus = await _add_controller(qemu, refusals)
    # Should this be refused, the empty controller stays for the next attach: QEMU takes a PCI device away
    # when the guest agrees, perhaps much later, and with it whatever was plugged into it meanwhile.
    await qemu.execute("device_add", {**wanted, "bus": bus})


async def _add_controller(qemu: Qemu, refusals: list[str]) -> str:
    """Add a virtio-serial controller; returns its bus."""
    ident = free_id(await qemu.devices())
    try:
        slots = parse_empty_slots(await qemu.execute("query-pci"))
    except CommandRefused:  # a machine without PCI
        slots = ()
    told = list(refusals)
    for slot in ("", *slots):  # "": where QEMU puts it; the root bus of a q35 takes nothing while it runs
        arguments = {"driver": "virtio-serial", "id": ident} | ({"bus": slot} if slot else {})
        try:
            await qemu.execute("device_add", arguments)
        except CommandRefused as refused:
            told.append(str(refused))
            continue
        return f"{ident}.0"
    why = (
        "its virtio-serial controllers take no other port"
        if refusals
        else "it has no virtio-serial controller"
    )
    raise PlugError(
        PlugProblem.NO_SLOT,
        f"{why}, and none can be plugged in: {told[-1]}",
        "start it with `-device virtio-serial`, or with a slot for one: `-device pcie-root-port,id=ID`",
    )


async def _pull_out(qemu: Qemu, port: SerialPort) -> None:
    await _pull_device(qemu, port.device)
    if port.label:
        try:
            await qemu.execute("chardev-remove", {"id": port.label})
        except CommandRefused as error:
            _log.warning("the port is gone, its chardev stays: %s", error)


async def _pull_device(qemu: Qemu, device: Device) -> None:
    """A port is gone at once, unlike a PCI device: its guest is told, not asked."""
    with qemu.monitor.tap("DEVICE_DELETED") as tap:
        await qemu.execute("device_del", {"id": device.path})
        try:
            async with asyncio.timeout(qemu.left_s):
                await tap.wait_for(lambda data: data.get("path") == device.path)
        except TimeoutError as error:
            raise MonitorMute(f"{qemu.monitor.path}: no DEVICE_DELETED for {device.path}") from error


async def _drop_leftovers(qemu: Qemu, port: PortName | None) -> None:
    """Chardevs of ours that no port uses, of an attach that was cut short."""
    for label in await qemu.chardevs():
        if label.startswith(PORT_ID) if port is None else label == port_id(port):
            await qemu.execute("chardev-remove", {"id": label})


async def _advice(qemu: Qemu, port: PortName) -> tuple[str, ...]:
    """A bare QEMU forgets what was plugged in."""
    path = f"{qemu.monitor.path}.vmchannel"  # where QEMU could make a socket, it can make another
    own = [bus for bus in await qemu.buses() if not bus.startswith(CONTROLLER_ID)]
    return (
        "it is there until the VM ends; for its next start, add to its start command:",
        start_arguments(port, path, controller=not own),
    )


def _as_problem(error: HypervisorError) -> PlugError:
    if isinstance(error, PlugError):
        return error
    if isinstance(error, MonitorMute):
        return PlugError(PlugProblem.DEADLINE, f"unknown: {error}", "do it again: that is safe")
    return PlugError(PlugProblem.FAILED, str(error), "mend what it names; doing it again is safe")
