# SPDX-License-Identifier: LGPL-2.1-or-later
"""The form in which a session leaves a process, for another process or host to go on with it.

Magic, format version, CRC-32 and length, then a `SavedSession` as tag-length-value. It is as large as what
the session holds: data queued and not acknowledged, which `Limits` bound. It carries no secret, but it
decides what the peer's channels are: keep it where only the daemon may write.
"""

from __future__ import annotations

import struct
from typing import Final
from zlib import crc32

from fence_vmchannel.errors import LocalProtocolError, RemoteProtocolError
from fence_vmchannel.records import Record, tagged
from fence_vmchannel.tlv import decode, encode

FORMAT: Final = 1
MAX_STATE_BYTES: Final = 268_435_456
"""A larger state is refused on both sides."""

_MAGIC: Final = b"VMCS"
_HEAD = struct.Struct(">4sHII")  # magic, format, CRC of the body, length of the body


class SavedFrame(Record):
    """A sequenced frame that is not acknowledged."""

    identity: bytes = tagged(1)
    payload: bytes = tagged(2)


class SavedFragment(Record):
    """A DATA frame without a number yet."""

    payload: bytes = tagged(1)
    flags: int = tagged(2)


class SavedChannel(Record):
    """One channel; fields as in `channel_state.Channel`."""

    number: int = tagged(1)
    target: str = tagged(2)
    priority: int = tagged(3)
    state: str = tagged(4)
    open_payload: bytes = tagged(5)
    accept_payload: bytes = tagged(6)
    window: int = tagged(7)
    sent: int = tagged(8)
    scheduled: int = tagged(9)
    delivered: int = tagged(10)
    send_limit: int = tagged(11)
    largest_window: int = tagged(12)
    received: int = tagged(13)
    consumed: int = tagged(14)
    receive_limit: int = tagged(15)
    queue: tuple[SavedFragment, ...] = tagged(16, default=())
    close_code: int | None = tagged(17, default=None)
    close_reason: str = tagged(18, default="")


class SavedControl(Record):
    """A control frame whose turn has not come: its type and channel."""

    kind: int = tagged(1)
    channel: int = tagged(2)


class SavedRefusal(Record):
    """A refusal of a channel that the peer opened beyond a limit."""

    channel: int = tagged(1)
    code: int = tagged(2)
    reason: str = tagged(3)


class SavedChannels(Record):
    """All that a `Multiplexer` holds."""

    next_number: int = tagged(1)
    peer_highest: int = tagged(2)
    channels: tuple[SavedChannel, ...] = tagged(3, default=())
    control: tuple[SavedControl, ...] = tagged(4, default=())
    refusals: tuple[SavedRefusal, ...] = tagged(5, default=())


class SavedSession(Record):
    """All that a `Session` holds, with its channels."""

    role: str = tagged(1)
    session_id: bytes = tagged(2)
    version: int = tagged(3)
    features: int = tagged(4)
    tick: int = tagged(7)
    proposed_id: bytes = tagged(8)
    proposed_version: int = tagged(9)
    acknowledged: int = tagged(10)
    acknowledged_check: int = tagged(11)
    received: int = tagged(12)
    received_check: int = tagged(13)
    channels: SavedChannels = tagged(14)
    frames: tuple[SavedFrame, ...] = tagged(15, default=())
    peer_boot_id: str | None = tagged(5, default=None)
    peer_software: str | None = tagged(6, default=None)


def pack(session: SavedSession) -> bytes:
    """The bytes of a saved session.

    Raises:
        LocalProtocolError: more than MAX_STATE_BYTES.
    """
    body = encode(session)
    if len(body) > MAX_STATE_BYTES:
        raise LocalProtocolError(
            f"the session holds {len(body)} bytes, at most {MAX_STATE_BYTES} can be saved"
        )
    return seal(_MAGIC, FORMAT, body)


def unpack(state: bytes) -> SavedSession:
    """Parse what `pack` made.

    Raises:
        RemoteProtocolError: it is damaged, too large, or of another format version.
    """
    return decode(SavedSession, unseal(_MAGIC, FORMAT, state, MAX_STATE_BYTES))


def seal(magic: bytes, form: int, body: bytes) -> bytes:
    """Put a head before `body`, by which damage, another format and another kind of content show."""
    return _HEAD.pack(magic, form, crc32(body), len(body)) + body


def unseal(magic: bytes, form: int, sealed: bytes, most: int) -> bytes:
    """The body of what `seal` made.

    Raises:
        RemoteProtocolError: it is damaged, over `most` bytes, of another format or kind.
    """
    if len(sealed) < _HEAD.size:
        raise RemoteProtocolError("what was saved is too short")
    found, its_form, crc, length = _HEAD.unpack_from(sealed)
    body = sealed[_HEAD.size :]
    if found != magic or its_form != form:
        raise RemoteProtocolError("what was saved is not of this format")
    if length != len(body) or length > most or crc32(body) != crc:
        raise RemoteProtocolError("what was saved is damaged")
    return body
