# SPDX-License-Identifier: LGPL-2.1-or-later
"""A byte link in memory with virtual time, which cuts, drops, duplicates, delays and corrupts at any byte.

Bytes never overtake one another, as on a virtio-serial port; everything else that can happen to them does.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Faults:
    """How a link misbehaves. Rates are per write; sizes of the bytes hit are drawn evenly."""

    drop: float = 0.0  # a run of bytes vanishes
    duplicate: float = 0.0  # a run of bytes comes twice
    corrupt: float = 0.0  # one byte changes
    delay_s: float = 0.0  # each write is late by up to this
    max_chunk: int = 65_536  # bytes come in pieces of at most this
    run_bytes: int = 400  # longest run that is dropped or duplicated


GOOD = Faults()
BAD = Faults(drop=0.03, duplicate=0.03, corrupt=0.03, delay_s=0.05, max_chunk=4_096)


class Wire:
    """One direction of a link."""

    def __init__(self, faults: Faults, rng: random.Random) -> None:
        self.faults = faults
        self.written_bytes = 0
        self._rng = rng
        self._chunks: deque[tuple[float, bytes]] = deque()  # when it comes, what

    def write(self, data: bytes, now: float) -> None:
        """Take bytes; they come out later, or some of them do."""
        self.written_bytes += len(data)
        rng, faults = self._rng, self.faults
        if rng.random() < faults.drop:
            at, end = self._run(data)
            data = data[:at] + data[end:]
        if rng.random() < faults.duplicate:
            at, end = self._run(data)
            data = data[:end] + data[at:end] + data[end:]
        if data and rng.random() < faults.corrupt:
            at = rng.randrange(len(data))
            data = data[:at] + bytes((data[at] ^ rng.randrange(1, 256),)) + data[at + 1 :]
        when = now + rng.random() * faults.delay_s
        if self._chunks:
            when = max(when, self._chunks[-1][0])
        while data:
            size = rng.randint(1, faults.max_chunk)
            self._chunks.append((when, data[:size]))
            data = data[size:]

    def read(self, now: float) -> bytes:
        """The next bytes that have come by now."""
        if self._chunks and self._chunks[0][0] <= now:
            return self._chunks.popleft()[1]
        return b""

    def next_arrival(self) -> float | None:
        """When the next bytes come."""
        return self._chunks[0][0] if self._chunks else None

    def cut(self) -> None:
        """Lose what is under way, from any byte on."""
        if self._chunks:
            keep = self._rng.randrange(len(self._chunks) + 1)
            while len(self._chunks) > keep:
                self._chunks.pop()
            if self._chunks:
                when, data = self._chunks.pop()
                self._chunks.append((when, data[: self._rng.randint(1, len(data))]))

    def _run(self, data: bytes) -> tuple[int, int]:
        if not data:
            return 0, 0
        at = self._rng.randrange(len(data))
        return at, min(len(data), at + self._rng.randint(1, self.faults.run_bytes))


class FaultyLink:
    """Both directions of a link. Seeded: the same seed gives the same faults."""

    def __init__(self, faults: Faults = GOOD, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.to_guest = Wire(faults, rng)
        self.to_host = Wire(faults, rng)

    def heal(self) -> None:
        """From now on nothing goes wrong; what went wrong before stays."""
        for wire in (self.to_guest, self.to_host):
            wire.faults = GOOD

    def cut(self) -> None:
        """The link breaks: what is under way is lost from any byte on."""
        self.to_guest.cut()
        self.to_host.cut()

    def next_arrival(self) -> float | None:
        """When the next bytes come on either side."""
        times = [at for at in (self.to_guest.next_arrival(), self.to_host.next_arrival()) if at is not None]
        return min(times, default=None)
