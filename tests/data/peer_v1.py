# SPDX-License-Identifier: LGPL-2.1-or-later
"""A peer that speaks version 1 of the protocol and nothing else, written from docs/protocol.md.

FROZEN: it imports nothing of the product, and its bytes never change (a test holds its checksum), so that
it stays what is out there in guests that nobody updates. It does the least that version 1 asks for: it
greets, opens or accepts a channel, sends and takes whole messages, acknowledges, and closes.
"""

from __future__ import annotations

import struct
import zlib

KNOCK, CHALLENGE, HELLO, WELCOME, ACK, ERROR = 1, 2, 3, 4, 5, 6
OPEN, ACCEPT, DATA, CREDIT, CLOSE, CANCEL = 32, 33, 34, 35, 36, 37
END = 2
HEADER = struct.Struct(">4sBBHIIQIQQIQI")
IDENTITY = struct.Struct(">BBHIIQI")
LINK = struct.Struct(">QQIQ")
NUMBERS = struct.Struct(">16sQIQIQ")
WINDOW = 100_000


class Broken(Exception):
    """The other side does not speak version 1."""


class PeerV1:
    """One side of one link. Feed it with `receive`; send what `take_output` gives."""

    def __init__(
        self, *, host: bool, versions: tuple[int, ...] = (1,), features: int = 0, more: bytes = b""
    ) -> None:
        self.host = host
        self.versions = versions  # stated in HELLO
        self.features = features
        self.more = more  # what a later version adds behind the fields of HELLO and WELCOME
        self.agreed = 0  # the version in WELCOME
        self.session = b""
        self.refused: tuple[int, str] | None = None  # code and words of ERROR
        self.opened: tuple[int, str, bytes] | None = None  # channel, target, payload
        self.accepted: bytes | None = None  # payload of ACCEPT
        self.messages: list[bytes] = []
        self.closed: int | None = None  # code
        self._nonce = 0x1122334455667788
        self._epoch = 0
        self._output = b""
        self._buffer = b""
        self._sent = self._sent_check = 0
        self._got = self._got_check = 0
        if host:
            self._challenge()
        else:
            self._frame(KNOCK)

    def take_output(self) -> bytes:
        output, self._output = self._output, b""
        return output

    def receive(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            head = self._buffer[: HEADER.size]
            fields = HEADER.unpack(head)
            length = fields[5]
            if fields[0] != b"\xf5VMC" or zlib.crc32(head[:56]) != fields[12] or length > 65_536:
                raise Broken("no frame")
            if len(self._buffer) < HEADER.size + length:
                return
            payload = self._buffer[HEADER.size : HEADER.size + length]
            self._buffer = self._buffer[HEADER.size + length :]
            if zlib.crc32(payload) != fields[7]:
                raise Broken("a damaged payload")
            self._check(head)
            self._take(fields[2], fields[3], fields[4], fields[8], payload)

    def open(self, channel: int, target: bytes, payload: bytes = b"", priority: int = 2) -> None:
        self._frame(OPEN, struct.pack(">BQH", priority, WINDOW, len(target)) + target + payload, channel)

    def send(self, channel: int, message: bytes) -> None:
        self._frame(DATA, message, channel, END)

    def close(self, channel: int, code: int = 0, words: bytes = b"") -> None:
        self._frame(CLOSE, struct.pack(">H", code) + words, channel)

    def acknowledge(self) -> None:
        self._frame(ACK, struct.pack(">QI", self._sent, self._sent_check))

    def _check(self, head: bytes) -> None:
        """That the numbers in a header are those of version 1."""
        _, version, kind, _, _, _, sequence, _, epoch, ack, ack_check, _, _ = HEADER.unpack(head)
        if version != 1:
            raise Broken(f"a frame of version {version}")
        if sequence:
            if epoch != self._epoch or sequence != self._got + 1:
                raise Broken(f"sequence {sequence} after {self._got}")
            self._got, self._got_check = sequence, zlib.crc32(head[4:28], self._got_check)
        if kind >= ACK and epoch and epoch == self._epoch and kind != ERROR:
            if ack > self._sent or (ack == self._sent and ack_check != self._sent_check):
                raise Broken("an acknowledgement of what was not sent")

    def _take(self, kind: int, flags: int, channel: int, epoch: int, payload: bytes) -> None:
        if kind == KNOCK and self.host:
            self._challenge()
        elif kind == CHALLENGE and not self.host:
            (self._epoch,) = struct.unpack_from(">Q", payload)
            versions = bytes((len(self.versions), *self.versions))
            self._frame(HELLO, self._numbers() + self._offer() + versions + self._words())
        elif kind == HELLO and self.host and epoch == self._nonce:
            self._hello_came(payload)
        elif kind == WELCOME and not self.host and epoch == self._epoch:
            self.agreed, resumed, self.session = payload[0], payload[1] & 1, payload[2:18]
            if resumed:
                raise Broken("a resumed session, where none was named")
            self.acknowledge()
        elif kind == ERROR:
            self.refused = struct.unpack_from(">H", payload)[0], payload[2:].decode()
        elif kind == OPEN:
            _, _, length = struct.unpack_from(">BQH", payload)
            self.opened = channel, payload[11 : 11 + length].decode(), payload[11 + length :]
            self._frame(ACCEPT, struct.pack(">Q", WINDOW) + b"welcome", channel)
        elif kind == ACCEPT:
            self.accepted = payload[8:]
        elif kind == DATA:
            if not flags & END:
                raise Broken("this peer takes whole messages only")
            self.messages.append(payload)
            taken = sum(len(message) + 64 for message in self.messages)
            self._frame(CREDIT, struct.pack(">QQ", taken, taken + WINDOW), channel)
        elif kind in (CLOSE, CANCEL):
            (self.closed,) = struct.unpack_from(">H", payload)

    def _hello_came(self, payload: bytes) -> None:
        at = NUMBERS.size + 16
        versions = payload[at + 1 : at + 1 + payload[at]]
        if 1 not in versions:
            raise Broken(f"the guest speaks {list(versions)}")
        self.agreed, self._epoch, self.session = 1, self._nonce, b"frozen session 1"
        self._frame(WELCOME, bytes((1, 0)) + self._numbers() + self._offer() + self._words())

    def _challenge(self) -> None:
        self._frame(CHALLENGE, struct.pack(">Q", self._nonce))

    def _numbers(self) -> bytes:
        return NUMBERS.pack(self.session if self.host else bytes(16), 0, 0, 0, 0, 0)

    def _offer(self) -> bytes:
        return struct.pack(">QII", self.features, 100, 1_000_000)

    def _words(self) -> bytes:
        texts = (b"frozen boot", b"frozen 1")
        return b"".join(struct.pack(">H", len(text)) + text for text in texts) + self.more

    def _frame(self, kind: int, payload: bytes = b"", channel: int = 0, flags: int = 0) -> None:
        sequence = self._sent + 1 if kind >= OPEN else 0
        identity = IDENTITY.pack(1, kind, flags, channel, len(payload), sequence, zlib.crc32(payload))
        early = kind in (KNOCK, CHALLENGE)
        link = (0, 0, 0) if early else (self._epoch, self._got, self._got_check)
        head = b"\xf5VMC" + identity + LINK.pack(*link, 86_400_000 if self.host else 0)
        self._output += head + struct.pack(">I", zlib.crc32(head)) + payload
        if sequence:
            self._sent, self._sent_check = sequence, zlib.crc32(identity, self._sent_check)
