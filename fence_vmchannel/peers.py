# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is at the other end of a link, as this side knows it: never as the other side says."""

from __future__ import annotations

from enum import Enum

from fence_vmchannel.access import Credentials
from fence_vmchannel.records import Record, field


class PeerKind(Enum):
    """What a peer is to its hub."""

    HOST = "host"  # the host, seen from a guest
    VM = "vm"  # a VM, seen from its host
    LOCAL = "local"  # an application on the hub's own machine


HOST_PEER = "host"
"""The name of a guest's one peer."""


class PeerInfo(Record):
    """One peer of a hub. (name, port, key) tells it from all others."""

    name: str  # "host", the VM's name, or "local:PID"
    kind: PeerKind
    port: str = ""  # the virtio-serial port that leads to it
    key: str = ""  # a VM's UUID: an address may name it instead of the name
    credentials: Credentials | None = None  # of a local application, from the kernel
    info: object = field(default=None, compare=False)  # for whoever attached it: the host's VM

    def __str__(self) -> str:
        return f"{self.name[:64]!r}" + (f" port {self.port[:64]!r}" if self.port else "")
