# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a hub that stops in order leaves to the next process: its sessions, and what joins their channels.

Pure: values, their bytes, and whether they may be used. `docs/decisions/0010-restarted-hubs-resume.md` says
why it is just this.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fence_vmchannel.access import Credentials
from fence_vmchannel.core.events import Role
from fence_vmchannel.core.saved import seal, unseal
from fence_vmchannel.errors import RemoteProtocolError
from fence_vmchannel.peers import PeerInfo, PeerKind
from fence_vmchannel.records import Record, tagged
from fence_vmchannel.tlv import decode, encode

FORMAT: Final = 1
MAX_SAVED_BYTES: Final = 134_217_728
"""Of one hub's sessions. The largest are left out beyond that, and are reset."""

MAX_AGE_S: Final = 600.0
"""Older ones are not used: whoever waited for them has given up."""

_MAGIC: Final = b"VMCH"


class SavedEndpoint(Record):
    """One session, and whose it is."""

    kind: str = tagged(1)
    name: str = tagged(2)
    port: str = tagged(3)
    key: str = tagged(4)
    owner: str = tagged(5)  # what `Hub.attach` was told: only the same one gets the session back
    role: str = tagged(6)
    session: bytes = tagged(7)  # of `Connection.export_state`; empty: left out
    pid: int = tagged(8, default=0)  # of a local application, as are uid, gid and groups
    uid: int = tagged(9, default=-1)
    gid: int = tagged(10, default=-1)
    groups: tuple[int, ...] = tagged(11, default=())

    def peer(self) -> PeerInfo:
        """Who it is.

        Raises:
            ValueError: a kind that no peer has.
        """
        kind = PeerKind(self.kind)
        who = Credentials(self.pid, self.uid, self.gid, frozenset(self.groups))
        return PeerInfo(
            self.name, kind, self.port, self.key, credentials=who if kind is PeerKind.LOCAL else None
        )


class SavedRelay(Record):
    """Two channels that the hub joined. Endpoints are places in `SavedHub.endpoints`."""

    endpoint: int = tagged(1)
    channel: int = tagged(2)
    other_endpoint: int = tagged(3)
    other_channel: int = tagged(4)


class SavedOffer(Record):
    """A service that an application offers: its open channel to ".hub"."""

    endpoint: int = tagged(1)
    channel: int = tagged(2)
    service: str = tagged(3)


class SavedHub(Record):
    """All that a hub saves."""

    boot_id: str = tagged(1)  # of this machine's kernel
    saved_at_ms: int = tagged(2)  # of its CLOCK_BOOTTIME
    endpoints: tuple[SavedEndpoint, ...] = tagged(3, default=())
    relays: tuple[SavedRelay, ...] = tagged(4, default=())
    offers: tuple[SavedOffer, ...] = tagged(5, default=())


def saved_endpoint(peer: PeerInfo, owner: str, role: Role, session: bytes) -> SavedEndpoint:
    """Describe one session."""
    saved = SavedEndpoint(peer.kind.value, peer.name, peer.port, peer.key, owner, role.value, session)
    who = peer.credentials
    if who is None:
        return saved
    return replace(saved, pid=who.pid, uid=who.uid, gid=who.gid, groups=tuple(sorted(who.groups)))


def within(saved: SavedHub, most: int = MAX_SAVED_BYTES) -> SavedHub:
    """The same without the largest sessions, so that those that stay have at most `most` bytes."""
    left = sum(len(each.session) for each in saved.endpoints)
    endpoints = list(saved.endpoints)
    for place in sorted(range(len(endpoints)), key=lambda place: -len(endpoints[place].session)):
        if left <= most:
            break
        left -= len(endpoints[place].session)
        endpoints[place] = replace(endpoints[place], session=b"")
    return replace(saved, endpoints=tuple(endpoints))


def pack(saved: SavedHub) -> bytes:
    """The bytes of it."""
    return seal(_MAGIC, FORMAT, encode(saved))


def unpack(data: bytes, *, boot_id: str, now: float) -> SavedHub:
    """Parse what `pack` made; `now` is CLOCK_BOOTTIME in seconds.

    Raises:
        RemoteProtocolError: damaged, of another format or kernel boot, or too old.
    """
    saved = decode(SavedHub, unseal(_MAGIC, FORMAT, data, 2 * MAX_SAVED_BYTES))
    if saved.boot_id != boot_id:
        raise RemoteProtocolError("it was saved before this kernel booted")
    age_s = now - saved.saved_at_ms / 1000
    if not 0 <= age_s <= MAX_AGE_S:
        raise RemoteProtocolError(f"it was saved {age_s:.0f} s ago, at most {MAX_AGE_S:.0f} s count")
    return saved
