# SPDX-License-Identifier: LGPL-2.1-or-later
"""Endpoints whose sessions an earlier process has left, until their peer is attached or their application
comes back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Final

from fence_vmchannel.access import Credentials
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.errors import CloseCode
from fence_vmchannel.peers import PeerInfo, PeerKind

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

CLAIM_S: Final = 30.0
"""How long they wait: a host daemon finds its VMs in that time, an application its hub."""


@dataclass(frozen=True, slots=True)
class Resumable:
    """An endpoint, and whose it is (see `Hub.attach`)."""

    endpoint: Endpoint
    owner: str = ""


class Waiting:
    """All that wait in one hub."""

    def __init__(self) -> None:
        self._peers: dict[PeerInfo, Resumable] = {}
        self._applications: dict[bytes, Endpoint] = {}

    def add(self, resumable: Resumable) -> None:
        """Let an endpoint wait."""
        endpoint = resumable.endpoint
        if endpoint.peer.kind is PeerKind.LOCAL:
            self._applications[endpoint.connection.session_id] = endpoint
        else:
            self._peers[endpoint.peer] = resumable

    def all(self) -> tuple[Resumable, ...]:
        """Those that wait now."""
        return (*self._peers.values(), *(Resumable(each) for each in self._applications.values()))

    def claim_peer(self, peer: PeerInfo, owner: str) -> Endpoint | None:
        """The endpoint of a peer that is attached now. One of another owner ends."""
        found = self._peers.pop(peer, None)
        if found is None:
            return None
        if found.owner != owner:
            log.warning("peer %s: the saved session is another's: %s, not %s", peer, found.owner, owner)
            found.endpoint.stop(CloseCode.SESSION_RESET, "the peer is another one now")
            return None
        return found.endpoint

    def has_application(self, session: bytes, who: Credentials) -> bool:
        """Whether an application that names this session may have it: only its own user may."""
        found = self._applications.get(session)
        return (
            found is not None and found.peer.credentials is not None and found.peer.credentials.uid == who.uid
        )

    def claim_application(self, session: bytes, who: Credentials) -> Endpoint | None:
        """The endpoint of an application that names its session; None as `has_application`."""
        if not self.has_application(session, who):
            return None
        found = self._applications.pop(session)
        found.peer = replace(found.peer, name=f"local:{who.pid}", credentials=who)
        return found

    def take(self) -> tuple[Resumable, ...]:
        """Those that wait now; they do so no more."""
        waiting = self.all()
        self._peers.clear()
        self._applications.clear()
        return waiting

    def end(self) -> None:
        """Those that still wait have waited long enough."""
        for each in self.take():
            log.warning("peer %s has not come back: its session ends", each.endpoint.peer)
            each.endpoint.stop(CloseCode.PEER_GONE, "it has not come back since its hub was restarted")
