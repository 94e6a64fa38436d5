# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a hub tells those who watch it; the same classes in its own process and on the wire of ".hub".

A watch begins with a snapshot (what is there, as if it had just come), then `Synced`, then changes. A watcher
that is too slow gets `Overflow`; a new snapshot follows, so what it knew before is void.
"""

from __future__ import annotations

from fence_vmchannel.records import Record, tagged


class PortAdded(Record):
    """A port has come: in a guest one of its own, on a host one of a VM's."""

    port: str = tagged(1)
    peer: str = tagged(2)  # to whom it leads: "host", or the VM's name
    key: str = tagged(3, default="")  # what tells peers of one name apart: the VM's UUID


class PortRemoved(Record):
    """The port has gone (unplugged, its driver unloaded, or the VM has ended)."""

    port: str = tagged(1)
    peer: str = tagged(2)
    key: str = tagged(3, default="")


class PortUnusable(Record):
    """The port cannot be opened: another program holds it, permission is missing, its VM does not listen.

    Told once for each reason; the hub goes on trying.
    """

    port: str = tagged(1)
    peer: str = tagged(2)
    reason: str = tagged(3)
    key: str = tagged(4, default="")


class PeerConnected(Record):
    """The hub at the other end of a port has greeted: channels work."""

    peer: str = tagged(1)  # "host", or the VM's name
    port: str = tagged(2)
    session: str = tagged(3)  # hexadecimal id of the session
    resumed: bool = tagged(4)  # the session is older than this link, and nothing was lost
    software: str = tagged(5)  # the peer's own words: untrusted text
    key: str = tagged(6, default="")  # what tells peers of one name apart: the VM's UUID


class PeerDisconnected(Record):
    """The link to the peer has ended. The session stays and may be resumed."""

    peer: str = tagged(1)
    port: str = tagged(2)
    reason: str = tagged(3)
    key: str = tagged(4, default="")


class SessionWasReset(Record):
    """The session with a peer began anew: what its applications had not confirmed may be lost."""

    peer: str = tagged(1)
    port: str = tagged(2)
    reason: str = tagged(3)
    key: str = tagged(4, default="")


class ServiceOffered(Record):
    """A local application, or the hub's own process, offers a service to the peers."""

    service: str = tagged(1)
    owner: str = tagged(2)  # "hub", or the application's user and process


class ServiceWithdrawn(Record):
    """The service is offered no more."""

    service: str = tagged(1)


class Synced(Record):
    """The snapshot is complete; changes follow."""


class Overflow(Record):
    """The watcher was too slow and missed events; forget what you know, a new snapshot follows."""

    missed: int = tagged(1)


HubEvent = (
    PortAdded
    | PortRemoved
    | PortUnusable
    | PeerConnected
    | PeerDisconnected
    | SessionWasReset
    | ServiceOffered
    | ServiceWithdrawn
    | Synced
    | Overflow
)


class PeerStatus(Record):
    """One peer of a hub, by one port, now."""

    peer: str = tagged(1)
    port: str = tagged(2)
    kind: str = tagged(3)  # "host", "vm" or "local"
    present: bool = tagged(12)  # the port is there
    connected: bool = tagged(4)  # the peer has greeted: channels work
    session: str = tagged(5)
    software: str = tagged(6)  # untrusted text
    channels: int = tagged(7)
    received_bytes: int = tagged(8)
    sent_bytes: int = tagged(9)
    detail: str = tagged(10, default="")  # why it is not connected, as far as known
    key: str = tagged(11, default="")
    boot_id: str = tagged(13, default="")  # of the peer's kernel, as it said in its greeting: untrusted text


class HubStatus(Record):
    """A hub, now."""

    software: str
    boot_id: str
    peers: tuple[PeerStatus, ...] = ()
    services: tuple[ServiceOffered, ...] = ()
