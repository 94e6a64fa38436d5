# SPDX-License-Identifier: LGPL-2.1-or-later
"""The payloads of the greeting (CHALLENGE, HELLO, WELCOME) and of ACK and ERROR. HELLO's layout is frozen for
ever.

Each begins with a fixed part; a receiver ignores what follows the fields it knows, so that a later version
can add.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Final

from fence_vmchannel.errors import RemoteProtocolError
from fence_vmchannel.records import Record

VERSIONS: Final = (1,)
"""Protocol versions spoken here, best first."""

GREETING_VERSION: Final = 1
"""Stands in the header of greeting frames, whatever is negotiated: their layout never changes."""

NO_SESSION: Final = bytes(16)
MAX_WORDS: Final = 200  # characters of a boot id, of a software name

_CHALLENGE = struct.Struct(">Q")
_NUMBERS = struct.Struct(">16sQIQIQ")  # session id, sent, its check, received, its check, acknowledged
_OFFER = struct.Struct(">QII")  # features, channels, largest window
_CHOICE = struct.Struct(">BB")  # version, resumed
_WHY = struct.Struct(">H")
_PROGRESS = struct.Struct(">QI")  # last sequence sent on this link, its check


class EndCode(IntEnum):
    """Why a link ends: the code in ERROR frames. Values never change."""

    PROTOCOL = 1  # a rule of the protocol was broken
    NO_COMMON_VERSION = 2
    UNKNOWN_FRAME = 3  # a type that is not ignorable
    GARBAGE = 4  # too much that is no frame


class Numbers(Record):
    """How far one side is in a session."""

    session_id: bytes  # 16 bytes; all zero: none
    sent: int  # last sequence given out
    sent_check: int  # running checksum of all frames up to it
    received: int  # last sequence received in order
    received_check: int
    acknowledged: int  # frames up to this one cannot be sent again


class Offer(Record):
    """What one side can do and allows."""

    features: int  # bit set
    channels: int
    max_window_bytes: int
    boot_id: str
    software: str


class Hello(Record):
    """GUEST: I echo your nonce (as epoch); this is who I am and what I have of the session."""

    numbers: Numbers
    offer: Offer
    versions: tuple[int, ...]


class Welcome(Record):
    """HOST: this is the session, new or resumed, and what I have of it."""

    version: int
    resumed: bool
    numbers: Numbers
    offer: Offer


def common_version(theirs: Iterable[int], ours: Iterable[int] = VERSIONS) -> int:
    """The highest version that both sides speak; 0 if there is none."""
    return max(set(theirs) & set(ours), default=0)


def encode_challenge(nonce: int) -> bytes:
    """The payload of CHALLENGE."""
    return _CHALLENGE.pack(nonce)


def decode_challenge(payload: bytes) -> int:
    """The nonce.

    Raises:
        RemoteProtocolError: too short, or the nonce is 0.
    """
    if len(payload) < _CHALLENGE.size:
        raise RemoteProtocolError("CHALLENGE is too short")
    nonce: int = _CHALLENGE.unpack_from(payload)[0]
    if not nonce:
        raise RemoteProtocolError("CHALLENGE with nonce 0")
    return nonce


def encode_hello(hello: Hello) -> bytes:
    """The payload of HELLO."""
    return b"".join(
        (
            _pack_numbers(hello.numbers),
            _OFFER.pack(hello.offer.features, hello.offer.channels, hello.offer.max_window_bytes),
            bytes((len(hello.versions), *hello.versions)),
            _pack_words(hello.offer.boot_id),
            _pack_words(hello.offer.software),
        )
    )


def decode_hello(payload: bytes) -> Hello:
    """Parse HELLO.

    Raises:
        RemoteProtocolError: it is too short, or its words are not UTF-8.
    """
    reader = _Reader(payload, "HELLO")
    numbers = Numbers(*reader.unpack(_NUMBERS))
    features, channels, window = reader.unpack(_OFFER)
    versions = tuple(reader.take(reader.take(1)[0]))
    offer = Offer(features, channels, window, reader.words(), reader.words())
    return Hello(numbers, offer, versions)


def encode_welcome(welcome: Welcome) -> bytes:
    """The payload of WELCOME."""
    return b"".join(
        (
            _CHOICE.pack(welcome.version, welcome.resumed),
            _pack_numbers(welcome.numbers),
            _OFFER.pack(welcome.offer.features, welcome.offer.channels, welcome.offer.max_window_bytes),
            _pack_words(welcome.offer.boot_id),
            _pack_words(welcome.offer.software),
        )
    )


def decode_welcome(payload: bytes) -> Welcome:
    """Parse WELCOME.

    Raises:
        RemoteProtocolError: it is too short, or its words are not UTF-8.
    """
    reader = _Reader(payload, "WELCOME")
    version, resumed = reader.unpack(_CHOICE)
    numbers = Numbers(*reader.unpack(_NUMBERS))
    features, channels, window = reader.unpack(_OFFER)
    offer = Offer(features, channels, window, reader.words(), reader.words())
    return Welcome(version, bool(resumed & 1), numbers, offer)


def encode_end(code: EndCode, reason: str) -> bytes:
    """The payload of ERROR."""
    return _WHY.pack(code) + reason[:MAX_WORDS].encode("utf-8", "replace")


def decode_end(payload: bytes) -> tuple[int, str]:
    """Code (perhaps of a later version) and reason of ERROR; never raises: it is the end anyway."""
    if len(payload) < _WHY.size:
        return EndCode.PROTOCOL, ""
    return _WHY.unpack_from(payload)[0], payload[_WHY.size :].decode("utf-8", "replace")[:MAX_WORDS]


def encode_progress(sent: int, check: int) -> bytes:
    """The payload of ACK: the last sequence that was sent on this link before it, and the running checksum
    there."""
    return _PROGRESS.pack(sent, check)


def decode_progress(payload: bytes) -> tuple[int, int]:
    """The last sequence sent, and its check.

    Raises:
        RemoteProtocolError: too short.
    """
    if len(payload) < _PROGRESS.size:
        raise RemoteProtocolError("ACK is too short")
    sent, check = _PROGRESS.unpack_from(payload)
    return sent, check


def _pack_numbers(numbers: Numbers) -> bytes:
    return _NUMBERS.pack(
        numbers.session_id,
        numbers.sent,
        numbers.sent_check,
        numbers.received,
        numbers.received_check,
        numbers.acknowledged,
    )


def _pack_words(text: str) -> bytes:
    raw = text[:MAX_WORDS].encode("utf-8", "replace")
    return _WHY.pack(len(raw)) + raw


class _Reader:
    """Take a payload apart from its beginning; each step checks that enough is there."""

    def __init__(self, payload: bytes, what: str) -> None:
        self._payload = payload
        self._what = what
        self._at = 0

    def take(self, size: int) -> bytes:
        raw = self._payload[self._at : self._at + size]
        if len(raw) < size:
            raise RemoteProtocolError(f"{self._what} is too short")
        self._at += size
        return raw

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size))

    def words(self) -> str:
        (size,) = self.unpack(_WHY)
        try:
            return self.take(size).decode("utf-8")[:MAX_WORDS]
        except UnicodeDecodeError as error:
            raise RemoteProtocolError(f"{self._what}: words are not UTF-8") from error
