# SPDX-License-Identifier: LGPL-2.1-or-later
"""The codec: frames to bytes and bytes to frames, self-synchronising. `docs/protocol.md` is its
specification.

A frame is a header of 60 bytes, all big-endian, and a payload. The header's first part (`identity`: what a
sequenced frame is, the same each time it is sent) stands apart from its second part (the link's: epoch,
acknowledgement, tick), so that a frame that is sent again costs only the second.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Final, NamedTuple
from zlib import crc32

from fence_vmchannel.records import Record

MAGIC: Final = b"\xf5VMC"
"""Begins every frame. 0xF5 occurs in no UTF-8 text."""

HEADER_BYTES: Final = 60

MAX_PAYLOAD: Final = 65_536
"""Largest payload of one frame, in bytes. A header that announces more is damage."""

MAX_FRAGMENT: Final = 32_768
"""Largest payload of one DATA frame, in bytes: a guest's write to its port takes at most this at once."""

FRAME_COST: Final = 64
"""What a DATA frame takes from a window beyond its bytes, so that empty messages are bounded too."""

MAX_BAD_HEADERS: Final = 1_000
"""So many false headers without one good frame, and the decoder gives up: chance gives one per 4 GiB."""


class FrameType(IntEnum):
    """What a frame is. Values never change; below 32 unsequenced, from 32 sequenced (acknowledged, in
    order)."""

    KNOCK = 1  # GUEST: challenge me
    CHALLENGE = 2  # HOST: the nonce that this greeting must echo
    HELLO = 3  # GUEST: who I am, what I have; layout frozen for ever
    WELCOME = 4  # HOST: which session this is
    ACK = 5  # acknowledgement and heartbeat
    ERROR = 6  # I end this link, and why
    OPEN = 32  # a new channel to a service
    ACCEPT = 33  # the answer to OPEN; a refusal is CLOSE
    DATA = 34  # a fragment of a message
    CREDIT = 35  # the consumer has taken so much, and takes so much more
    CLOSE = 36  # behind the channel's data
    CANCEL = 37  # before the channel's queued data, which is dropped


class Flags(IntEnum):
    """Bits of a frame's flags; unknown ones are ignored. (No IntFlag: it makes every start 2 ms slower.)"""

    IGNORABLE = 1  # a receiver that does not know the type skips the frame
    END = 2  # DATA: last fragment of its message


FIRST_SEQUENCED: Final = 32
END: Final = int(Flags.END)
IGNORABLE: Final = int(Flags.IGNORABLE)

_IDENTITY = struct.Struct(">BBHIIQI")  # version, type, flags, channel, length, sequence, payload CRC
_LINK = struct.Struct(">QQIQ")  # epoch, ack, ack check, tick
_CRC = struct.Struct(">I")
_HEADER = struct.Struct(">4sBBHIIQIQQIQI")
IDENTITY_BYTES: Final = _IDENTITY.size
_CRC_AT = HEADER_BYTES - _CRC.size


class Frame(NamedTuple):
    """One frame. `identity` is its header's bytes 4 to 27, over which the running checksum goes."""

    version: int
    type: int  # an int, not a FrameType: later versions have more
    flags: int
    channel: int
    sequence: int  # 0: unsequenced
    epoch: int  # the nonce of the greeting; 0 in KNOCK and CHALLENGE
    ack: int  # last sequence received in order
    ack_check: int  # running checksum at `ack`
    tick: int  # HOST: its clock, ms; GUEST: the last one seen
    payload: bytes
    payload_crc: int
    identity: bytes


class Damage(Record):
    """Bytes that were no frame and have been skipped."""

    skipped_bytes: int


def pack_identity(
    version: int,
    kind: int,
    flags: int,
    channel: int,
    sequence: int,
    payload: bytes,
    payload_crc: int | None = None,
) -> bytes:
    """The part of a header that says what the frame is (24 bytes). `payload_crc`: its CRC, if it is known."""
    crc = crc32(payload) if payload_crc is None else payload_crc
    return _IDENTITY.pack(version, kind, flags, channel, len(payload), sequence, crc)


def pack_header(identity: bytes, epoch: int, ack: int, ack_check: int, tick: int) -> bytes:
    """A whole header: send it, then the payload that `identity` was made from."""
    head = MAGIC + identity + _LINK.pack(epoch, ack, ack_check, tick)
    return head + _CRC.pack(crc32(head))


def encode_frame(
    kind: int,
    payload: bytes = b"",
    *,
    version: int = 1,
    flags: int = 0,
    channel: int = 0,
    sequence: int = 0,
    epoch: int = 0,
    ack: int = 0,
    ack_check: int = 0,
    tick: int = 0,
) -> bytes:
    """The bytes of one frame."""
    identity = pack_identity(version, kind, flags, channel, sequence, payload)
    return pack_header(identity, epoch, ack, ack_check, tick) + payload


def unpack_identity(identity: bytes) -> tuple[int, int, int, int, int, int, int]:
    """Version, type, flags, channel, payload length, sequence, payload CRC.

    Raises:
        ValueError: it has not IDENTITY_BYTES.
    """
    if len(identity) != IDENTITY_BYTES:
        raise ValueError(f"an identity of {len(identity)} bytes")
    version, kind, flags, channel, length, sequence, crc = _IDENTITY.unpack(identity)
    return version, kind, flags, channel, length, sequence, crc


class FrameDecoder:
    """Cut a byte stream into frames; skip what is none, and say so.

    It starts anywhere, keeps less than one maximum frame between calls, and looks at no byte more than a few
    times.

    Attributes:
        hopeless: true once MAX_BAD_HEADERS false headers came in a row; then everything is skipped.
    """

    def __init__(self) -> None:
        self.hopeless = False
        self._buffer = bytearray()
        self._need = HEADER_BYTES  # length at which it is worth looking at the buffer again
        self._bad_headers = 0

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame | Damage]:
        """Take received bytes; return each frame that is now whole, and each damage, in order."""
        if self.hopeless:
            return [Damage(len(data))] if data else []
        source = data if isinstance(data, bytes) else bytes(data)
        items: list[Frame | Damage] = []
        at = 0
        while self._buffer:  # complete what waits, and no more: the rest is read where it is
            missing = self._need - len(self._buffer)
            self._buffer += source[at : at + missing]
            at += missing
            if len(self._buffer) < self._need:
                return items
            begun = bytes(self._buffer)
            self._buffer = bytearray(begun[self._parse(begun, items) :])
        self._buffer = bytearray(source[self._parse(source, items, at) :])
        return items

    @property
    def pending(self) -> bool:
        """Whether the beginning of a frame waits for the rest."""
        return bool(self._buffer)

    def abandon(self) -> list[Frame | Damage]:
        """Wait no longer for the rest of a frame; return what stands behind its beginning.

        The writer of a half frame may be dead. Its successor's frames, which the half one would swallow as
        payload until it is complete, are found. (So are frames that a message holds; their epoch is wrong.)
        """
        items: list[Frame | Damage] = []
        source = bytes(self._buffer)
        self._buffer = bytearray(source[self._parse(source, items, wait=False) :])
        return items

    def _parse(self, source: bytes, items: list[Frame | Damage], at: int = 0, *, wait: bool = True) -> int:
        """Append what `source` holds from `at` to `items`; returns the offset of what is not done with.

        Without `wait` a header whose payload is not all there is taken for damage.
        """
        while at < len(source):
            start = at if source.startswith(MAGIC, at) else self._find_magic(source, at)
            if start > at:
                _add_damage(items, start - at)
                at = start
            if len(source) - at < HEADER_BYTES:
                self._need = HEADER_BYTES
                return at
            header = _HEADER.unpack_from(source, at)
            end = at + HEADER_BYTES + self._payload_bytes(source, at, header)
            if end < at + HEADER_BYTES or (end > len(source) and not wait):  # go on behind its first byte
                _add_damage(items, 1)
                at += 1
                if self.hopeless:
                    _add_damage(items, len(source) - at)
                    return len(source)
                continue
            if end > len(source):
                self._need = end - at
                return at
            frame = _read_frame(source, at, end, header)
            if frame is None:
                # The header vouches for the length: skip the whole frame. Looking for frames inside a
                # damaged payload would let a sender make us checksum the same bytes a thousand times.
                _add_damage(items, end - at)
            else:
                self._bad_headers = 0
                items.append(frame)
            at = end
        self._need = HEADER_BYTES
        return at

    def _payload_bytes(self, source: bytes, at: int, header: tuple[Any, ...]) -> int:
        """The payload length that the header at `at` states, or -1 if it is no header."""
        length, crc = header[5], header[-1]
        if length <= MAX_PAYLOAD and crc32(source[at : at + _CRC_AT]) == crc:
            return int(length)
        self._bad_headers += 1
        self.hopeless = self._bad_headers >= MAX_BAD_HEADERS
        return -1

    @staticmethod
    def _find_magic(source: bytes, at: int) -> int:
        """Where the next magic begins, or what could become one at the very end, or the end."""
        found = source.find(MAGIC, at)
        if found >= 0:
            return found
        for size in range(min(len(MAGIC) - 1, len(source) - at), 0, -1):
            if source.endswith(MAGIC[:size]):
                return len(source) - size
        return len(source)


def _read_frame(source: bytes, at: int, end: int, header: tuple[Any, ...]) -> Frame | None:
    _, version, kind, flags, channel, _, sequence, payload_crc, epoch, ack, ack_check, tick, _ = header
    payload = source[at + HEADER_BYTES : end]
    if crc32(payload) != payload_crc:
        return None
    identity = source[at + 4 : at + 4 + IDENTITY_BYTES]
    numbers = sequence, epoch, ack, ack_check, tick
    return Frame(version, kind, flags, channel, *numbers, payload, payload_crc, identity)


def _add_damage(items: list[Frame | Damage], count: int) -> None:
    """Add damage, joined with damage just before it."""
    if not count:
        return
    last = items[-1] if items else None
    if isinstance(last, Damage):
        items[-1] = Damage(last.skipped_bytes + count)
    else:
        items.append(Damage(count))


def frames_only(items: list[Frame | Damage]) -> Iterator[Frame]:
    """The frames among what a decoder gave."""
    return (item for item in items if isinstance(item, Frame))
