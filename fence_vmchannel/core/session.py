# SPDX-License-Identifier: LGPL-2.1-or-later
"""The session: one reliable conversation with a peer over successive links. Greeting, acknowledgement,
resumption.

One recovery for everything: whatever does not fit (a gap, a number going back, damage, a stall) leads to a
new greeting on the same link, which states both sides' numbers; frames that are missing are sent again, and
numbers that cannot be reconciled reset the session, told to both sides. `docs/protocol.md` describes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fence_vmchannel.core.channels import Multiplexer
from fence_vmchannel.core.events import (
    Event,
    Limits,
    LinkRefused,
    Opened,
    PeerIdentity,
    Reset,
    Role,
    Unlinked,
)
from fence_vmchannel.core.frames import (
    FIRST_SEQUENCED,
    HEADER_BYTES,
    IGNORABLE,
    Damage,
    Frame,
    FrameDecoder,
    FrameType,
    encode_frame,
    pack_header,
)
from fence_vmchannel.core.greeting import (
    GREETING_VERSION,
    NO_SESSION,
    VERSIONS,
    EndCode,
    Hello,
    Numbers,
    Offer,
    Welcome,
    common_version,
    decode_challenge,
    decode_end,
    decode_hello,
    decode_progress,
    decode_welcome,
    encode_challenge,
    encode_end,
    encode_hello,
    encode_progress,
    encode_welcome,
)
from fence_vmchannel.core.reliability import Inbox, Outbox, why_numbers_do_not_fit
from fence_vmchannel.core.session_state import SessionInput, SessionState, next_state
from fence_vmchannel.core.tally import Refusal, Tally
from fence_vmchannel.core.timers import ACK_AFTER_BYTES, NEVER, GreetingPace, Timers
from fence_vmchannel.errors import RemoteProtocolError

FEATURES: Final = 0
"""Optional features of this implementation, a bit set; none exist yet."""

_KINDS: Final = {
    EndCode.PROTOCOL: Refusal.PROTOCOL,
    EndCode.NO_COMMON_VERSION: Refusal.VERSION,
    EndCode.UNKNOWN_FRAME: Refusal.UNKNOWN_FRAME,
    EndCode.GARBAGE: Refusal.GARBAGE,
}
"""How a refusal of the link is counted."""

_DEAF: Final = frozenset((SessionState.UNLINKED, SessionState.REFUSED, SessionState.EXPORTED))


class Session:
    """See the module. `channels` takes what arrives and gives what is to be sent."""

    def __init__(
        self,
        role: Role,
        identity: PeerIdentity,
        limits: Limits,
        random_bytes: Callable[[int], bytes],
        channels: Multiplexer,
        events: list[Event],
        tally: Tally,
        held_elsewhere: Callable[[bytes], bool] = lambda _: False,
    ) -> None:
        self.role = role
        self.state = SessionState.UNLINKED
        self.session_id = NO_SESSION
        self.version = VERSIONS[0]
        self.features = 0
        self.peer: PeerIdentity | None = None
        self.tick = 0
        self.outbox = Outbox()
        self.inbox = Inbox()
        self.regreetings = 0  # how often an anomaly led to a new greeting
        self._identity = identity
        self._limits = limits
        self._random_bytes = random_bytes
        self.channels = channels
        self._events = events
        self._tally = tally
        self._held_elsewhere = held_elsewhere
        self._decoder = FrameDecoder()
        self._deaf = True  # what comes does not count: no link, or one that is of no use
        self._epoch = 0  # of the frames that count; 0: none do
        self._nonce = 0  # HOST: issued, not yet echoed; GUEST: the one answered
        self._hello: Hello | None = None  # HOST, WELCOMING: what we answer
        self._welcome: Welcome | None = None  # HOST, WELCOMING: the answer
        self._trouble = ""  # HOST, WELCOMING: why the answer is a new session
        self.proposed_id = NO_SESSION  # HOST: a new session that we offered and saw no confirmation of
        self.proposed_version = VERSIONS[0]
        self._error = b""  # REFUSED: the ERROR frame still to send
        self._greeting_due = False  # the frame of the present greeting state is to be sent
        self._told_open = False  # the last of Opened, Unlinked and Reset was Opened
        self.more_to_send = False  # as of the last `data_to_send`
        self._ack_due = False
        self._unacknowledged_bytes = 0  # received since our last acknowledgement
        self.timers = Timers()
        self._pace = GreetingPace()

    def set_limits(self, limits: Limits) -> None:
        """See `Connection.set_limits`."""
        self._limits = limits

    # --- the link ---

    def link_up(self, now: float) -> None:
        """A byte connection is there."""
        self.link_down(now)
        self._decoder = FrameDecoder()
        self._pace = GreetingPace()
        self._move(SessionInput.LINK_UP)
        self._nonce = 0
        self.timers.heard(now)
        self._greet(now)

    def link_down(self, now: float) -> None:
        """The byte connection is gone."""
        if self.state in (SessionState.UNLINKED, SessionState.EXPORTED):
            return
        self._move(SessionInput.LINK_DOWN)
        self._error = b""
        self._leave_epoch()
        self.timers.stop()
        self._tell_unlinked("link down")

    def receive(self, data: bytes | bytearray | memoryview, now: float) -> None:
        """Take received bytes."""
        if self._deaf:
            return
        items = self._decoder.feed(data)
        if not self._decoder.pending:
            self.timers.partial_at = NEVER
        elif items or self.timers.partial_at == NEVER:
            self.timers.partial_at = now + self.timers.PARTIAL_S
        self._take(items, now)

    def _take(self, items: list[Frame | Damage], now: float) -> None:
        for item in items:
            if self._deaf:
                return
            if isinstance(item, Damage):
                self._damaged(item, now)
                continue
            try:
                if item.epoch and item.epoch == self._epoch:
                    self._session_frame(item, now)
                else:
                    self._greeting_frame(item, now)
            except RemoteProtocolError as error:
                self._refuse(EndCode.PROTOCOL, str(error))

    def data_to_send(self, now: float, max_bytes: int) -> bytes:
        """The next bytes for the link."""
        self.more_to_send = False
        if self.role is Role.HOST:
            self.tick = int(now * 1000)
        if self.state is SessionState.OPEN:
            data = self._open_data(now, max_bytes)
        elif self._greeting_due:
            self._greeting_due = False
            data = self._greeting_data()
        else:
            data, self._error = self._error, b""
        if data:
            self.timers.sent(now)
        return data

    def handle_time(self, now: float) -> None:
        """Do what is due."""
        timers = self.timers
        if timers.due(timers.partial_at, now):
            timers.partial_at = NEVER
            self._take(self._decoder.abandon(), now)
        if timers.due(timers.silent_at, now):
            timers.heard(now)
            self._tell_unlinked("silent")
            if self.state is SessionState.OPEN:
                self._anomaly("silence", now)
        if timers.due(timers.greet_at, now):
            self._greeting_overdue(now)
        if timers.due(timers.stall_at, now):
            timers.stalled()
            self._anomaly("nothing acknowledged", now)
        if timers.due(timers.ack_at, now):
            timers.ack_at = NEVER
            self._ack_due = True
        if timers.due(timers.credit_at, now):
            timers.credit_at = NEVER
            self.channels.release_credit()
        if timers.due(timers.heartbeat_at, now) or timers.due(timers.probe_at, now):
            timers.probed(now)
            self._ack_due = True

    def freeze(self) -> None:
        """End the link for good: the session goes on elsewhere."""
        self.link_down(0.0)
        self._events.clear()
        self._move(SessionInput.EXPORT)

    # --- frames of the epoch ---

    def _session_frame(self, frame: Frame, now: float) -> None:
        if frame.type == FrameType.HELLO:
            return  # the same HELLO again, because our CHALLENGE was sent twice
        if self.state is SessionState.WELCOMING:
            fits = self._confirmed(frame, now)
        else:
            fits = self._acknowledged(frame, now)
        if not fits:
            self._misfit("acknowledgement does not fit", now)
            return
        if frame.version != self.version and frame.type != FrameType.ERROR:
            raise RemoteProtocolError(f"a frame of version {frame.version}, agreed was {self.version}")
        if self.role is Role.GUEST:
            self.tick = frame.tick
        self.timers.heard(now)
        if frame.sequence:
            self._sequenced(frame, now)
        elif frame.type == FrameType.ACK:
            sent, check = decode_progress(frame.payload)
            if sent != self.inbox.received or check != self.inbox.check:
                self._misfit("frames are missing", now)
        elif frame.type == FrameType.ERROR:
            self._refused_by_peer(frame, ends_session=True)
        elif frame.type >= FIRST_SEQUENCED:
            raise RemoteProtocolError(f"frame type {frame.type} without a sequence number")
        elif frame.type > FrameType.ERROR:
            self._unknown(frame)

    def _sequenced(self, frame: Frame, now: float) -> None:
        if not self.inbox.take(frame):
            self._misfit("a sequence number does not fit", now)
            return
        self._unacknowledged_bytes += HEADER_BYTES + len(frame.payload)
        if self._unacknowledged_bytes >= ACK_AFTER_BYTES:
            self._ack_due = True
        elif self.timers.ack_at == NEVER:
            self.timers.ack_at = now + self.timers.ACK_DELAY_S
        if FIRST_SEQUENCED <= frame.type <= FrameType.CANCEL:
            self.channels.take(frame)
        else:
            self._unknown(frame)

    def _unknown(self, frame: Frame) -> None:
        if not frame.flags & IGNORABLE:
            self._refuse(EndCode.UNKNOWN_FRAME, f"unknown frame type {frame.type}")

    def _acknowledged(self, frame: Frame, now: float) -> bool:
        """Take the acknowledgement that every frame carries; False if it does not fit."""
        outbox = self.outbox
        if frame.ack == outbox.acknowledged:
            return frame.ack_check == outbox.acknowledged_check
        if frame.ack > outbox.transmitted or outbox.check_at(frame.ack) != frame.ack_check:
            return False
        for channel in outbox.acknowledge(frame.ack):
            self.channels.confirm(channel)
        self.timers.progressed(now, outbox.waiting)
        return True

    def _open_data(self, now: float, max_bytes: int) -> bytes:
        outbox, inbox = self.outbox, self.inbox
        parts: list[bytes] = []
        size = 0
        while True:
            sent = outbox.next()
            if sent is None:
                frame = self.channels.next_frame(outbox.in_flight)
                if frame is None:
                    break
                sent = outbox.add(self.version, *frame)
            size += HEADER_BYTES + len(sent.payload)
            if parts and size > max_bytes:
                self.more_to_send = True
                break
            parts.append(pack_header(sent.identity, self._epoch, inbox.received, inbox.check, self.tick))
            parts.append(sent.payload)
            outbox.advance()
        if self.channels.late and self.timers.credit_at == NEVER:
            self.timers.credit_at = now + self.timers.CREDIT_DELAY_S
        if parts:
            self.timers.transmitted(now)
        elif self._ack_due:
            progress = encode_progress(outbox.transmitted, outbox.check_at(outbox.transmitted) or 0)
            parts.append(self._unsequenced(FrameType.ACK, progress))
        else:
            return b""
        self._ack_due = False
        self.timers.ack_at = NEVER
        self._unacknowledged_bytes = 0
        return b"".join(parts)

    def _unsequenced(self, kind: FrameType, payload: bytes) -> bytes:
        return encode_frame(
            kind,
            payload,
            version=self.version,
            epoch=self._epoch,
            ack=self.inbox.received,
            ack_check=self.inbox.check,
            tick=self.tick,
        )

    # --- the greeting ---

    def _greeting_frame(self, frame: Frame, now: float) -> None:
        """A frame outside the epoch: only what belongs to a greeting that is under way counts."""
        host = self.role is Role.HOST
        nonce_fits = frame.epoch != 0 and frame.epoch == self._nonce
        if frame.type == FrameType.KNOCK and host and not frame.epoch:
            self._knocked(now)
        elif frame.type == FrameType.CHALLENGE and not host and not frame.epoch:
            self._challenged(frame, now)
        elif frame.type == FrameType.HELLO and self.state is SessionState.CHALLENGING and nonce_fits:
            self._greeted(frame, now)
        elif frame.type == FrameType.WELCOME and self.state is SessionState.ANSWERED and nonce_fits:
            self._welcomed(frame, now)
        elif frame.type == FrameType.ERROR and self.state is SessionState.ANSWERED and nonce_fits:
            self._refused_by_peer(frame, ends_session=False)

    def _knocked(self, now: float) -> None:
        """HOST: the guest asks for a challenge. One that is out and not answered is sent again."""
        fresh = self.state is not SessionState.CHALLENGING
        self._move(SessionInput.KNOCK)
        if fresh:
            self._leave_epoch()
            self._nonce = 0
            self._greet(now)
        elif self._pace.may_repeat(now):
            self._greeting_due = True

    def _challenged(self, frame: Frame, now: float) -> None:
        """GUEST: answer the host's nonce, unless it is the one of the epoch (a CHALLENGE that came twice)."""
        nonce = decode_challenge(frame.payload)
        if self.state is SessionState.OPEN and nonce == self._epoch:
            return
        self._move(SessionInput.CHALLENGE)
        self._leave_epoch()
        self._nonce = nonce
        self.tick = frame.tick
        self.timers.greet_at = now + self._pace.patience()
        self._greeting_due = True

    def _greeted(self, frame: Frame, now: float) -> None:
        """HOST: a HELLO of this link. Decide whether the session goes on; nothing is changed until it is
        confirmed."""
        hello = decode_hello(frame.payload)
        version = common_version(hello.versions)
        if not version:
            self._refuse(
                EndCode.NO_COMMON_VERSION, f"the peer speaks versions {list(hello.versions)}", link_only=True
            )
            return
        if self.session_id == NO_SESSION and self._held_elsewhere(hello.numbers.session_id):
            return  # that session's own object challenges on this link next
        if hello.numbers.session_id == self.proposed_id != NO_SESSION:
            self._new_session(self.proposed_id, self.proposed_version, "the peer began the new session")
            self.peer = PeerIdentity(hello.offer.boot_id, hello.offer.software)
        self._move(SessionInput.HELLO)
        self._epoch, self._nonce = self._nonce, 0
        trouble = self._why_not_resume(hello, version)
        if trouble:
            self.proposed_id, self.proposed_version = self._random_bytes(16), version
            numbers = Numbers(self.proposed_id, 0, 0, 0, 0, 0)
        else:
            numbers = self._numbers()
        self._hello, self._trouble = hello, trouble
        self._welcome = Welcome(version, not trouble, numbers, self._offer())
        self.timers.heard(now)
        self.timers.greet_at = now + self._pace.patience()
        self._greeting_due = True

    def _why_not_resume(self, hello: Hello, version: int) -> str:
        """HOST: why the session cannot go on with this peer; empty if it can."""
        theirs = hello.numbers
        if self.session_id == NO_SESSION:
            return "no session here"
        if theirs.session_id != self.session_id:
            return "the peer knows another session, or none"
        if self.peer is None or self.peer.boot_id != hello.offer.boot_id:
            return "the peer has booted anew"
        if version != self.version:
            return "another protocol version"
        return why_numbers_do_not_fit(self.outbox, self.inbox, theirs)

    def _confirmed(self, frame: Frame, now: float) -> bool:
        """HOST: the first frame of the new epoch. The peer took our WELCOME, so now it holds here too.

        Returns:
            False if the frame does not acknowledge what the HELLO said.
        """
        hello, welcome = self._hello, self._welcome
        if hello is None or welcome is None:
            raise AssertionError("WELCOMING without a WELCOME")
        theirs = hello.numbers
        expected = (theirs.received, theirs.received_check) if welcome.resumed else (0, 0)
        if (frame.ack, frame.ack_check) != expected:
            return False
        self._hello = self._welcome = None
        if welcome.resumed:
            self._resume(hello.numbers.received)
        else:
            self._new_session(welcome.numbers.session_id, welcome.version, self._trouble)
        self._enter(SessionInput.CONFIRMED, hello.offer, welcome.resumed, now)
        return True

    def _welcomed(self, frame: Frame, now: float) -> None:
        """GUEST: the host's decision. It holds at once; our first frame confirms it."""
        welcome = decode_welcome(frame.payload)
        theirs = welcome.numbers
        if welcome.version not in VERSIONS or theirs.session_id == NO_SESSION:
            raise RemoteProtocolError(f"WELCOME with version {welcome.version}")
        if welcome.resumed:
            trouble = self._why_not_go_on(welcome)
            if trouble:  # the next HELLO names no session, so that the host begins a new one
                self._new_session(NO_SESSION, VERSIONS[0], trouble)
                self._misfit(trouble, now)
                return
            self._resume(theirs.received)
        else:
            self._new_session(theirs.session_id, welcome.version, "the host began a new session")
        self._epoch, self._nonce = self._nonce, 0
        self.tick = frame.tick
        self._ack_due = True
        self._enter(SessionInput.WELCOME, welcome.offer, welcome.resumed, now)

    def _why_not_go_on(self, welcome: Welcome) -> str:
        """GUEST: why a session that the host resumed cannot go on; empty if it can."""
        theirs = welcome.numbers
        if theirs.session_id != self.session_id or welcome.version != self.version:
            return "the host resumed another session"
        return why_numbers_do_not_fit(self.outbox, self.inbox, theirs)

    def _resume(self, peer_received: int) -> None:
        for channel in self.outbox.acknowledge(peer_received):
            self.channels.confirm(channel)
        self.outbox.rewind()

    def _new_session(self, session_id: bytes, version: int, reason: str) -> None:
        """Forget the session, if there is one, and begin another."""
        if self.session_id != NO_SESSION:
            self._events.append(Reset(reason, self.channels.reset()))
            self._told_open = False
        self.session_id, self.version = session_id, version
        self.proposed_id = NO_SESSION
        self.outbox, self.inbox = Outbox(), Inbox()

    def _enter(self, what: SessionInput, offer: Offer, resumed: bool, now: float) -> None:
        """Both sides agree: the link is open."""
        self._move(what)
        self.peer = PeerIdentity(offer.boot_id, offer.software)
        self.features = offer.features & FEATURES
        self._unacknowledged_bytes = 0
        self._pace.succeeded()
        self.timers.opened(now)
        if not (resumed and self._told_open):
            self._events.append(Opened(resumed, self.peer))
        self._told_open = True

    def _greet(self, now: float) -> None:
        """Knock or challenge, now or when the pace allows it."""
        at = self._pace.begin(now)
        self._greeting_due = at <= now
        self.timers.greet_at = now + self._repeat_after() if self._greeting_due else at

    def _repeat_after(self) -> float:
        patience = self._pace.patience()
        return patience if self.role is Role.HOST else min(patience, self._pace.KNOCK_S)

    def _greeting_overdue(self, now: float) -> None:
        """The frame of the greeting is to be sent again; or it was never answered, and the greeting begins
        anew."""
        if self.state in (SessionState.ANSWERED, SessionState.WELCOMING):
            self._anomaly("greeting not finished", now)
        else:
            self._greeting_due = True
            self.timers.greet_at = now + self._repeat_after()

    def _greeting_data(self) -> bytes:
        match self.state:
            case SessionState.KNOCKING:
                return encode_frame(FrameType.KNOCK, version=GREETING_VERSION)
            case SessionState.CHALLENGING:
                while not self._nonce:
                    self._nonce = int.from_bytes(self._random_bytes(8), "big")
                payload = encode_challenge(self._nonce)
                return encode_frame(FrameType.CHALLENGE, payload, version=GREETING_VERSION, tick=self.tick)
            case SessionState.ANSWERED:
                hello = encode_hello(Hello(self._numbers(), self._offer(), VERSIONS))
                return encode_frame(
                    FrameType.HELLO, hello, version=GREETING_VERSION, epoch=self._nonce, tick=self.tick
                )
            case SessionState.WELCOMING if self._welcome is not None:
                welcome = encode_welcome(self._welcome)
                return encode_frame(
                    FrameType.WELCOME, welcome, version=GREETING_VERSION, epoch=self._epoch, tick=self.tick
                )
            case _:
                return b""

    def _numbers(self) -> Numbers:
        outbox, inbox = self.outbox, self.inbox
        return Numbers(
            self.session_id, outbox.sent, outbox.sent_check, inbox.received, inbox.check, outbox.acknowledged
        )

    def _offer(self) -> Offer:
        limits, identity = self._limits, self._identity
        return Offer(FEATURES, limits.channels, limits.max_window_bytes, identity.boot_id, identity.software)

    # --- what goes wrong ---

    def _damaged(self, _damage: Damage, now: float) -> None:
        if self._decoder.hopeless:
            self._refuse(EndCode.GARBAGE, "too much garbage", link_only=True)
        elif self._epoch:  # before the greeting garbage is to be expected
            self._tally[Refusal.GARBAGE] += 1
            self._anomaly("damaged bytes", now)

    def _misfit(self, reason: str, now: float) -> None:
        self._tally[Refusal.MISFIT] += 1
        self._anomaly(reason, now)

    def _anomaly(self, _reason: str, now: float) -> None:
        """Greet anew on this link; the numbers in the greeting say what is missing."""
        self.regreetings += 1
        self._move(SessionInput.ANOMALY)
        self._leave_epoch()
        self._nonce = 0
        self._greet(now)

    def _refuse(self, code: EndCode, reason: str, *, link_only: bool = False) -> None:
        """End this link with an ERROR frame, and the session with it unless `link_only`."""
        self._tally[_KINDS[code]] += 1
        self._error = encode_frame(
            FrameType.ERROR,
            encode_end(code, reason),
            version=GREETING_VERSION,
            epoch=self._epoch or self._nonce,
            ack=self.inbox.received,
            ack_check=self.inbox.check,
            tick=self.tick,
        )
        self._end_link(reason, ends_session=not link_only and self._epoch != 0)

    def _refused_by_peer(self, frame: Frame, *, ends_session: bool) -> None:
        code, reason = decode_end(frame.payload)
        self._end_link(f"refused by the peer ({code}): {reason}", ends_session=ends_session)

    def _end_link(self, reason: str, *, ends_session: bool) -> None:
        self._move(SessionInput.REFUSE)
        self._leave_epoch()
        self.timers.stop()
        if ends_session:
            self._new_session(NO_SESSION, VERSIONS[0], reason)
        self._tell_unlinked(reason)
        self._events.append(LinkRefused(reason))

    def _leave_epoch(self) -> None:
        self._epoch = 0
        self._hello = self._welcome = None
        self._greeting_due = False
        self._ack_due = False
        self.timers.closed()

    def _tell_unlinked(self, reason: str) -> None:
        if self._told_open:
            self._told_open = False
            self._events.append(Unlinked(reason))

    def _move(self, what: SessionInput) -> None:
        self.state = next_state(self.role, self.state, what)
        self._deaf = self.state in _DEAF
