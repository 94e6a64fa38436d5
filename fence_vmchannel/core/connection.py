# SPDX-License-Identifier: LGPL-2.1-or-later
"""One peer's reliable conversation over successive links: greeting, session, channels behind one object.

No I/O: a shell gives it received bytes and the time, sends what `data_to_send` returns, calls `handle_time`
at `next_deadline`, and acts on `events`. The shape of every shell: feed, handle events, transmit, arm one
timer. `now` is always seconds on one monotonic clock (CLOCK_BOOTTIME where deadlines must survive
suspension).
"""

from __future__ import annotations

from collections.abc import Callable

from fence_vmchannel.core.channel_state import message_cost
from fence_vmchannel.core.channels import Multiplexer
from fence_vmchannel.core.events import (
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
from fence_vmchannel.core.frames import FRAME_COST, MAX_FRAGMENT
from fence_vmchannel.core.session import Session
from fence_vmchannel.core.session_state import SessionState
from fence_vmchannel.core.tally import Tally
from fence_vmchannel.errors import CloseCode, LocalProtocolError

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

_DEFAULT_LIMITS = Limits()


class Connection:
    """A conversation with one peer. Not thread-safe; never blocks; the peer cannot make any method raise."""

    def __init__(
        self,
        role: Role,
        identity: PeerIdentity,
        *,
        random_bytes: Callable[[int], bytes],
        limits: Limits = _DEFAULT_LIMITS,
        tally: Tally | None = None,
        held_elsewhere: Callable[[bytes], bool] = lambda _: False,
    ) -> None:
        """Make a connection without a session.

        Args:
            role: which side of the greeting it is.
            identity: what it says of itself.
            random_bytes: gives n unguessable bytes (os.urandom); tests give a seeded generator.
            limits: its bounds.
            tally: counts what is refused; None: one of its own.
            held_elsewhere: HOST without a session: is asked with the session id that the peer names. True:
                another object has that session; it takes the link over, and this one says no more.
        """
        self._events: list[Event] = []
        self.tally = Tally() if tally is None else tally
        self._channels = Multiplexer(role, limits, self._events, self.tally)
        self._session = Session(
            role, identity, limits, random_bytes, self._channels, self._events, self.tally, held_elsewhere
        )

    # --- the link ---

    def link_up(self, now: float) -> None:
        """A byte connection to the peer is there (an earlier one is gone). Its greeting starts; `Opened`
        follows.

        Raises:
            LocalProtocolError: the session has been exported.
        """
        self._session.link_up(now)

    def link_down(self, now: float) -> None:
        """The byte connection is gone. The session stays; `Unlinked` follows if it was open. Twice is
        harmless."""
        self._session.link_down(now)

    def receive(self, data: bytes | bytearray | memoryview, now: float) -> None:
        """Take received bytes. Whatever they are, this does not raise; see `events`."""
        self._session.receive(data, now)

    def data_to_send(self, now: float, max_bytes: int = 65_536) -> bytes:
        """The next bytes for the link, b"" if there is nothing to send now.

        At most `max_bytes` (at least one frame if any waits). The caller must write all of it before it asks
        again, or call `link_down`. Ask again until b"" comes, after each receive, send, grant, close and
        handle_time.
        """
        return self._session.data_to_send(now, max_bytes)

    @property
    def more_to_send(self) -> bool:
        """False: another `data_to_send` right now would give b""."""
        return self._session.more_to_send

    def next_deadline(self) -> float | None:
        """When to call `handle_time`, seconds on the caller's clock; None: never."""
        return self._session.timers.next()

    def handle_time(self, now: float) -> None:
        """Do what is due (heartbeat, repeated greeting, silence). Calling early or late is harmless."""
        self._session.handle_time(now)

    def events(self) -> list[Event]:
        """What has happened since the last call, in order."""
        if not self._events:
            return []
        events = self._events.copy()
        self._events.clear()
        return events

    @property
    def opened(self) -> bool:
        """Whether the greeting on the present link is done."""
        return self._session.state is SessionState.OPEN

    @property
    def state(self) -> SessionState:
        """The state of the present link's greeting; for status displays and tests."""
        return self._session.state

    @property
    def tick(self) -> int:
        """GUEST: the last host tick seen, ms of the host's clock (0: none). HOST: the last tick sent."""
        return self._session.tick

    @property
    def peer(self) -> PeerIdentity | None:
        """What the peer last said of itself in a greeting."""
        return self._session.peer

    @property
    def role(self) -> Role:
        """Which side of the greeting it is."""
        return self._session.role

    @property
    def session_id(self) -> bytes:
        """16 bytes; all zero before the first greeting."""
        return self._session.session_id

    @property
    def features(self) -> int:
        """The optional features that both sides have, a bit set."""
        return self._session.features

    @property
    def channels(self) -> int:
        """How many channels exist now."""
        return len(self._channels)

    @property
    def full_channels(self) -> tuple[int, int]:
        """Channels with under an eighth of their window left, of the peer's reader and of ours.

        Their writers wait, or will soon. Looks at every channel.
        """
        return self._channels.full()

    @property
    def living_channels(self) -> tuple[int, ...]:
        """The numbers of the channels that our side has not ended."""
        return self._channels.living()

    @property
    def unsent_bytes(self) -> int:
        """Bytes queued, or sent and not yet acknowledged by the peer's hub."""
        return self._channels.queued_bytes + self._session.outbox.in_flight

    @property
    def regreetings(self) -> int:
        """How often something did not fit and the greeting began anew, on all links of this object."""
        return self._session.regreetings

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
            priority: FENCING and CONTROL go before all NORMAL channels; who may ask for them is the caller's
            rule. payload: goes to the acceptor with the request; at most 32,768 bytes.

        Raises:
            ServiceRefused: a limit of ours is reached (code LIMIT).
            MessageTooLarge: target or payload is too long.
        """
        return self._channels.open(target, window, priority, payload)

    def accept(self, channel: int, *, window: int | None = None, payload: bytes = b"") -> None:
        """Accept a channel that `ChannelOpened` announced.

        Raises:
            ServiceRefused: `Limits.session_bytes` is reached; the channel has been refused.
            ChannelClosed: the channel is gone (the peer closed it, or the session was reset).
            LocalProtocolError: it is accepted already, or it is ours.
            MessageTooLarge: payload is longer than 32,768 bytes.
        """
        self._channels.accept(channel, window, payload)

    def send(
        self,
        channel: int,
        data: bytes | bytearray | memoryview,
        *,
        end: bool = True,
        crc: int | None = None,
    ) -> None:
        """Queue a message, or a fragment of one (`end=False`). Cut into frames of at most MAX_FRAGMENT bytes.

        `crc`: the CRC-32 of `data`, if it is known (`Data.crc`). The peer checks it.

        Raises:
            MessageTooLarge: `data` alone costs more than the reader's whole window: it could never be sent.
            CreditExceeded: wait for `Granted`; nothing was queued.
            ChannelClosed: the channel is gone.
            LocalProtocolError: the channel is not accepted yet.
        """
        self._channels.send(channel, data, end, crc)

    def credit(self, channel: int) -> int:
        """The largest `data`, in bytes, that `send` takes now; 0 also when the channel is gone or not
        accepted."""
        return self._channels.credit(channel)

    def max_message(self, channel: int) -> int:
        """The largest message, in bytes, that the reader's window could take; 0 before `ChannelAccepted`."""
        return self._channels.max_message(channel)

    def grant(self, channel: int, delivered: int, limit: int, *, lazily: bool = False) -> None:
        """Our consumer took all up to offset `delivered`; it may be sent up to `limit` (absolute, cost
        units).

        Numbers below those of an earlier call have no effect; a channel that is gone is ignored. `lazily`:
        while more than half of the window is open the peer may learn of it later (20 ms), together with more;
        for a final consumer, because one delay on the way is enough.

        Raises:
            LocalProtocolError: `delivered` is more than has come.
        """
        self._channels.grant(channel, delivered, limit, lazily=lazily)

    def close(self, channel: int, code: CloseCode = CloseCode.NORMAL, reason: str = "") -> None:
        """End the channel, after the data already sent on it; before `accept` it refuses. Gone: ignored."""
        self._channels.close(channel, code, reason)

    def abort(self, channel: int, code: CloseCode = CloseCode.NORMAL, reason: str = "") -> None:
        """End the channel now; data of it that is still queued is dropped. Gone: ignored."""
        self._channels.abort(channel, code, reason)

    def abandon(self, keeps: Callable[[str], bool], code: CloseCode, reason: str) -> dict[int, int]:
        """Abort all NORMAL channels whose target `keeps` does not name: nothing waits for the peer.

        Frames that have a sequence number already (at most 256 KiB) stay: the peer may have them.

        Returns:
            Those channels, with the cost units sent on each that the peer's consumer did not confirm.
        """
        return self._channels.abandon(keeps, code, reason)

    def room(self, target: str, window: int) -> tuple[int, int, int]:
        """Channels and bytes of windows that are left for NORMAL channels of ours, and how many bytes one to
        `target` with such a window would take."""
        return self._channels.room(target, window)

    def promised(self, channel: int) -> int:
        """What a channel has of the session's bytes for what may come; 0 if it is gone."""
        return self._channels.promised(channel)

    def set_limits(self, limits: Limits) -> None:
        """Have other limits from now on; windows that are promised stay. For a session that was resumed
        before they were known.
        """
        self._channels.set_limits(limits)
        self._session.set_limits(limits)

    # --- hand-over ---

    def export_state(self) -> bytes:
        """The whole session, for `import_state` of another process or host. This object is dead afterwards.

        Raises:
            LocalProtocolError: events are waiting (handle `events` first, or their data would be lost), the
                session holds too much (`saved.MAX_STATE_BYTES`), or it has been exported already.
        """
        if self._events:
            raise LocalProtocolError("events are waiting")
        from fence_vmchannel.core import (  # here: a fence agent never hands over, and starts faster
            handover,
            saved,
        )

        return saved.pack(handover.save(self._session))

    @classmethod
    def import_state(
        cls,
        state: bytes,
        role: Role,
        identity: PeerIdentity,
        *,
        random_bytes: Callable[[int], bytes],
        limits: Limits = _DEFAULT_LIMITS,
        tally: Tally | None = None,
    ) -> Connection:
        """Go on with an exported session: call `link_up` next. Channel ids and offsets are as they were.

        Raises:
            RemoteProtocolError: `state` is damaged, of another format version, or of another role.
        """
        from fence_vmchannel.core import handover, saved

        connection = cls(role, identity, random_bytes=random_bytes, limits=limits, tally=tally)
        handover.load(connection._session, saved.unpack(state))
        return connection
