# SPDX-License-Identifier: LGPL-2.1-or-later
"""What QMP's answers and events say of an instance (pure).

A reply that does not have the form of qapi/*.json raises BadReply: the monitor is then not believed at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.chardev_words import Connecting
from vmchannel_host.model import Migration, Port, PortName, RunState, SocketMode, VmUuid

_NOT_MIGRATING = frozenset({"none", "failed", "cancelled"})
_PASSTHROUGH_TYPES = ("vfio-", "x-vfio-", "vhost-user-", "vhost-vdpa-")
_SERIAL_PORT_TYPE = "child<virtserialport>"
NAMED = "/machine/peripheral"
"""Where devices with an id are."""

UNNAMED = "/machine/peripheral-anon"
"""Where devices without an id are."""

MAX_PORTS = 256
"""Ports looked at per instance; eight full virtio-serial controllers. Further ones are ignored."""


class BadReply(HypervisorError):
    """A QMP reply does not have the form that QEMU documents."""


@dataclass(frozen=True, slots=True)
class MonitorFacts:
    """What a monitor told of its instance."""

    name: str
    run_state: RunState
    migration: Migration
    ports: tuple[Port, ...]
    resettable: bool
    silent: frozenset[Chardev] = frozenset()  # to be polled: QEMU sends no events of a port without an id
    version: str = ""  # of QEMU; "" when its greeting does not tell it
    plugged: int = 0  # a hash of the devices that may come and go
    connecting: tuple[Connecting, ...] = ()  # chardevs that connect to a unix socket, as far as known


@dataclass(frozen=True, slots=True)
class Chardev:
    """A character device at a unix socket."""

    path: str
    guest_open: bool
    mode: SocketMode = SocketMode.BIND
    reconnects: bool = True  # see `Port.reconnects`


@dataclass(frozen=True, slots=True)
class Device:
    """A device as a child of /machine/peripheral or /machine/peripheral-anon."""

    path: str
    type: str

    @property
    def is_serial_port(self) -> bool:
        return self.type == _SERIAL_PORT_TYPE

    @property
    def has_id(self) -> bool:
        """Whether VSERPORT_CHANGE tells of it: QEMU keeps quiet of a port that it cannot name."""
        return self.path.startswith(f"{NAMED}/")

    @property
    def is_passthrough(self) -> bool:
        """Whether `system_reset` says nothing of its state (S8)."""
        return self.type.removeprefix("child<").startswith(_PASSTHROUGH_TYPES)


def parse_name(reply: object) -> str:
    """query-name; "" when the VM has none."""
    name = _mapping(reply, "query-name").get("name", "")
    return name if isinstance(name, str) else ""


def parse_uuid(reply: object) -> VmUuid:
    """query-uuid."""
    return VmUuid(_text(_mapping(reply, "query-uuid"), "UUID", "query-uuid").lower())


def parse_version(told: object) -> str:
    """The version of a greeting, as "7.2.11"; "" for anything else. Of use to people only."""
    qemu = cast("Mapping[str, object]", told).get("qemu") if isinstance(told, Mapping) else None
    if not isinstance(qemu, Mapping):
        return ""
    parts = [cast("Mapping[str, object]", qemu).get(key) for key in ("major", "minor", "micro")]
    return ".".join(map(str, parts)) if all(type(part) is int for part in parts) else ""


def parse_run_state(reply: object) -> RunState:
    """query-status. A state that this program does not know is UNKNOWN: on, for all that we know."""
    status = _text(_mapping(reply, "query-status"), "status", "query-status")
    try:
        return RunState(status)
    except ValueError:
        return RunState.UNKNOWN


def parse_migration(reply: object, run_state: RunState) -> Migration:
    """query-migrate, read together with the run state.

    QEMU reports one status for both directions. Only a source's report has `ram` (fill_source_migration_info
    in migration/migration.c); a destination that has finished says `completed` for ever and is no source.
    """
    info = _mapping(reply, "query-migrate")
    status = info.get("status", "none")
    if not isinstance(status, str):
        raise BadReply("query-migrate: status is no text")
    if run_state is RunState.INMIGRATE:
        return Migration.INCOMING
    if run_state is RunState.POSTMIGRATE:
        return Migration.COMPLETED
    if status == "completed":
        return Migration.COMPLETED if "ram" in info else Migration.NONE
    if status not in _NOT_MIGRATING and "ram" not in info and status not in ("setup", "wait-unplug"):
        return Migration.INCOMING
    if status not in _NOT_MIGRATING or run_state is RunState.FINISH_MIGRATE:
        return Migration.OUTGOING
    return Migration.NONE


def migration_after_event(status: object, before: Migration, run_state: RunState) -> Migration:
    """The MIGRATION event's status, taken at its word at once: the process may be gone before a query.

    A step back to NONE is left to the next query-migrate, which knows the direction.
    """
    if before is Migration.INCOMING or run_state is RunState.INMIGRATE:
        return before
    if status == "completed":
        return Migration.COMPLETED
    if isinstance(status, str) and status not in _NOT_MIGRATING and before is not Migration.COMPLETED:
        return Migration.OUTGOING
    return before


def parse_devices(parent: str, reply: object) -> tuple[Device, ...]:
    """qom-list of /machine/peripheral or /machine/peripheral-anon."""
    if not isinstance(reply, list):
        raise BadReply("qom-list: not a list")
    devices: list[Device] = []
    for entry in cast(list[object], reply):
        item = _mapping(entry, "qom-list")
        name, kind = _text(item, "name", "qom-list"), _text(item, "type", "qom-list")
        if kind.startswith("child<"):
            devices.append(Device(f"{parent}/{name}", kind))
    return tuple(devices)


def parse_chardevs(
    reply: object, directory: str, connecting: Iterable[Connecting] = ()
) -> dict[str, Chardev]:
    """query-chardev: label to each chardev at a unix socket whose path is known.

    Args:
        reply: the answer.
        directory: the process's working directory; a relative socket path starts there.
        connecting: what is known of chardevs that connect. QEMU tells their path only while they are not
            connected, and never whether they try again.
    """
    if not isinstance(reply, list):
        raise BadReply("query-chardev: not a list")
    known = {one.label: one for one in connecting}
    chardevs: dict[str, Chardev] = {}
    for entry in cast(list[object], reply):
        item = _mapping(entry, "query-chardev")
        label = _text(item, "label", "query-chardev")
        found = _unix_socket(_text(item, "filename", "query-chardev"), known.get(label))
        if found is None:
            continue
        path, mode = found
        full = path if path.startswith("/") else f"{directory.rstrip('/')}/{path}"
        reconnects = known[label].reconnects if label in known else True
        chardevs[label] = Chardev(full, item.get("frontend-open") is True, mode, reconnects)
    return chardevs


def connecting_of(chardevs: Mapping[str, Chardev]) -> tuple[Connecting, ...]:
    """What to give to the next `parse_chardevs`: a chardev that has connected tells its path no more."""
    return tuple(
        Connecting(label, one.path, one.reconnects)
        for label, one in chardevs.items()
        if one.mode is SocketMode.CONNECT
    )


def make_port(name: object, label: object, chardevs: Mapping[str, Chardev]) -> Port | None:
    """Join a virtserialport's `name` and `chardev` properties; None when we cannot use the port."""
    if not isinstance(name, str) or not name or not isinstance(label, str):
        return None
    one = chardevs.get(label)
    return Port(PortName(name), one.path, one.guest_open, one.mode, one.reconnects) if one else None


def network_has_passthrough(text: object) -> bool:
    """HMP `info network`: a vhost-user or vdpa backend hides behind an ordinary virtio-net device."""
    return not isinstance(text, str) or re.search(r"type=vhost-(user|vdpa)", text) is not None


def _unix_socket(filename: str, known: Connecting | None) -> tuple[str, SocketMode] | None:
    """The path and mode of a chardev's `filename`; None when it is no unix socket, or its path is not known.

    `unix:/path,server=on` where QEMU listens; `disconnected:unix:/path`, or only `unix:`, where it connects.
    The path itself is not quoted and may hold commas.
    """
    kind, _, rest = filename.removeprefix("disconnected:").partition(":")
    path = rest.removesuffix(",server=on")
    if kind != "unix" or path.endswith((",abstract=on", ",tight=on", ",abstract", ",tight")):
        return None
    if path != rest:
        return (path, SocketMode.BIND) if path else None
    path = path or (known.path if known is not None else "")
    return (path, SocketMode.CONNECT) if path else None


def _mapping(value: object, what: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise BadReply(f"{what}: not an object")
    return cast(Mapping[str, object], value)


def _text(mapping: Mapping[str, object], key: str, what: str) -> str:
    value = mapping.get(key)
    if not isinstance(value, str):
        raise BadReply(f"{what}: {key!r} is missing or no text")
    return value
