# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the other end of a link does to a shell: floods it, or leaves while it still has to be read."""

from __future__ import annotations

import struct

import pytest

from fence_vmchannel.core.connection import ChannelOpened, Data, Role
from fence_vmchannel.core.events import ChannelAccepted, Closed, Granted
from fence_vmchannel.core.frames import FrameType, frames_only
from fence_vmchannel.core.greeting import NO_SESSION, Numbers, decode_challenge
from fence_vmchannel.errors import LinkError
from fence_vmchannel.peers import PeerInfo, PeerKind
from fence_vmchannel.shell import READ_BUDGET, READ_S, Shell
from tests.fakes.raw_peer import RawPeer

PIECE = 4_096
WINDOW = 4_000_000


class FarEnd(RawPeer):
    """A raw peer whose bytes wait to be read, in pieces as a port gives them."""

    def __init__(self) -> None:
        super().__init__(Role.HOST)
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.gone = False
        self.read_takes_s = 0.0

    def send_raw(self, data: bytes) -> None:
        self.incoming += data


class LinkEnd:
    """The shell's view of it."""

    def __init__(self, far: FarEnd) -> None:
        self._far = far
        self.broken = False
        self.name = "scripted"
        self.present = True

    def fileno(self) -> int:
        raise AssertionError("nobody waits for it")

    def refresh(self) -> None:
        """Nothing changes but by `receive`."""

    def receive(self) -> bytes:
        far = self._far
        far.now += far.read_takes_s
        piece = bytes(far.incoming[:PIECE])
        del far.incoming[:PIECE]
        if not piece and far.gone:
            raise LinkError("the other end has closed")
        return piece

    def send(self, data: memoryview) -> int:
        if self._far.gone or self.broken:
            raise LinkError("broken pipe")
        self._far.outgoing += data
        return len(data)

    def close(self) -> None:
        """Nothing is held."""


class Counting(Shell):
    """Accepts every channel and adds up what comes on it."""

    got = 0

    def channel_opened(self, event: ChannelOpened) -> None:
        self.adopt(event.channel, self)
        self.connection.accept(event.channel, window=WINDOW)

    def on_data(self, event: Data) -> None:
        self.got += len(event.data)

    def on_accepted(self, event: ChannelAccepted) -> None:
        raise AssertionError("it opened none")

    def on_granted(self, event: Granted) -> None:
        raise AssertionError("it sends nothing")

    def on_closed(self, event: Closed) -> None:
        raise AssertionError("it stays open")


def linked() -> tuple[Counting, FarEnd]:
    """A greeted shell with channel 1 open."""
    far = FarEnd()
    shell = Counting(PeerInfo("vm1", PeerKind.VM), far.connection, lambda: far.now)
    shell.begin(LinkEnd(far))
    shell.turn()
    (challenge,) = frames_only(far.decoder.feed(bytes(far.outgoing)))
    far.epoch = decode_challenge(challenge.payload)
    far.send_hello(far.epoch, Numbers(NO_SESSION, 0, 0, 0, 0, 0))
    shell.turn()
    far.send_ack()
    far.send(FrameType.OPEN, struct.pack(">BQH", 2, 0, 1) + b"x", channel=1)
    shell.turn()
    assert far.connection.channels == 1
    return shell, far


def take_turns(shell: Shell) -> None:
    """Until nothing waits to be read, or the link ends."""
    while shell.turn():
        pass


def test_what_was_written_before_the_other_end_left_is_read_to_the_end() -> None:
    shell, far = linked()
    for _ in range(40):
        far.send(FrameType.DATA, bytes(32_768), channel=1)
    far.gone = True
    with pytest.raises(LinkError, match="closed"):
        take_turns(shell)
    assert shell.got == 40 * 32_768


def test_an_end_that_cannot_be_written_to_and_says_nothing_more_is_given_up() -> None:
    shell, far = linked()
    far.send(FrameType.DATA, bytes(32_768), channel=1)
    far.send(FrameType.DATA, bytes(32_768), channel=1)
    end = LinkEnd(far)
    end.broken = True
    shell.begin(end)
    with pytest.raises(LinkError, match="broken pipe"):
        take_turns(shell)
    assert shell.got == 2 * 32_768


def test_one_turn_reads_so_many_bytes_only() -> None:
    shell, far = linked()
    for _ in range(40):
        far.send(FrameType.DATA, bytes(32_768), channel=1)
    waiting = len(far.incoming)
    assert shell.turn()
    assert READ_BUDGET <= waiting - len(far.incoming) < 2 * READ_BUDGET


def test_one_turn_reads_for_so_long_only() -> None:
    shell, far = linked()
    for _ in range(40):
        far.send(FrameType.DATA, bytes(32_768), channel=1)
    waiting = len(far.incoming)
    far.read_takes_s = READ_S / 8
    assert shell.turn()
    assert waiting - len(far.incoming) <= READ_BUDGET // 4
