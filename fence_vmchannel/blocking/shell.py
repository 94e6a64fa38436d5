# SPDX-License-Identifier: LGPL-2.1-or-later
"""A `Shell` driven by whoever waits: poll, no event loop, no thread."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import ChannelOpened, Limits, PeerIdentity, Role
from fence_vmchannel.errors import (
    ChannelError,
    CloseCode,
    DeadlineExceeded,
    HubUnreachable,
    LinkError,
    RemoteProtocolError,
)
from fence_vmchannel.links.base import Link, wait_for
from fence_vmchannel.peers import PeerInfo, PeerKind
from fence_vmchannel.shell import Shell

if TYPE_CHECKING:
    from fence_vmchannel.hub.local_protocol import Origin

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

_MAX_UNCLAIMED: Final = 64
"""Channels that peers opened to one of our offers and that nobody has fetched; more are refused."""


_RETRY_S: Final = 0.05
_STABLE_S: Final = 1.0
"""A link that lasted so long was good: when it ends, a new time to come back begins."""


class BlockingShell(Shell):
    """One connection, run by whoever waits for something on it. Times are of `time.monotonic`."""

    def __init__(
        self,
        link: Link,
        where: str,
        peer: PeerInfo,
        identity: PeerIdentity,
        *,
        again: Callable[[], Link | None] = lambda: None,
        resume_s: float = 0.0,
    ) -> None:
        """Talk over `link`; when it has ended, over those that `again` gives (None: none now) for `resume_s`
        seconds."""
        connection = Connection(Role.GUEST, identity, random_bytes=os.urandom, limits=Limits(channels=64))
        super().__init__(peer, connection, time.monotonic)
        self._where = where
        self._again = again
        self._resume_s = resume_s
        self._linked_at = time.monotonic()
        self._back_by = 0.0  # when a hub that is away counts as gone
        self._gone = ""
        self._stirred = True  # there may be something to read
        self.offers: dict[str, deque[tuple[ChannelOpened, Origin]]] = {}  # channels not fetched yet
        self.begin(link)

    @property
    def gone(self) -> bool:
        """Whether the connection has ended."""
        return bool(self._gone)

    def wait(self, done: Callable[[], bool], deadline: float, what: str) -> None:
        """Run the connection until `done`. What waits to be read is left if it is so already.

        Raises:
            DeadlineExceeded: the deadline came first.
            HubUnreachable, LinkError: the connection (to a hub, over a port) ended first.
        """
        while self._link is not None or self._come_back(done, deadline, what):
            link, read = self._link, self._stirred or self.next_alarm() <= time.monotonic()
            try:
                self._stirred = self.turn() if read else self.flush()
            except LinkError as error:
                self._lost(str(error))
                continue
            if done():
                return
            now = time.monotonic()
            if now >= deadline:
                raise self._late(what)
            if link is not None and not self._stirred:
                wait_for(link, min(deadline, self.next_alarm()) - now)
                self._stirred = True
        if not done():
            kind = HubUnreachable if self.peer.kind is PeerKind.LOCAL else LinkError
            raise kind(f"{self._where} has gone: {self._gone}")

    def _late(self, what: str) -> DeadlineExceeded:
        why = f" ({self.detail})" if self.detail else ""
        return DeadlineExceeded(f"{what}: no answer from {self._where} in time{why}")

    def _lost(self, reason: str) -> None:
        """The link has ended: the hub restarts, or has gone."""
        now = time.monotonic()
        if self.connection.opened and (not self._back_by or now - self._linked_at > _STABLE_S):
            self._back_by = now + self._resume_s
        if now >= self._back_by:
            self.stop(reason)
        else:
            self.finish(reason)

    def _come_back(self, done: Callable[[], bool], deadline: float, what: str) -> bool:
        """Get another link; False: there is no more, or none is needed."""
        while not self._gone and not done():
            link = self._again()
            now = time.monotonic()
            if link is not None:
                self._linked_at, self._stirred = now, True
                self.begin(link)
                return True
            if now >= self._back_by:
                self.stop(self.detail)
            elif now >= deadline:
                raise self._late(what)
            else:
                time.sleep(min(_RETRY_S, max(0.0, deadline - now)))
        return False

    def drain(self, timeout_s: float) -> None:
        """Write what is queued, for at most `timeout_s` seconds."""
        try:
            self.wait(lambda: self.drained, time.monotonic() + timeout_s, "closing")
        except ChannelError as error:
            log.debug("closing %s: %s", self._where, error)

    def stop(self, reason: str) -> None:
        """End the connection and all channels."""
        self._gone = self._gone or reason
        self.finish(reason)
        self.drop_users(CloseCode.PEER_GONE, reason)

    def channel_opened(self, event: ChannelOpened) -> None:
        """See `Shell`."""
        unclaimed = self.offers.get(event.target)
        if unclaimed is None:
            self.close(event.channel, CloseCode.UNKNOWN_SERVICE, "the application offers it no more")
        elif len(unclaimed) >= _MAX_UNCLAIMED:
            self.close(event.channel, CloseCode.LIMIT, "the application does not keep up")
        else:
            from fence_vmchannel.hub.local_protocol import Origin, decode_local

            origin = decode_local(event.payload)
            if not isinstance(origin, Origin):
                raise RemoteProtocolError("the hub does not say who opens a channel")
            unclaimed.append((event, origin))
