# SPDX-License-Identifier: LGPL-2.1-or-later
"""A hostile guest, or application, on a real socket: greets properly, then sends any frames it likes."""

from __future__ import annotations

import asyncio
import struct
from zlib import crc32

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
    decode_challenge,
    encode_hello,
    encode_progress,
)

OFFER = Offer(0, 1_024, 4_194_304, "raw-boot", "raw\x1b[2J\nguest")


def opening(target: str, window: int = 100_000, payload: bytes = b"") -> bytes:
    """The payload of an OPEN."""
    raw = target.encode()
    return struct.pack(">BQH", 2, window, len(raw)) + raw + payload


class RawGuest:
    """The GUEST side of a link."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = FrameDecoder()
        self._unread: list[Frame] = []
        self._epoch = 0
        self._sequence = self._check = self._ack = self._ack_check = 0

    @classmethod
    async def connect(cls, path: str) -> RawGuest:
        """An application of the hub that serves `path`."""
        return cls(*await asyncio.open_unix_connection(path))

    def send(self, kind: FrameType, payload: bytes = b"", *, channel: int = 0, epoch: int = -1) -> None:
        """Queue one frame, with the right numbers."""
        sequence = self._sequence + 1 if kind >= FrameType.OPEN else 0
        data = encode_frame(
            kind,
            payload,
            flags=2 if kind is FrameType.DATA else 0,
            channel=channel,
            sequence=sequence,
            epoch=self._epoch if epoch < 0 else epoch,
            ack=self._ack if epoch < 0 else 0,
            ack_check=self._ack_check if epoch < 0 else 0,
        )
        if sequence:
            self._sequence, self._check = sequence, crc32(data[4 : 4 + IDENTITY_BYTES], self._check)
        self._writer.write(data)

    def send_raw(self, data: bytes) -> None:
        """Queue any bytes."""
        self._writer.write(data)

    async def expect(self, *kinds: FrameType) -> Frame:
        """The next frame of one of these kinds; others are skipped. Fails after 10 s."""
        async with asyncio.timeout(10):
            while True:
                while self._unread:
                    frame = self._unread.pop(0)
                    if frame.sequence == self._ack + 1:
                        self._ack, self._ack_check = frame.sequence, crc32(frame.identity, self._ack_check)
                    if frame.type in kinds:
                        return frame
                await self._writer.drain()
                data = await self._reader.read(65_536)
                assert data, "the hub has closed the link"
                self._unread += frames_only(self._decoder.feed(data))

    async def greet(self) -> None:
        """Begin a new session."""
        self.send(FrameType.KNOCK, epoch=0)
        nonce = decode_challenge((await self.expect(FrameType.CHALLENGE)).payload)
        hello = Hello(Numbers(NO_SESSION, 0, 0, 0, 0, 0), OFFER, (1,))
        self.send(FrameType.HELLO, encode_hello(hello), epoch=nonce)
        while (await self.expect(FrameType.WELCOME)).epoch != nonce:
            pass
        self._epoch = nonce
        self._sequence = self._check = self._ack = self._ack_check = 0
        self.acknowledge()

    def acknowledge(self) -> None:
        """A right ACK."""
        self.send(FrameType.ACK, encode_progress(self._sequence, self._check))

    async def answer(self, channel: int) -> Frame:
        """The ACCEPT or CLOSE of a channel that was opened."""
        while True:
            frame = await self.expect(FrameType.ACCEPT, FrameType.CLOSE, FrameType.CANCEL)
            if frame.channel == channel:
                return frame

    async def close(self) -> None:
        """End the link."""
        self._writer.close()
        await self._writer.wait_closed()
