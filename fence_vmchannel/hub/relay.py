# SPDX-License-Identifier: LGPL-2.1-or-later
"""A channel that passes through the hub, from one connection to another, fragment by fragment.

Credit is end to end: what one side grants is granted to the other, and nothing else is. So the hub holds at
most what the final consumer has agreed to take, a reader that stalls stops its own writer only, and nothing
can deadlock here: the hub never waits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from fence_vmchannel.core.events import ChannelAccepted, ChannelOpened, Closed, Data, Granted, Priority
from fence_vmchannel.errors import ChannelClosed, ChannelError, CloseCode
from fence_vmchannel.logs import quoted
from fence_vmchannel.shell import Shell

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())


def relay(
    source: Shell,
    event: ChannelOpened,
    target: Shell,
    service: str,
    *,
    payload: bytes,
    priority: Priority,
) -> None:
    """Pass a channel that `source`'s peer opened on to `target`'s peer, as `service` there.

    Raises:
        ChannelError: it cannot be opened there (a limit, a payload that is too long).
    """
    inward, outward = _Leg(source, event.channel), _Leg(target)
    inward.other, outward.other = outward, inward
    outward.channel = target.open(service, outward, window=event.window, priority=priority, payload=payload)
    source.adopt(event.channel, inward)


def relayed(target: Shell) -> Iterator[tuple[int, Shell]]:
    """The channels that were passed on to `target` or from it, each with the shell at its other side."""
    for channel, user in target.users.items():
        joined = joined_to(user)
        if joined is not None:
            yield channel, joined[0]


def rejoin(one: Shell, its_channel: int, other: Shell, others_channel: int) -> None:
    """Relay again between two channels that an earlier process had joined."""
    legs = _Leg(one, its_channel), _Leg(other, others_channel)
    legs[0].other, legs[1].other = legs[1], legs[0]
    for leg in legs:
        leg.endpoint.adopt(leg.channel, leg)


def joined_to(user: object) -> tuple[Shell, int] | None:
    """Where a channel's user relays it to; None for a user that is no relay."""
    if not isinstance(user, _Leg) or user.other is None:
        return None
    return user.other.endpoint, user.other.channel


@dataclass(slots=True, eq=False)
class _Leg:
    """One side of a relayed channel: what happens here is done on the other side."""

    endpoint: Shell
    channel: int = 0
    other: _Leg | None = None

    def on_accepted(self, event: ChannelAccepted) -> None:
        if (other := self.other) is None:
            return
        try:
            other.endpoint.connection.accept(other.channel, window=event.window, payload=event.payload)
        except ChannelClosed as error:  # closed meanwhile, or too much memory promised already
            other.endpoint.close(other.channel, error.code, error.reason)
            self._part(error.code, error.reason, abort=True)
            return
        other.endpoint.kick_after(self.endpoint)

    def on_data(self, event: Data) -> None:
        if (other := self.other) is None:
            return
        try:
            other.endpoint.connection.send(other.channel, event.data, end=event.end, crc=event.crc)
        except ChannelError as error:  # cannot happen while credit is end to end
            log.error("relay to %s: %s", other.endpoint.peer, quoted(str(error)))
            other.endpoint.close(other.channel, CloseCode.INTERNAL, str(error), abort=True)
            self._part(CloseCode.INTERNAL, str(error), abort=True)
            return
        other.endpoint.kick_after(self.endpoint)

    def on_granted(self, event: Granted) -> None:
        if (other := self.other) is not None:
            other.endpoint.connection.grant(other.channel, event.delivered, event.limit)
            other.endpoint.kick_after(self.endpoint)

    def on_closed(self, event: Closed) -> None:
        if (other := self.other) is not None:
            self.other = other.other = None
            other.endpoint.close(other.channel, event.code, event.reason, abort=event.aborted)

    def _part(self, code: CloseCode, reason: str, *, abort: bool) -> None:
        if self.other is not None:
            self.other.other = None
        self.other = None
        self.endpoint.close(self.channel, code, reason, abort=abort)
