# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a `Connection` tells its shell: one immutable class for each thing that can happen.

`Data` and `Granted` are named tuples, made in much less time than a record: they come with each message.

Offsets and windows are in cost units: each DATA frame costs its bytes plus `FRAME_COST`, so that a flood of
empty messages is bounded like any other. Whoever consumes `Data` adds up `Data.cost` and passes the sum to
`Connection.grant`; a hub that forwards fragment by fragment passes `Granted` on unchanged, because a
forwarded fragment costs the same on each hop.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import NamedTuple

from fence_vmchannel.errors import CloseCode
from fence_vmchannel.records import Record, field


class Role(Enum):
    """Which side of the greeting a connection is."""

    HOST = "host"  # challenges and decides: a host daemon towards a VM, a hub towards its local applications
    GUEST = "guest"  # knocks and answers: a guest's hub towards the host, an application towards its hub


class Priority(IntEnum):
    """How a channel's data is scheduled; on the wire in OPEN, so values never change."""

    CONTROL = 0  # before everything else
    FENCING = 1  # before all NORMAL channels; memory is reserved for it
    NORMAL = 2  # shares what is left, deficit round robin


class PeerIdentity(Record):
    """What one side says of itself in the greeting. Untrusted words: for logs and comparing, not for
    rights."""

    boot_id: (
        str  # the kernel's boot id (an application: of its process); a different one is a different session
    )
    software: str = ""  # name and version, for logs; at most 200 characters are kept


class Limits(Record):
    """Bounds of one connection. What they refuse is one channel or one link, never another connection."""

    channels: int = 1024  # open at once, both sides together; a further OPEN is refused with LIMIT
    window_bytes: int = 262_144  # receive window that a channel gets when the caller names none, cost units
    max_window_bytes: int = 4_194_304
    """Largest window of a channel in either direction, cost units: what we grant is cut to it, and what the
    peer grants. So it bounds what waits here in that direction. Never less than one fragment."""
    session_bytes: int = 134_217_728
    """Sum of all windows of one direction, cost units; a further channel is refused with LIMIT. FENCING and
    CONTROL channels have some channels and bytes beyond, which no other takes (`channels.RESERVED_BYTES`)."""
    target_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    """As `max_window_bytes`, for the channels to one target; the smaller of the two holds."""


class Opened(Record):
    """The greeting is done: frames flow. Also after `Unlinked`, when the session goes on over a new link."""

    resumed: bool  # False: a new session begins; channels of the one before were told by `Reset`
    peer: PeerIdentity


class Unlinked(Record):
    """The peer cannot be reached now (link down, or silent); the session and its channels wait. Follows each
    `Opened` at most once, and comes before the next one unless a `Reset` does."""

    reason: str


class Reset(Record):
    """The session ended. All its channels are gone, without `Closed`.

    Channels whose OPEN was never sent are not part of it: they survive and open in the next session.
    """

    reason: str
    lost: Mapping[int, int] = field(default_factory=dict[int, int])
    """Each channel of the session, with the cost units sent on it that its consumer did not confirm. Also
    those that we have closed, as long as the peer's hub has not acknowledged the CLOSE."""


class LinkRefused(Record):
    """The peer on this link cannot be talked to (no common version, garbage, protocol broken). The shell
    sends what `data_to_send` still gives (the ERROR frame), closes the link and calls `link_down`."""

    reason: str


class ChannelOpened(Record):
    """The peer opened a channel: `accept` it, or `close` it with a code to refuse."""

    channel: int
    target: str  # untrusted text, at most 1,024 bytes of UTF-8
    priority: Priority
    window: int  # what the peer's consumer takes before it grants more, cost units
    payload: bytes


class ChannelAccepted(Record):
    """The peer accepted a channel that we opened; data may flow. A refusal is `Closed` without this."""

    channel: int
    window: int  # cost units
    payload: bytes


class Data(NamedTuple):
    """A fragment of a message, as it came."""

    channel: int
    data: bytes
    end: bool  # last fragment of its message
    cost: int  # len(data) + FRAME_COST: what it takes from the window
    crc: int  # CRC-32 of `data`, which was checked: who passes it on need not compute it again


class Granted(NamedTuple):
    """The peer's consumer took all up to offset `delivered`, and may be sent up to `limit` (cost units)."""

    channel: int
    delivered: int
    limit: int


class Closed(Record):
    """The peer closed, refused or aborted the channel; it is gone. Nothing may be called on it any more."""

    channel: int
    code: CloseCode
    reason: str  # untrusted text, at most 1,000 characters
    aborted: bool  # True: it overtook data; what was not yet taken may be dropped


Event = Opened | Unlinked | Reset | LinkRefused | ChannelOpened | ChannelAccepted | Data | Granted | Closed
