# SPDX-License-Identifier: LGPL-2.1-or-later
"""The messages of ".hub", the service with which a hub serves local applications, and of offered services.

An application opens a channel to ".hub"; the OPEN's payload is a query, the ACCEPT's payload is `HubInfo`.
The answer to `StatusQuery` is a list of items, one message each, ended by the channel's close; to
`WatchQuery` an endless list of events; to `OfferQuery` nothing: the offer stands as long as its channel. A
channel that a peer opens to an offered service reaches the application as an OPEN for that service whose
payload is an `Origin`. `docs/protocol.md`, section "Local applications", is the specification.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from fence_vmchannel.errors import RemoteProtocolError
from fence_vmchannel.hub.events import (
    HubEvent,
    HubStatus,
    Overflow,
    PeerConnected,
    PeerDisconnected,
    PeerStatus,
    PortAdded,
    PortRemoved,
    PortUnusable,
    ServiceOffered,
    ServiceWithdrawn,
    SessionWasReset,
    Synced,
)
from fence_vmchannel.records import Record, tagged
from fence_vmchannel.tlv import decode, encode


class StatusQuery(Record):
    """Tell what is there, then close."""


class WatchQuery(Record):
    """Tell what is there, then each change."""


class OfferQuery(Record):
    """Send me the channels that peers open to `service`, until I close this one."""

    service: str = tagged(1)


class HubInfo(Record):
    """Who the hub is."""

    software: str = tagged(1)
    boot_id: str = tagged(2)


class Origin(Record):
    """Who opened a channel to an offered service, and with which payload. The hub's words, not the peer's."""

    peer: str = tagged(1)
    port: str = tagged(2)
    kind: str = tagged(3)
    payload: bytes = tagged(4)
    key: str = tagged(5, default="")


HubQuery = StatusQuery | WatchQuery | OfferQuery
LocalMessage = HubQuery | HubInfo | Origin | PeerStatus | HubEvent

_KIND = struct.Struct(">H")
_CLASSES: Final[dict[int, type[LocalMessage]]] = {
    1: StatusQuery,
    2: WatchQuery,
    3: OfferQuery,
    4: HubInfo,
    5: Origin,
    16: PortAdded,
    17: PortRemoved,
    18: PortUnusable,
    19: PeerConnected,
    20: PeerDisconnected,
    21: SessionWasReset,
    22: ServiceOffered,
    23: ServiceWithdrawn,
    24: Synced,
    25: Overflow,
    32: PeerStatus,
}
_KINDS: Final[dict[type[LocalMessage], int]] = {cls: kind for kind, cls in _CLASSES.items()}


def encode_local(message: LocalMessage) -> bytes:
    """The bytes of a message: its kind (16 bits), then its fields."""
    return _KIND.pack(_KINDS[type(message)]) + encode(message)


def decode_local(data: bytes) -> LocalMessage | None:
    """Parse a message; `None` for a kind that this version does not know, to be skipped.

    Raises:
        RemoteProtocolError: it is malformed.
    """
    if len(data) < _KIND.size:
        raise RemoteProtocolError("a message without a kind")
    cls = _CLASSES.get(_KIND.unpack_from(data)[0])
    return None if cls is None else decode(cls, data[_KIND.size :])


def gather_status(greeting: bytes, items: Iterable[bytes]) -> HubStatus:
    """The answer to a `StatusQuery`, from the ACCEPT's payload and the messages.

    Raises:
        RemoteProtocolError: it is malformed.
    """
    info = decode_local(greeting)
    if not isinstance(info, HubInfo):
        raise RemoteProtocolError("the hub does not say who it is")
    messages = [decode_local(item) for item in items]
    peers = tuple(message for message in messages if isinstance(message, PeerStatus))
    services = tuple(message for message in messages if isinstance(message, ServiceOffered))
    return HubStatus(info.software, info.boot_id, peers, services)
