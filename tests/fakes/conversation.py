# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two connections against each other over a faulty link, with an application on each side that checks what
comes.

Every message names its channel, direction and number, so that an application sees at once when one is
missing, comes twice or out of order: that raises `AssertionError` in the middle of the run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from fence_vmchannel.core.connection import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Connection,
    Data,
    Event,
    Limits,
    LinkRefused,
    Opened,
    PeerIdentity,
    Priority,
    Reset,
    Role,
    Unlinked,
    message_cost,
)
from fence_vmchannel.errors import ChannelClosed
from tests.fakes.link import GOOD, Faults, FaultyLink

WINDOW = 65_536


def seeded_bytes(seed: int) -> Callable[[int], bytes]:
    """A stand-in for os.urandom that gives the same bytes each time."""
    return random.Random(seed).randbytes


def message_of(target: str, direction: str, number: int, size: int) -> bytes:
    """A message that says which it is; at least `size` bytes."""
    return f"{target}|{direction}|{number}|".encode().ljust(size, b".")


@dataclass
class Stream:
    """What one application knows of one channel."""

    target: str
    number: int  # of the channel
    accepted: bool = False
    sent: int = 0  # messages
    sent_cost: int = 0
    got: int = 0  # messages
    got_cost: int = 0
    partial: bytes = b""
    ended: bool = False  # closed by either side, or by a reset


@dataclass
class Application:
    """Accepts what is opened, reads at once, and keeps count."""

    name: str
    connection: Connection
    window: int = WINDOW
    events: list[Event] = field(default_factory=list[Event])
    streams: dict[int, Stream] = field(default_factory=dict[int, Stream])  # by channel, living ones
    by_target: dict[str, Stream] = field(default_factory=dict[str, Stream])
    resets: list[Reset] = field(default_factory=list[Reset])
    paused: bool = False  # does not read: grants nothing

    def open(self, target: str, priority: Priority = Priority.NORMAL) -> Stream:
        """Open a channel."""
        number = self.connection.open(target, window=self.window, priority=priority, payload=b"hello")
        return self._add(target, number)

    def try_send(self, target: str, size: int) -> bool:
        """Send the next message of a channel if there is credit for it."""
        stream = self.by_target[target]
        data = message_of(target, self.name, stream.sent, size)
        if stream.ended or not stream.accepted or self.connection.credit(stream.number) < len(data):
            return False
        self.connection.send(stream.number, data)
        stream.sent += 1
        stream.sent_cost += message_cost(len(data))
        return True

    def close(self, target: str) -> None:
        """Close a channel from this side."""
        stream = self.by_target[target]
        if not stream.ended:
            self.connection.close(stream.number)
            stream.ended = True
            self.streams.pop(stream.number, None)

    def handle_events(self) -> None:
        """Act on all that has happened."""
        for event in self.connection.events():
            self.events.append(event)
            self._handle(event)

    def resume_reading(self) -> None:
        """Grant what was not granted while paused."""
        self.paused = False
        for stream in self.streams.values():
            self._grant(stream)

    def count(self, kind: type[Event]) -> int:
        """How many events of a kind there were."""
        return sum(isinstance(event, kind) for event in self.events)

    def _handle(self, event: Event) -> None:
        match event:
            case ChannelOpened(channel, target):
                self._add(target, channel).accepted = True
                with suppress(ChannelClosed):  # its Closed is a later event of the same batch
                    self.connection.accept(channel, window=self.window)
            case ChannelAccepted(channel):
                if channel in self.streams:
                    self.streams[channel].accepted = True
            case Data():
                self._take(event)
            case Closed(channel):
                self.streams.pop(channel).ended = True
            case Reset():
                self._reset(event)
            case _:
                assert isinstance(event, Opened | Unlinked | LinkRefused) or event.channel in self.streams

    def _take(self, event: Data) -> None:
        stream = self.streams[event.channel]
        stream.got_cost += event.cost
        stream.partial += event.data
        if event.end:
            target, sender, number = stream.partial.split(b"|")[:3]
            assert target.decode() == stream.target
            assert sender.decode() != self.name
            assert int(number) == stream.got, f"{stream.target}: message {int(number)}, not {stream.got}"
            stream.got += 1
            stream.partial = b""
        if not self.paused:
            self._grant(stream)

    def _reset(self, event: Reset) -> None:
        self.resets.append(event)
        for number, stream in list(self.streams.items()):
            if number in event.lost:  # else its OPEN was never sent: it lives on
                stream.ended = True
                del self.streams[number]

    def _grant(self, stream: Stream) -> None:
        limit = stream.got_cost + self.window
        self.connection.grant(stream.number, stream.got_cost, limit, lazily=True)

    def _add(self, target: str, number: int) -> Stream:
        stream = Stream(target, number)
        self.streams[number] = self.by_target[target] = stream
        return stream


class Conversation:
    """A host and a guest over one link after another, in virtual time."""

    def __init__(self, faults: Faults = GOOD, seed: int = 0, limits: Limits | None = None) -> None:
        self.now = 1_000.0
        self.seed = seed
        self.limits = limits or Limits()
        self.faults = faults
        self.host = Application("host", self.new_connection(Role.HOST))
        self.guest = Application("guest", self.new_connection(Role.GUEST))
        self.link: FaultyLink | None = None
        self.rng = random.Random(seed)

    def new_connection(self, role: Role, boot_id: str = "") -> Connection:
        """A connection without a past."""
        self.seed += 1
        identity = PeerIdentity(boot_id or f"{role.value}-boot", "test 1.0")
        return Connection(role, identity, random_bytes=seeded_bytes(self.seed), limits=self.limits)

    def import_connection(self, role: Role, state: bytes) -> Connection:
        """A connection that goes on with an exported session."""
        self.seed += 1
        identity = PeerIdentity(f"{role.value}-boot", "test 1.0")
        rng = seeded_bytes(self.seed)
        return Connection.import_state(state, role, identity, random_bytes=rng, limits=self.limits)

    @property
    def applications(self) -> tuple[Application, Application]:
        """Both sides."""
        return self.host, self.guest

    def connect(self, faults: Faults | None = None) -> FaultyLink:
        """A new link comes up on both sides."""
        self.seed += 1
        self.link = FaultyLink(self.faults if faults is None else faults, self.seed)
        for side in self.applications:
            side.connection.link_up(self.now)
        return self.link

    def cut(self) -> None:
        """The link breaks. Bytes that are under way may still arrive, cut anywhere, before the sides
        notice."""
        if self.link is not None:
            self.link.cut()
            self._deliver(self.now + 10)
            self.link = None
        for side in self.applications:
            side.connection.link_down(self.now)
            side.handle_events()

    def run(self, seconds: float) -> None:
        """Let everything happen that happens in so many seconds."""
        end = self.now + seconds
        steps = 0
        while True:
            while self._transmit() or self._deliver(self.now):
                steps += 1
                assert steps < 200_000, "the two sides never come to rest"
            times = [at for side in self.applications if (at := side.connection.next_deadline()) is not None]
            if self.link is not None and (arrival := self.link.next_arrival()) is not None:
                times.append(arrival)
            following = min(times, default=end)
            if following > end:
                self.now = end
                return
            steps += 1
            assert following > self.now or steps < 200_000, "a deadline that stays in the past"
            self.now = max(following, self.now)
            for side in self.applications:
                side.connection.handle_time(self.now)
                side.handle_events()
            if following >= end:
                self._transmit()
                return

    def settle(self) -> None:
        """Heal the link (or make one) and give everything time to arrive."""
        if self.link is None:
            self.connect(GOOD)
        else:
            self.link.heal()
        self.run(120)

    def _transmit(self) -> bool:
        if self.link is None:
            return False
        busy = False
        for side, wire in ((self.host, self.link.to_guest), (self.guest, self.link.to_host)):
            while data := side.connection.data_to_send(self.now, 4_096):
                wire.write(data, self.now)
                busy = True
        return busy

    def _deliver(self, until: float) -> bool:
        if self.link is None:
            return False
        busy = False
        for side, wire in ((self.host, self.link.to_host), (self.guest, self.link.to_guest)):
            while data := wire.read(until):
                side.connection.receive(data, self.now)
                side.handle_events()
                busy = True
        return busy
