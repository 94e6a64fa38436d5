# SPDX-License-Identifier: LGPL-2.1-or-later
"""Doubts about the identity of a VM (S9), found in what is known of its instances. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from vmchannel_host.model import NIL_UUID, VmUuid
from vmchannel_host.registry.instance_state import InstanceState
from vmchannel_host.registry.vm_history import Process, VmHistory


class ConflictKind(Enum):
    """What is doubtful about the identity of a VM (S9)."""

    NIL_UUID = "nil-uuid"  # QEMU without -uuid
    TWO_NAMES = "two-names"  # one UUID, two names, no watched migration that joins them
    TWO_INSTANCES = "two-instances"  # two processes of one VM, no migration
    CONTRADICTION = "contradiction"  # a report that no sequence of states explains
    LOOK = "look"  # told by the hypervisor's look


@dataclass(frozen=True, slots=True)
class Conflict:
    """One doubt about identity."""

    kind: ConflictKind
    vm_uuid: VmUuid | None  # None: told by a look, of no single VM
    text: str  # a sentence for people, names all concerned

    @property
    def refuses(self) -> bool:
        """Whether no fence of the VM may be tried. Two instances of one name are both fenced instead (S2)."""
        return self.kind in (ConflictKind.NIL_UUID, ConflictKind.TWO_NAMES)


def find_conflicts(vm: VmUuid, history: VmHistory) -> Iterator[Conflict]:
    """The conflicts among a VM's instances that were seen and whose end is not proven.

    Processes known from the records only do not count: most of them ended while the daemon was down.
    """
    seen = [process for process in history.unproven() if process.instance is not None]
    if vm == NIL_UUID:
        if seen:
            text = f"a VM without a UUID is none: {_list(seen)} runs without -uuid and cannot be fenced"
            yield Conflict(ConflictKind.NIL_UUID, vm, text)
        return
    names = sorted({process.name for process in seen if process.name})
    if len(names) > 1 and not _joined(seen):
        both = " and ".join(map(repr, names[:_SHOWN]))
        text = f"VM {vm} has two names, {both}, and no watched migration joins them: {_list(seen)}"
        yield Conflict(ConflictKind.TWO_NAMES, vm, text)
    settled = [process for process in seen if process.state not in _MIGRATING]
    if len(settled) > 1:
        text = f"VM {vm} has several instances and no migration between them: {_list(settled)}"
        yield Conflict(ConflictKind.TWO_INSTANCES, vm, text)
    for process in seen:
        if process.contradiction:
            text = f"VM {vm}: {process.identity} reports what cannot be: {process.contradiction}"
            yield Conflict(ConflictKind.CONTRADICTION, vm, text)


_SENDING = (InstanceState.OUTGOING, InstanceState.POSTMIGRATE)
_MIGRATING = (*_SENDING, InstanceState.INCOMING)
_SHOWN = 5  # instances named in one sentence


def _joined(processes: Sequence[Process]) -> bool:
    """Whether each is an end of a migration that was watched, and both ends are there."""
    sources = [process for process in processes if process.state in _SENDING]
    arrivals = [process for process in processes if process.state not in _SENDING and process.arrived]
    return bool(sources) and bool(arrivals) and len(sources) + len(arrivals) == len(processes)


def _list(processes: Sequence[Process]) -> str:
    shown = [f"{one.name!r} in {one.identity}, {one.state.value}" for one in processes[:_SHOWN]]
    more = f" and {len(processes) - _SHOWN} more" if len(processes) > _SHOWN else ""
    return "; ".join(shown) + more
