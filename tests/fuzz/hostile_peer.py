# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection whose peer does what the fuzzed bytes say: right frames, frames with one wrong field, garbage.

The peer knows the epoch and keeps the numbers, so that what it sends gets past the checks of a link and
reaches the channels. An application on this side accepts, reads, answers and closes, also as the bytes say.
"""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from typing import Final

from fence_vmchannel.core.connection import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Connection,
    Data,
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
from fence_vmchannel.core.frames import HEADER_BYTES, MAX_FRAGMENT, FrameType, encode_frame
from fence_vmchannel.core.greeting import Numbers, encode_challenge, encode_progress
from fence_vmchannel.errors import (
    ChannelClosed,
    CloseCode,
    LocalProtocolError,
    RemoteProtocolError,
)
from tests.fakes.conversation import seeded_bytes
from tests.fakes.raw_peer import RawPeer
from tests.fuzz.target import Plan, Target

WINDOW: Final = 20_000
LIMITS: Final = Limits(channels=24, window_bytes=WINDOW, max_window_bytes=40_000, session_bytes=400_000)

UNSENT_BOUND: Final = LIMITS.channels * (2 * LIMITS.max_window_bytes + MAX_FRAGMENT) + 1_000_000
"""What a peer may make the connection hold: every channel's window, and what is in flight."""

_NUMBERS: Final = (1, 2, 3, 4, 5, 6, 7, 9, 50, 51, 0, 0xFFFF_FFFF)
_LIMIT: Final = 2**64 - 1
FITTING: Final = (
    *(FrameType.OPEN, FrameType.OPEN, FrameType.CREDIT, FrameType.CREDIT),
    *(FrameType.DATA, FrameType.DATA, FrameType.DATA, FrameType.ACK),
    *(FrameType.CLOSE, FrameType.CANCEL),
)

_ODD: Final = (0, 1, 2, 5, WINDOW, WINDOW + 64, LIMITS.max_window_bytes, 2**32 - 1, 2**62, _LIMIT)


class Scene:
    """One fuzzed conversation."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        role = plan.one_of((Role.HOST, Role.GUEST))
        self.peer = RawPeer(role, LIMITS)
        self.peer.greet()
        self.first = -1 if role is Role.HOST else 0
        self.highest = self.first  # number of the last channel that the peer opened
        self.living: set[int] = set()  # channels that the application knows
        self.accepted: set[int] = set()  # of these, those that it may send on
        self.received: dict[int, int] = {}
        self.handle_events()

    @property
    def connection(self) -> Connection:
        """The one under attack."""
        return self.peer.connection

    def run(self) -> None:
        """Do all that the plan says, and check after each step."""
        steps = (
            *[self.send_right] * 8,
            self.send_wrong,
            self.send_raw,
            self.wait,
            self.local_open,
            self.local_answer,
            self.local_answer,
            self.local_close,
            self.read,
            self.read,
            self.greet_again,
            self.relink,
            self.hand_over,
        )
        for _ in range(200):
            if self.plan.over:
                return
            if not self.connection.opened and self.plan.number() < 128:
                self.greet_anew()
            self.plan.one_of(steps)()
            self.handle_events()
            self.check()

    # --- the peer ---

    def payload(self, kind: int) -> bytes:
        """A payload that such a frame may have, with numbers that may be odd."""
        plan = self.plan
        match kind:
            case FrameType.OPEN:
                target = plan.take(plan.number() % 40)
                head = struct.pack(
                    ">BQH", plan.one_of((0, 1, 2, 2, 2, 2, 2, 3)), plan.one_of(_ODD), len(target)
                )
                return head + target + plan.take(plan.number() % 64)
            case FrameType.ACCEPT:
                return struct.pack(">Q", plan.one_of(_ODD)) + plan.take(plan.number() % 8)
            case FrameType.DATA:
                return b"x" * plan.one_of((0, 1, 100, 5_000, WINDOW - 64, MAX_FRAGMENT, MAX_FRAGMENT + 1))
            case FrameType.CREDIT:
                return struct.pack(">QQ", plan.one_of((0, 0, 65, *_ODD)), plan.one_of(_ODD))
            case FrameType.CLOSE | FrameType.CANCEL:
                return struct.pack(">H", plan.number() % 12) + plan.take(plan.number() % 20)
            case FrameType.ACK:
                return encode_progress(self.peer.sequence, self.peer.check)
            case _:
                return plan.take(plan.number())

    def channel(self, kind: int) -> int:
        """A number that fits such a frame, mostly; where there is none, or at times, any number."""
        choice = self.plan.number()
        if choice < 224 and kind == FrameType.OPEN:
            self.highest += 2
            return self.highest
        if choice < 224 and self.living:
            return sorted(self.living)[choice % len(self.living)]
        return _NUMBERS[choice % len(_NUMBERS)]

    def send_right(self) -> None:
        """A frame whose numbers are right."""
        channel = 0
        if self.plan.number() < 224:  # one that its channel's state allows
            kind = self.plan.one_of(FITTING if self.accepted else (FrameType.OPEN, FrameType.ACK))
            if kind == FrameType.OPEN:
                channel = self.channel(kind)
            elif kind != FrameType.ACK:
                channel = sorted(self.accepted)[self.plan.number() % len(self.accepted)]
        else:
            kind = self.plan.one_of(tuple(FrameType))
            channel = self.channel(kind) if kind >= FrameType.OPEN else 0
        flags = 2 if kind == FrameType.DATA and self.plan.number() % 2 else 0
        self.peer.send(kind, self.payload(kind), channel=channel, flags=flags)

    def send_wrong(self) -> None:
        """A frame with one wrong field."""
        plan = self.plan
        kind = plan.one_of((*FrameType, 7, 31, 38, 63, 255))
        payload = self.payload(kind)
        odd = plan.one_of((*_ODD, self.peer.sequence, self.peer.ack, self.peer.ack + 1))
        channel = self.channel(kind)
        match plan.number() % 7:
            case 0:
                self.peer.send(kind, payload, channel=channel, sequence=odd)
            case 1:
                self.peer.send(kind, payload, channel=channel, ack=odd)
            case 2:
                self.peer.send(kind, payload, channel=channel, ack_check=odd & 0xFFFF_FFFF)
            case 3:
                self.peer.send(kind, payload, channel=channel, epoch=odd)
            case 4:
                self.peer.send(kind, payload, channel=channel, version=plan.number())
            case 5:
                self.peer.send(kind, payload, channel=channel, flags=plan.number(2))
            case _:
                self.peer.send(kind, payload[: plan.number() % 8], channel=channel)

    def send_raw(self) -> None:
        """Bytes that are no frame, or the beginning of one."""
        if self.plan.number() % 2:
            frame = encode_frame(FrameType.DATA, bytes(500), epoch=self.peer.epoch)
            self.peer.send_raw(frame[: self.plan.number(2) % len(frame)])
        else:
            self.peer.send_raw(self.plan.take(self.plan.number()))

    def greet_again(self) -> None:
        """A step of a greeting, in its turn or out of it, with the right numbers or odd ones."""
        plan, peer = self.plan, self.peer
        numbers = peer.numbers()
        if plan.number() % 2:
            odd = plan.one_of(_ODD)
            session = plan.one_of((peer.session_id, bytes(16), b"another session."))
            numbers = Numbers(session, odd, plan.number(4), plan.one_of(_ODD), plan.number(4), odd)
        if peer.role is Role.HOST:
            peer.send(FrameType.KNOCK, epoch=0, ack=0, ack_check=0)
            for frame in peer.receive():
                if frame.type == FrameType.CHALLENGE and len(frame.payload) == 8:
                    peer.epoch = int.from_bytes(frame.payload, "big")
            peer.send_hello(peer.epoch, numbers, versions=plan.one_of(((1,), (7, 1), (9,), ())))
            if plan.number() % 2:
                peer.receive()
                peer.send_ack()
        else:
            nonce = plan.one_of((1, 2, 3, 99, 2**64 - 1))
            peer.send(FrameType.CHALLENGE, encode_challenge(nonce), epoch=0, ack=0, ack_check=0)
            peer.receive()
            peer.epoch = nonce
            version = plan.one_of((1, 1, 1, 0, 2))
            peer.send_welcome(nonce, numbers, resumed=bool(plan.number() % 2), version=version)

    def relink(self) -> None:
        """The link breaks; mostly there is another."""
        self.connection.link_down(self.peer.now)
        self.handle_events()
        if self.plan.number() % 8:
            self.greet_anew()

    def greet_anew(self) -> None:
        """A new link with a right greeting, which begins a new session."""
        peer = self.peer
        self.connection.link_up(peer.now)
        peer.sequence = peer.check = peer.ack = peer.ack_check = 0
        nonce = 1_000 + self.plan.number()
        if peer.role is Role.HOST:
            nonce = peer.take_challenge()
            peer.send_hello(nonce, Numbers(bytes(16), 0, 0, 0, 0, 0))
            peer.receive()
            peer.epoch = nonce
            peer.send_ack()
        else:
            peer.receive()
            peer.send_challenge(nonce)
            peer.receive()
            peer.epoch = nonce
            peer.send_welcome(nonce, Numbers(b"raw session id..", 0, 0, 0, 0, 0))
        assert self.connection.opened, "a right greeting on a new link"
        peer.session_id = self.connection.session_id
        self.handle_events()

    def hand_over(self) -> None:
        """The process is replaced by another, which goes on with what it saved."""
        self.handle_events()
        state = self.connection.export_state()
        self.peer.connection = Connection.import_state(
            state,
            self.peer.role,
            PeerIdentity("real-boot", "real"),
            random_bytes=seeded_bytes(self.plan.number()),
            limits=LIMITS,
        )
        self.connection.link_up(self.peer.now)

    def wait(self) -> None:
        """Time passes."""
        self.peer.wait(self.plan.one_of((0.0, 0.02, 1.0, 6.0, 50.0)))

    def read(self) -> None:
        """The peer takes what was sent; it may not thank for it."""
        before = self.peer.ack, self.peer.ack_check
        self.peer.receive()
        if self.plan.number() % 4 == 0:
            self.peer.ack, self.peer.ack_check = before

    # --- the application ---

    def local_open(self) -> None:
        """Open a channel."""
        priority = self.plan.one_of(tuple(Priority))
        with suppress(ChannelClosed, LocalProtocolError):
            self.living.add(self.connection.open("org.example.echo", priority=priority, payload=b"hello"))

    def local_answer(self) -> None:
        """Send and grant on a channel."""
        for channel in sorted(self.living):
            came = self.received.get(channel, 0)
            self.connection.grant(channel, came, came + WINDOW)
            size = min(self.connection.credit(channel), 1 + self.plan.number(2))
            with suppress(ChannelClosed, LocalProtocolError):
                self.connection.send(channel, bytes(size), end=bool(size % 2))

    def local_close(self) -> None:
        """Close one channel, in order or at once."""
        if self.living:
            channel = sorted(self.living)[self.plan.number() % len(self.living)]
            self.living.discard(channel)
            self.accepted.discard(channel)
            (self.connection.abort if self.plan.number() % 2 else self.connection.close)(channel)

    def handle_events(self) -> None:
        """What the shell and the applications do; and that what they are told makes sense."""
        for event in self.connection.events():
            match event:
                case ChannelOpened(channel):
                    assert channel not in self.living
                    self.living.add(channel)
                    self.received[channel] = 0
                    try:
                        self.connection.accept(channel)
                    except ChannelClosed:  # no memory for it, or its end follows
                        self.living.discard(channel)
                    else:
                        self.accepted.add(channel)
                case Data():
                    self.received[event.channel] = self.received.get(event.channel, 0) + event.cost
                case Closed(channel):
                    self.living.discard(channel)
                    self.accepted.discard(channel)
                case Reset():
                    self.living -= set(event.lost)
                    self.accepted.clear()
                    self.highest = self.first
                case ChannelAccepted(channel):
                    self.accepted.add(channel)
                case Granted() | Opened() | Unlinked() | LinkRefused():
                    pass

    def check(self) -> None:
        """What holds whatever the peer does."""
        connection = self.connection
        assert connection.channels <= LIMITS.channels
        assert connection.unsent_bytes <= UNSENT_BOUND
        due = connection.next_deadline()
        if due is not None and due <= self.peer.now:
            connection.handle_time(self.peer.now)
            later = connection.next_deadline()
            assert later is None or later > self.peer.now, "a deadline that stays in the past"


def fuzz_session(data: bytes) -> None:
    """Whatever a peer sends, no call raises and what is held stays bounded."""
    try:
        Scene(Plan(data)).run()
    except RemoteProtocolError as error:
        raise AssertionError("an error of the peer's has left the connection") from error


def fuzz_bytes(data: bytes) -> None:
    """A peer that knows nothing: raw bytes, cut anywhere, to a fresh connection of either role."""
    plan = Plan(data)
    role = plan.one_of((Role.HOST, Role.GUEST))
    connection = Connection(role, PeerIdentity("boot"), random_bytes=seeded_bytes(1), limits=LIMITS)
    now = 0.0
    connection.link_up(now)
    while not plan.over:
        connection.receive(plan.sized(), now)
        now += plan.number() / 16
        connection.handle_time(now)
        assert len(connection.data_to_send(now)) <= HEADER_BYTES + 1_000
        assert not connection.opened, "nobody knows the nonce"
        assert connection.channels == 0


def _talk(*steps: int) -> bytes:
    return bytes(steps)


SEEDS: Final = (
    _talk(0, 0, FrameType.OPEN, 0),
    bytes(range(256)),
    bytes(range(255, -1, -1)) * 2,
    _talk(0, *([0, 6, 0, 1, 120, 2, 3, 65, 66, 67, 0, 7, 2, 10, 9, 9, 9, 0, 8, 0, 2, 0] * 8)),
    _talk(1, *([6, 1, 9, 0, 0, 7, 0, 5, 9, 1, 7, 40, 40, 8, 0, 0, 13, 5, 3] * 8)),
    _talk(
        0,
        *([0, 6, 0, 2, 5, 2, 65, 66, 1] * 4),
        *([7, 0, 40, 9, 1, 0, 8, 0, 3, 1, 6, 1, 0, 8, 0, 4, 7, 1, 0, 0, 11, 0, 2, 7, 7, 10, 0] * 6),
    ),
    *(random.Random(seed).randbytes(900) for seed in range(8)),
    _talk(0, *([13, 5, 1, 11, 0, 12, 1, 4, 0, 20, 5, 3] * 10)),
)

TARGETS: Final = (
    Target("session", fuzz_session, SEEDS),
    Target(
        "raw_bytes",
        fuzz_bytes,
        tuple(
            role + b"".join(len(frame).to_bytes(2, "big") + frame + b"\1" for frame in frames)
            for role in (b"\0", b"\1")
            for frames in (
                [encode_frame(FrameType.KNOCK)] * 3,
                [encode_frame(FrameType.CHALLENGE, encode_challenge(5)), encode_frame(FrameType.ACK)],
                [encode_frame(FrameType.ERROR, struct.pack(">H", CloseCode.LIMIT)), b"\xf5VMC" * 30],
            )
        ),
    ),
)
