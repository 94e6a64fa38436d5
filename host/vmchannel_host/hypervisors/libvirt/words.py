# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt says of a domain, as plain data, and what it means here (pure).

The numbers are those of libvirt's public headers (libvirt-domain.h, libvirt-event.h), which never change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final
from xml.etree import ElementTree

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.model import Migration, Port, PortName, RunState, SocketMode, VmUuid

MAX_XML: Final = 4 * 1024 * 1024
"""Longest domain XML that is read, in characters; libvirt itself refuses more than 4 MiB in a message."""

MAX_PORTS: Final = 256
"""Ports looked at per domain; further ones are ignored."""

SHUTOFF: Final = 5  # VIR_DOMAIN_SHUTOFF
PAUSED: Final = 3  # VIR_DOMAIN_PAUSED
SAVING: Final = 3  # VIR_DOMAIN_PAUSED_SAVE
STARTING_UP: Final = 11  # VIR_DOMAIN_PAUSED_STARTING_UP
DEFINED, UNDEFINED = 0, 1  # VIR_DOMAIN_EVENT_DEFINED, _UNDEFINED
STARTED, STOPPED = 2, 5  # VIR_DOMAIN_EVENT_STARTED, _STOPPED
STOPPED_MIGRATED, STOPPED_SAVED = 3, 4  # VIR_DOMAIN_EVENT_STOPPED_MIGRATED, _SAVED

_PAUSED_REASONS: Mapping[int, RunState] = MappingProxyType(
    {  # virDomainPausedReason
        1: RunState.PAUSED,  # user
        2: RunState.FINISH_MIGRATE,  # migration, either side; which one the job says
        SAVING: RunState.SAVE_VM,
        4: RunState.SAVE_VM,  # dump
        5: RunState.IO_ERROR,
        6: RunState.WATCHDOG,
        7: RunState.RESTORE_VM,  # from a snapshot
        8: RunState.SHUTDOWN,  # shutting down
        9: RunState.SAVE_VM,  # snapshot
        10: RunState.GUEST_PANICKED,  # crashed
        STARTING_UP: RunState.PRELAUNCH,
        12: RunState.FINISH_MIGRATE,  # post-copy: the other end runs
        13: RunState.FINISH_MIGRATE,  # post-copy failed: neither end can go on, both are alive
    }
)
_STATES: Mapping[int, RunState] = MappingProxyType(
    {  # virDomainState
        0: RunState.UNKNOWN,  # no state
        1: RunState.RUNNING,
        2: RunState.PAUSED,  # blocked on a resource
        PAUSED: RunState.PAUSED,  # for a reason that this program does not know
        4: RunState.SHUTDOWN,  # in shutdown: QEMU is still there
        SHUTOFF: RunState.UNKNOWN,  # libvirt's word is no end: its process is there, or this is not asked
        6: RunState.GUEST_PANICKED,  # crashed, and kept
        7: RunState.SUSPENDED,  # pmsuspended
    }
)
_LEAVING_REASONS: Final = frozenset({2, SAVING, 12, 13})  # of PAUSED: migration, save, post-copy
_POSTCOPY_RUNNING: Final = frozenset({11, 12})  # of RUNNING: VIR_DOMAIN_RUNNING_POSTCOPY, _POSTCOPY_FAILED
_OUTGOING_JOBS: Final = frozenset({2, 5})  # virDomainJobOperation: save, migration out
_INCOMING_JOBS: Final = frozenset({3, 4})  # restore, migration in


@dataclass(frozen=True, slots=True)
class DomainRecord:
    """What libvirt says of one domain at one moment."""

    vm_uuid: VmUuid
    name: str  # untrusted text
    id: int  # of this execution; -1 when libvirt says that it does not run
    state: int  # virDomainState
    reason: int
    managed_save: bool = False  # libvirt would continue it from saved memory
    autostart: bool = False

    @property
    def active(self) -> bool:
        """Whether libvirt says that a process of it exists, or is about to."""
        return self.id >= 0


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel of a domain to a unix socket."""

    alias: str  # libvirt's name for the device, which QEMU's events carry; "" when not told
    port: Port


@dataclass(frozen=True, slots=True)
class DomainXml:
    """What is needed of a live domain's XML."""

    channels: tuple[Channel, ...] = ()
    resettable: bool = False  # no device keeps state that a reset does not reach (S8)


def run_state(record: DomainRecord) -> RunState:
    """The run state of a domain whose process exists. None of them is off."""
    if record.state == PAUSED:
        return _PAUSED_REASONS.get(record.reason, RunState.PAUSED)
    return _STATES.get(record.state, RunState.UNKNOWN)


def migration(record: DomainRecord, job: int | None, *, receives: bool) -> Migration:
    """The part that a domain has in a migration; saved memory is a migration into a file.

    A completed one is not told by this: the process's end is, with its reason (`Lifecycle`).

    Args:
        record: the domain.
        job: virDomainJobOperation of the job that is under way; None when there is none, or not told.
        receives: its process was started to receive memory and was not seen to run yet.
    """
    if job in _INCOMING_JOBS:
        return Migration.INCOMING
    if job in _OUTGOING_JOBS:
        return Migration.OUTGOING
    stopped = record.state == PAUSED and record.reason in (*_LEAVING_REASONS, STARTING_UP)
    if receives and (stopped or record.state in (0, SHUTOFF)):
        return Migration.INCOMING
    if record.state == PAUSED and record.reason in _LEAVING_REASONS:
        return Migration.OUTGOING
    if record.state == 1 and record.reason in _POSTCOPY_RUNNING:
        return Migration.INCOMING  # runs here, with memory that is still elsewhere
    return Migration.NONE


def migration_after_event(status: object, before: Migration) -> Migration:
    """QEMU's MIGRATION event, passed on by libvirt: taken at its word at once, as far as it is a beginning.

    `completed` stays OUTGOING: a save into a file completes too, and how a domain ended libvirt tells.
    """
    known = isinstance(status, str) and status not in ("none", "failed", "cancelled")
    return Migration.OUTGOING if known and before is not Migration.INCOMING else before


def read_domain_xml(text: str) -> DomainXml:
    """What a live domain's XML says.

    Raises:
        HypervisorError: it is not what libvirt writes.
    """
    root = parse_domain(text)
    channels: list[Channel] = []
    for element in root.iterfind("./devices/channel[@type='unix']"):
        channel = _channel(element)
        if channel is not None and len(channels) < MAX_PORTS:
            channels.append(channel)
    return DomainXml(tuple(channels), not _keeps_state(root))


def read_uuid(text: str) -> VmUuid | None:
    """The UUID of a domain's XML, or None.

    Raises:
        HypervisorError: it is not what libvirt writes.
    """
    found = parse_domain(text).findtext("./uuid", "").strip().lower()
    return VmUuid(found) if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", found) else None


def parse_domain(text: str) -> ElementTree.Element:
    """The root of a domain's XML.

    Raises:
        HypervisorError: it is not what libvirt writes.
    """
    if len(text) > MAX_XML:
        raise HypervisorError(f"a domain's XML is longer than {MAX_XML} characters")
    if "<!DOCTYPE" in text:  # libvirt never writes one, and entities can grow without bound
        raise HypervisorError("a domain's XML has a document type")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise HypervisorError(f"a domain's XML cannot be read: {error}") from error
    if root.tag != "domain":
        raise HypervisorError("the XML is not a domain's")
    return root


def _channel(element: ElementTree.Element) -> Channel | None:
    source, target, alias = element.find("source"), element.find("target"), element.find("alias")
    if source is None or target is None or target.get("type") != "virtio":
        return None
    name, path = target.get("name", ""), source.get("path", "")
    if not name or not path.startswith("/") or source.get("mode") not in ("bind", "connect"):
        return None
    mode, reconnect = SocketMode(source.get("mode")), source.find("reconnect")
    again = reconnect is not None and reconnect.get("enabled") == "yes"
    port = Port(
        PortName(name),
        path,
        guest_open=target.get("state") == "connected",
        mode=mode,
        reconnects=again or mode is SocketMode.BIND,
    )
    return Channel("" if alias is None else alias.get("name", ""), port)


_STATEFUL = (
    "./devices/hostdev",
    "./devices/interface[@type='vhostuser']",
    "./devices/interface[@type='vdpa']",
    "./devices/interface[@type='hostdev']",
    "./devices/disk[@type='vhostuser']",
    "./devices/disk[@type='vhostvdpa']",
    "./devices/filesystem",
    "./{http://libvirt.org/schemas/domain/qemu/1.0}commandline",  # may hold any device
)


def _keeps_state(root: ElementTree.Element) -> bool:
    return any(root.find(path) is not None for path in _STATEFUL)
