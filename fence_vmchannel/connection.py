# SPDX-License-Identifier: LGPL-2.1-or-later
"""One peer's reliable conversation over successive links: greeting, session and channels behind one object.

No I/O: a shell gives it received bytes and the time, sends what `data_to_send` returns, calls `handle_time` at
`next_deadline`, and acts on `events`. The shape of every shell: feed, handle events, transmit, arm one timer.
`now` is always seconds on one monotonic clock (CLOCK_BOOTTIME where deadlines must survive suspension).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fence_vmchannel.errors import CloseCode
from fence_vmchannel.events import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Data,
    Event,
    Granted,
    Limits,
    LinkRefused,
    Opened,
    PeerIdentity,
    Priority,
    Reset,
    Role,
    Unlinked,
)

__all__ = [
    "FRAME_COST",
    "MAX_FRAGMENT",
    "ChannelAccepted",
    "ChannelOpened",
    "Closed",
    "Connection",
    "Data",
    "Event",
    "Granted",
    "Limits",
    "LinkRefused",
    "Opened",
    "PeerIdentity",
    "Priority",
    "Reset",
    "Role",
    "Unlinked",
    "message_cost",
]

FRAME_COST: Final = 64
MAX_FRAGMENT: Final = 32_768


def message_cost(size: int) -> int:
    """What a message of `size` bytes takes from a window when it is sent in one call: bytes plus FRAME_COST a frame."""
    raise NotImplementedError


class Connection:
    """A conversation with one peer. Not thread-safe; never blocks; the peer cannot make any method raise."""

    def __init__(
        self,
        role: Role,
        identity: PeerIdentity,
        *,
        random_bytes: Callable[[int], bytes],
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> None:
        """`random_bytes(n)` gives n unguessable bytes (os.urandom); tests give a seeded generator."""

    # --- the link ---

    def link_up(self, now: float) -> None:
        """A byte connection to the peer is there. Its greeting starts; `Opened` follows."""

    def link_down(self, now: float) -> None:
        """The byte connection is gone. The session stays; `Unlinked` follows if it was open. May be called twice."""

    def receive(self, data: bytes | bytearray | memoryview, now: float) -> None:
        """Take received bytes. Whatever they are, this does not raise; see `events`."""

    def data_to_send(self, now: float, max_bytes: int = 65_536) -> bytes:
        """The next bytes for the link, b"" if there is nothing to send now.

        At most `max_bytes` (at least one frame if any waits). The caller must write all of it before it asks again,
        or call `link_down`. Ask again until b"" comes, after each receive, send, grant, close and handle_time.
        """
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When to call `handle_time`, seconds on the caller's clock; None: never."""
        raise NotImplementedError

    def handle_time(self, now: float) -> None:
        """Do what is due (heartbeat, repeated greeting, silence). Calling early or late is harmless."""

    def events(self) -> list[Event]:
        """What has happened since the last call, in order."""
        raise NotImplementedError

    @property
    def opened(self) -> bool:
        """Whether the greeting on the present link is done."""
        raise NotImplementedError

    @property
    def tick(self) -> int:
        """GUEST: the last host tick seen, ms of the host's clock (0: none). HOST: the last tick sent."""
        raise NotImplementedError

    @property
    def peer(self) -> PeerIdentity | None:
        """What the peer last said of itself in a greeting."""
        raise NotImplementedError

    @property
    def session_id(self) -> bytes:
        """16 bytes; all zero before the first greeting."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """How many channels exist now."""
        raise NotImplementedError

    @property
    def unsent_bytes(self) -> int:
        """Payload bytes queued or sent and not yet acknowledged by the peer's hub."""
        raise NotImplementedError

    # --- channels ---

    def open(
        self,
        target: str,
        *,
        window: int | None = None,
        priority: Priority = Priority.NORMAL,
        payload: bytes = b"",
    ) -> int:
        """Open a channel to `target`; returns its id at once. Also while there is no link: it is sent later.

        Args:
            target: name of the service, at most 1,024 bytes of UTF-8.
            window: what our consumer takes before it grants more, cost units; None: `Limits.window_bytes`.
            payload: goes to the acceptor with the request; at most 32,768 bytes.

        Raises:
            ServiceRefused: a limit of ours is reached (code LIMIT).
            MessageTooLarge: target or payload is too long.
        """
        raise NotImplementedError

    def accept(self, channel: int, *, window: int | None = None, payload: bytes = b"") -> None:
        """Accept a channel that `ChannelOpened` announced.

        Raises:
            ChannelClosed: the peer closed it meanwhile, or `Limits.session_bytes` is reached (it is refused then).
            LocalProtocolError: it is accepted already, or it is ours.
            MessageTooLarge: payload is longer than 32,768 bytes.
        """

    def send(self, channel: int, data: bytes | bytearray | memoryview, *, end: bool = True) -> None:
        """Queue a message, or a fragment of one (`end=False`). Cut into frames of at most MAX_FRAGMENT bytes.

        Raises:
            MessageTooLarge: `data` alone costs more than the reader's whole window: it could never be sent.
            CreditExceeded: wait for `Granted`; nothing was queued.
            ChannelClosed: no such channel any more.
            LocalProtocolError: the channel is not accepted yet.
        """

    def credit(self, channel: int) -> int:
        """The largest `data`, in bytes, that `send` takes now; 0 also when the channel is gone or not accepted."""
        raise NotImplementedError

    def max_message(self, channel: int) -> int:
        """The largest message, in bytes, that the reader's window could ever take; 0 before `ChannelAccepted`."""
        raise NotImplementedError

    def grant(self, channel: int, delivered: int, limit: int) -> None:
        """Our consumer took everything up to offset `delivered`; it may be sent up to `limit` (absolute, cost units).

        Numbers below those of an earlier call have no effect; a channel that is gone is ignored.
        """

    def close(self, channel: int, code: CloseCode = CloseCode.NORMAL, reason: str = "") -> None:
        """End the channel, after the data already sent on it. Before `accept` it refuses. A gone channel is ignored."""

    def abort(self, channel: int, code: CloseCode = CloseCode.NORMAL, reason: str = "") -> None:
        """End the channel now; data of it that is still queued is dropped. A gone channel is ignored."""

    # --- hand-over ---

    def export_state(self) -> bytes:
        """The whole session, for `import_state` of another process or host. This object is dead afterwards.

        Raises:
            LocalProtocolError: events are waiting: handle `events` first, or their data would be lost.
        """
        raise NotImplementedError

    @classmethod
    def import_state(
        cls,
        state: bytes,
        role: Role,
        identity: PeerIdentity,
        *,
        random_bytes: Callable[[int], bytes],
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> Connection:
        """Go on with an exported session: call `link_up` next. Channel ids and offsets are as they were.

        Raises:
            RemoteProtocolError: `state` is damaged, of another format version, or of another role.
        """
        raise NotImplementedError
