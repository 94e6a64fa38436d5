# SPDX-License-Identifier: LGPL-2.1-or-later
"""A peer that is no `Connection`: it sends exactly the frames it is told to, right or wrong."""

from __future__ import annotations

from zlib import crc32

from fence_vmchannel.core.connection import Connection, Limits, PeerIdentity, Role
from fence_vmchannel.core.frames import (
    IDENTITY_BYTES,
    Frame,
    FrameDecoder,
    FrameType,
    encode_frame,
    frames_only,
)
from fence_vmchannel.core.greeting import (
    NO_SESSION,
    Hello,
    Numbers,
    Offer,
    Welcome,
    decode_challenge,
    encode_challenge,
    encode_hello,
    encode_progress,
    encode_welcome,
)
from tests.fakes.conversation import seeded_bytes

OFFER = Offer(0xFF00, 1_024, 4_194_304, "raw-boot", "raw peer")


class RawPeer:
    """The other end of a real connection, which is in `role`."""

    def __init__(
        self, role: Role, limits: Limits | None = None, connection: Connection | None = None
    ) -> None:
        self.now = 500.0
        self.connection = connection or Connection(
            role, PeerIdentity("real-boot", "real"), random_bytes=seeded_bytes(1), limits=limits or Limits()
        )
        self.role = role
        self.decoder = FrameDecoder()
        self.epoch = 0
        self.sequence = 0
        self.check = 0
        self.ack = 0
        self.ack_check = 0
        self.session_id = NO_SESSION

    def receive(self) -> list[Frame]:
        """All frames that the real side sends now."""
        frames: list[Frame] = []
        while data := self.connection.data_to_send(self.now):
            frames += frames_only(self.decoder.feed(data))
        for frame in frames:
            if frame.sequence:
                self.ack, self.ack_check = frame.sequence, crc32(frame.identity, self.ack_check)
        return frames

    def types(self) -> list[FrameType]:
        """The types of all frames that the real side sends now."""
        return [FrameType(frame.type) for frame in self.receive()]

    def send_raw(self, data: bytes) -> None:
        """Any bytes."""
        self.connection.receive(data, self.now)

    def send(
        self,
        kind: int,
        payload: bytes = b"",
        *,
        flags: int = 0,
        channel: int = 0,
        sequence: int | None = None,
        epoch: int | None = None,
        ack: int | None = None,
        ack_check: int | None = None,
        version: int = 1,
    ) -> None:
        """One frame: a sequenced one of the epoch with the right numbers, unless told otherwise."""
        if sequence is None:
            sequence = self.sequence + 1 if kind >= FrameType.OPEN else 0
        data = encode_frame(
            kind,
            payload,
            version=version,
            flags=flags,
            channel=channel,
            sequence=sequence,
            epoch=self.epoch if epoch is None else epoch,
            ack=self.ack if ack is None else ack,
            ack_check=self.ack_check if ack_check is None else ack_check,
        )
        if sequence == self.sequence + 1:
            self.sequence, self.check = sequence, crc32(data[4 : 4 + IDENTITY_BYTES], self.check)
        self.send_raw(data)

    def send_ack(self) -> None:
        """A right ACK."""
        self.send(FrameType.ACK, encode_progress(self.sequence, self.check))

    def numbers(self) -> Numbers:
        """What this peer has, truthfully, if it keeps nothing to send again."""
        return Numbers(self.session_id, self.sequence, self.check, self.ack, self.ack_check, self.sequence)

    def wait(self, seconds: float) -> None:
        """Let time pass; the real side does what is due."""
        self.now += seconds
        self.connection.handle_time(self.now)

    def take_challenge(self) -> int:
        """The nonce of the last CHALLENGE that the real side sends now."""
        nonces = [
            decode_challenge(frame.payload) for frame in self.receive() if frame.type == FrameType.CHALLENGE
        ]
        return nonces[-1]

    def send_hello(
        self, nonce: int, numbers: Numbers | None = None, versions: tuple[int, ...] = (1,)
    ) -> None:
        """A HELLO that echoes `nonce`."""
        hello = Hello(numbers or self.numbers(), OFFER, versions)
        self.send(FrameType.HELLO, encode_hello(hello), epoch=nonce, ack=0, ack_check=0)

    def send_welcome(self, nonce: int, numbers: Numbers, *, resumed: bool = False, version: int = 1) -> None:
        """A WELCOME for the HELLO that echoed `nonce`."""
        self.send(FrameType.WELCOME, encode_welcome(Welcome(version, resumed, numbers, OFFER)), epoch=nonce)

    def send_challenge(self, nonce: int) -> None:
        """A CHALLENGE."""
        self.send(FrameType.CHALLENGE, encode_challenge(nonce), epoch=0, ack=0, ack_check=0)

    def greet(self, nonce: int = 77) -> None:
        """Bring the link up and begin a new session."""
        self.connection.link_up(self.now)
        self.sequence = self.check = self.ack = self.ack_check = 0
        if self.role is Role.HOST:
            self.epoch = self.take_challenge()
            self.send_hello(self.epoch, Numbers(NO_SESSION, 0, 0, 0, 0, 0))
            assert self.types() == [FrameType.WELCOME]
            self.send_ack()
        else:
            self.receive()
            self.send_challenge(nonce)
            assert self.types() == [FrameType.HELLO]
            self.epoch = nonce
            self.session_id = b"raw session id.."
            self.send_welcome(nonce, Numbers(self.session_id, 0, 0, 0, 0, 0))
            assert self.types() == [FrameType.ACK]
        assert self.connection.opened
        self.session_id = self.connection.session_id
