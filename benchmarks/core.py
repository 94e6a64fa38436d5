# SPDX-License-Identifier: LGPL-2.1-or-later
"""The channel core alone: two connections in one process, bytes handed over in memory. A floor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from benchmarks.figures import Figure, figure
from fence_vmchannel.core.connection import ChannelOpened, Connection, Data, Event, PeerIdentity, Role

_CHUNK = 32_000  # one message, bytes


class Pair:
    """A guest's and a host's connection with one open channel; `now` stands still."""

    def __init__(self) -> None:
        identity = PeerIdentity("benchmark")
        self.guest = Connection(Role.GUEST, identity, random_bytes=os.urandom)
        self.host = Connection(Role.HOST, identity, random_bytes=os.urandom)
        for side in (self.guest, self.host):
            side.link_up(0.0)
        self.taken: dict[Connection, int] = {self.guest: 0, self.host: 0}  # cost units, by the one that reads
        self.window = 262_144
        self.channel = self.guest.open("benchmark", window=self.window)
        opened = [
            event for side, event in self.exchange() if isinstance(event, ChannelOpened) and side is self.host
        ]
        self.host.accept(opened[0].channel, window=self.window)
        for _ in self.exchange():
            pass

    def exchange(self) -> Iterator[tuple[Connection, Event]]:
        """Carry bytes until both sides are quiet; give each event with the side that got it."""
        moved = True
        while moved:
            moved = False
            for sender, reader in ((self.guest, self.host), (self.host, self.guest)):
                while data := sender.data_to_send(0.0):
                    moved = True
                    reader.receive(data, 0.0)
                for event in reader.events():
                    self._take(reader, event)
                    yield reader, event

    def _take(self, reader: Connection, event: Event) -> None:
        if isinstance(event, Data):
            self.taken[reader] += event.cost
            reader.grant(event.channel, self.taken[reader], self.taken[reader] + self.window)


def round_trips(count: int) -> Figure:
    """A 64-byte request and its 64-byte answer, microseconds."""
    pair = Pair()
    values: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        pair.guest.send(pair.channel, b"q" * 64)
        for side, event in pair.exchange():
            if isinstance(event, Data) and side is pair.host:
                pair.host.send(event.channel, b"a" * 64)
        values.append((time.perf_counter() - began) * 1e6)
    return figure("core: 64-byte request and answer, in memory", "us", values)


def throughput(count: int, mebibytes: int = 8) -> Figure:
    """Bulk in 32,000-byte messages one way, MiB/s; `count` runs."""
    return figure("core: bulk one way, in memory", "MiB/s", [_one_run(mebibytes) for _ in range(count)])


def _one_run(mebibytes: int) -> float:
    pair, left = Pair(), mebibytes << 20
    message = b"x" * _CHUNK
    began = time.perf_counter()
    while left > 0:
        while left > 0 and pair.guest.credit(pair.channel) >= _CHUNK:
            pair.guest.send(pair.channel, message)
            left -= _CHUNK
        for _ in pair.exchange():
            pass
    return mebibytes / (time.perf_counter() - began)
