# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ids and sockets of ports that are plugged into a QEMU, and where one can be plugged in (pure).

A port's name is data (S9): ids and paths are made of its digest and of the VM's UUID.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterable, Mapping
from typing import Final, cast

from fence_vmchannel.addresses import DEFAULT_PORT
from vmchannel_host.hypervisors.qmp_state import BadReply, Device
from vmchannel_host.model import Migration, PortName, RunState, VmUuid

PORT_ID: Final = "vmchannel-port-"
"""How the ids of what we plug in begin, device and chardev alike: by them it is found again."""

CONTROLLER_ID: Final = "vmchannel-serial"
"""The id of the controller that we plug in where there is none; a further one gets a number."""

MAX_PATH: Final = 107
"""Bytes of a unix socket's path (sun_path without its end)."""


_MOVING: Final = frozenset(
    {RunState.INMIGRATE, RunState.POSTMIGRATE, RunState.FINISH_MIGRATE, RunState.SAVE_VM, RunState.RESTORE_VM}
)


def moving_problem(run_state: RunState, migration: Migration) -> str:
    """Why nothing may be plugged in that state; "" when it may."""
    if migration is Migration.NONE and run_state not in _MOVING:
        return ""
    return f"it migrates, or is saved or restored (state {run_state.value}, migration {migration.value})"


def port_id(name: PortName) -> str:
    """The id of device and chardev of a port that we plug in."""
    return PORT_ID + digest(name)


def is_ours(device: Device) -> bool:
    """Whether we have plugged it in."""
    return device.has_id and os.path.basename(device.path).startswith(PORT_ID)


def socket_path(directory: str, vm: VmUuid, name: PortName) -> str:
    """Where QEMU listens for us at a port that we plug in."""
    return os.path.join(directory, f"{vm}.{digest(name)}")


def backend_of(device: Device) -> str:
    """The QOM path of what holds the bus of a virtio-serial controller; "" for any other device."""
    kind = device.type.removeprefix("child<").removesuffix(">")
    if kind == "virtio-serial-device":  # on virtio-mmio: no proxy before it
        return device.path
    return f"{device.path}/virtio-backend" if kind.startswith("virtio-serial-") else ""


def parse_buses(reply: object) -> tuple[str, ...]:
    """qom-list of a controller's backend: the names of its buses, as `device_add` takes them."""
    if not isinstance(reply, list):
        raise BadReply("qom-list: not a list")
    entries = [
        cast("Mapping[str, object]", entry)
        for entry in cast("list[object]", reply)
        if isinstance(entry, dict)
    ]
    names = [entry.get("name") for entry in entries if entry.get("type") == "child<virtio-serial-bus>"]
    return tuple(name for name in names if isinstance(name, str))


def parse_empty_slots(reply: object) -> tuple[str, ...]:
    """query-pci: buses behind bridges that hold no device, as the root ports of a q35 do.

    A bridge's bus has the bridge's id as its name; one without an id cannot be named.
    """
    if not isinstance(reply, list):
        raise BadReply("query-pci: not a list")
    found: list[str] = []
    for bus in cast("list[object]", reply):
        _walk(bus, found)
    return tuple(found)


def _walk(bus: object, found: list[str], depth: int = 8) -> None:
    for device in _objects(bus, "devices") if depth else ():
        bridge = device.get("pci_bridge")
        if not isinstance(bridge, dict):
            continue
        name = device.get("qdev_id")
        if not _objects(cast("object", bridge), "devices") and isinstance(name, str) and name:
            found.append(name)
        _walk(cast("object", bridge), found, depth - 1)


def _objects(value: object, key: str) -> list[Mapping[str, object]]:
    inner = cast("Mapping[str, object]", value).get(key) if isinstance(value, dict) else None
    entries = cast("list[object]", inner) if isinstance(inner, list) else []
    return [cast("Mapping[str, object]", entry) for entry in entries if isinstance(entry, dict)]


def free_id(devices: Iterable[Device]) -> str:
    """An id for one more controller."""
    taken = {os.path.basename(device.path) for device in devices if device.has_id}
    number = 1
    while (wanted := CONTROLLER_ID if number == 1 else f"{CONTROLLER_ID}-{number}") in taken:
        number += 1
    return wanted


def start_arguments(name: PortName, path: str, *, controller: bool) -> str:
    """What a start command needs, so that the VM has the port from its next start on; words of a shell.

    Args:
        name: of the port.
        path: where QEMU, started by whoever starts it, is to listen.
        controller: whether the VM has no virtio-serial controller of its own.
    """
    ident = "vmchannel" if name == DEFAULT_PORT else f"vmchannel-{digest(name)}"
    words = ["-device", "virtio-serial"] if controller else []
    words += ["-chardev", f"socket,id={ident},path={_quoted(path)},server=on,wait=off"]
    words += ["-device", f"virtserialport,chardev={ident},name={_quoted(name)},id={ident}"]
    return shlex.join(words)


def _quoted(text: str) -> str:
    return text.replace(",", ",,")  # QEMU's option syntax


def digest(name: PortName) -> str:
    """A port's name as part of an id."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
