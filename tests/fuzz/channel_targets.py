# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parsers of the channel library: frames, greetings, messages, local applications, ports."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from fence_vmchannel.addresses import parse_address
from fence_vmchannel.core.frames import (
    HEADER_BYTES,
    MAGIC,
    MAX_BAD_HEADERS,
    MAX_PAYLOAD,
    Damage,
    Frame,
    FrameDecoder,
    FrameType,
    encode_frame,
)
from fence_vmchannel.core.greeting import (
    MAX_WORDS,
    EndCode,
    decode_challenge,
    decode_end,
    decode_hello,
    decode_progress,
    decode_welcome,
    encode_challenge,
    encode_hello,
    encode_progress,
    encode_welcome,
)
from fence_vmchannel.discovery import parse_uevent
from fence_vmchannel.errors import LocalProtocolError, RemoteProtocolError
from fence_vmchannel.hub.events import PeerConnected, PeerStatus, PortAdded, ServiceOffered
from fence_vmchannel.hub.local_protocol import (
    HubInfo,
    OfferQuery,
    Origin,
    decode_local,
    encode_local,
    gather_status,
)
from fence_vmchannel.messages import FenceGreeting, decode_message, encode_message
from fence_vmchannel.tlv import decode, encode
from tests.fuzz.target import Plan, Target
from tests.unit.channel import golden_vectors as golden

# --- frames ---


def fuzz_frames(data: bytes) -> None:
    """Any bytes, cut anywhere: every byte is accounted for, a whole frame is what it says, and little is
    held."""
    plan = Plan(data)
    decoder = FrameDecoder()
    given = told = 0
    while not plan.over:
        piece = _piece(plan)
        given += len(piece)
        told += _check(decoder.feed(piece))
        assert 0 <= given - told < HEADER_BYTES + MAX_PAYLOAD, "bytes are lost, or too many are held"
    told += _check(decoder.abandon())
    assert 0 <= given - told < HEADER_BYTES
    decoder.feed(
        bytes(HEADER_BYTES)
    )  # what is held is no header then, or a header that waits for its payload
    decoder.abandon()
    if not decoder.hopeless:
        items = decoder.feed(encode_frame(FrameType.DATA, b"behind it", epoch=7))
        assert [item for item in items if isinstance(item, Frame)], "a frame behind damage is not found"


def _piece(plan: Plan) -> bytes:
    """Raw bytes, or a frame that is right but for what the plan wants."""
    kind = plan.number()
    if kind < 64:
        return plan.sized()
    if kind < 80:
        return MAGIC * plan.number()
    frame = bytearray(
        encode_frame(
            plan.number(),
            plan.sized() * (1 + kind % 3),
            version=plan.number(),
            flags=plan.number(2),
            channel=plan.number(4),
            sequence=plan.number(8),
            epoch=plan.number(8),
            ack=plan.number(8),
            ack_check=plan.number(4),
            tick=plan.number(8),
        )
    )
    if kind >= 200:  # one wrong bit
        frame[plan.number(2) % len(frame)] ^= 1 << kind % 8
    return bytes(frame[: len(frame) - (kind % 8 if kind >= 240 else 0)])


def _check(items: list[Frame | Damage]) -> int:
    """How many bytes these account for."""
    size = 0
    for item in items:
        if isinstance(item, Damage):
            assert item.skipped_bytes > 0
            size += item.skipped_bytes
        else:
            size += HEADER_BYTES + len(item.payload)
            again = _encode(item)
            assert again[4 : 4 + len(item.identity)] == item.identity
            assert FrameDecoder().feed(again) == [item]
    return size


def _encode(frame: Frame) -> bytes:
    return encode_frame(
        frame.type,
        frame.payload,
        version=frame.version,
        flags=frame.flags,
        channel=frame.channel,
        sequence=frame.sequence,
        epoch=frame.epoch,
        ack=frame.ack,
        ack_check=frame.ack_check,
        tick=frame.tick,
    )


# --- greeting ---


def fuzz_greeting(data: bytes) -> None:
    """Each payload of a greeting is parsed or refused; what was parsed is the same when it is written and
    read again."""
    which, payload = data[:1], data[1:]
    with suppress(RemoteProtocolError):
        match (which or b"\0")[0] % 5:
            case 0:
                hello = decode_hello(payload)
                assert decode_hello(encode_hello(hello)) == hello
                assert len(hello.offer.boot_id) <= MAX_WORDS
            case 1:
                welcome = decode_welcome(payload)
                assert decode_welcome(encode_welcome(welcome)) == welcome
                assert len(welcome.offer.software) <= MAX_WORDS
            case 2:
                nonce = decode_challenge(payload)
                assert decode_challenge(encode_challenge(nonce)) == nonce != 0
            case 3:
                progress = decode_progress(payload)
                assert decode_progress(encode_progress(*progress)) == progress
            case _:
                code, reason = decode_end(payload)
                assert 0 <= code < 2**16
                assert len(reason) <= MAX_WORDS


# --- messages ---


def fuzz_messages(data: bytes) -> None:
    """A message of the fence service is parsed or refused, and says the same when it is written again."""
    with suppress(RemoteProtocolError):
        message = decode_message(data)
        assert decode_message(encode_message(message)) == message
    with suppress(RemoteProtocolError):
        greeting = decode(FenceGreeting, data)
        assert decode(FenceGreeting, encode(greeting)) == greeting


def fuzz_local(data: bytes) -> None:
    """The same for what hub and application say to each other."""
    with suppress(RemoteProtocolError):
        message = decode_local(data)
        assert message is None or decode_local(encode_local(message)) == message
    plan = Plan(data)
    greeting = plan.sized()
    items: list[bytes] = []
    while not plan.over:
        items.append(plan.sized())
    with suppress(RemoteProtocolError):
        status = gather_status(greeting, items)
        assert len(status.peers) + len(status.services) <= len(items)


def fuzz_address(data: bytes) -> None:
    """The target of an OPEN is an address or none; an address means the same when it is written again."""
    with suppress(LocalProtocolError):
        address = parse_address(data.decode("utf-8", "replace"))
        assert parse_address(str(address)) == address
        assert address.service


def fuzz_uevents(data: bytes) -> None:
    """A netlink datagram is an event of the kernel or none; nothing raises."""
    event = parse_uevent(data)
    assert event is None or len(event.action + event.subsystem + event.device) <= len(data)


_STATUS: Final = (
    encode_local(HubInfo("vmchanneld 1", "boot")),
    encode_local(PeerStatus("vm1", "org.vmchannel.0", "vm", True, True, "00", "guest", 1, 2, 3, "", "key")),
    encode_local(ServiceOffered("org.example.echo", "hub")),
)
_UEVENT: Final = b"add@/devices/virtio-ports/vport0p1\0ACTION=add\0SUBSYSTEM=virtio-ports\0DEVNAME=vport0p1\0"


def _sized(*pieces: bytes) -> bytes:
    return b"".join(len(piece).to_bytes(2, "big") + piece for piece in pieces)


def _raw(*pieces: bytes) -> bytes:
    """Pieces for `fuzz_frames` that are fed as they are."""
    return b"".join(b"\0" + _sized(piece) for piece in pieces)


_VECTORS: Final = tuple(golden.frame_vectors().values())
_GREETINGS: Final = ("HELLO", "WELCOME", "CHALLENGE", "ACK", "ERROR")

TARGETS: Final = (
    Target(
        "frames",
        fuzz_frames,
        (
            _raw(*_VECTORS),
            _raw(_VECTORS[0][:30], _VECTORS[0][30:], b"noise", _VECTORS[3]),
            _raw(_VECTORS[8][:-1], *_VECTORS),
            bytes((70, 250)) * (MAX_BAD_HEADERS // 15),
            bytes((100, FrameType.DATA, 0, 40)) + bytes(range(80)),
            bytes((210, FrameType.OPEN, 0, 40)) + bytes(range(80)),
            bytes((250, FrameType.OPEN, 0, 40)) + bytes(range(80)),
        ),
    ),
    Target(
        "greeting",
        fuzz_greeting,
        (
            *(bytes((index,)) + golden.PAYLOADS[name] for index, name in enumerate(_GREETINGS)),
            b"\4" + EndCode.GARBAGE.to_bytes(2, "big") + b"\xff" * 900,
        ),
    ),
    Target("messages", fuzz_messages, tuple(golden.read("messages-v1.json").values())),
    Target(
        "local",
        fuzz_local,
        (
            *_STATUS,
            _sized(*_STATUS),
            encode_local(OfferQuery("org.example.x")),
            encode_local(Origin("vm1", "org.vmchannel.0", "vm", b"payload", "key")),
            encode_local(PortAdded("org.vmchannel.0", "vm1", "key")),
            encode_local(PeerConnected("vm1", "org.vmchannel.0", "00", False, "guest", "key")),
        ),
    ),
    Target(
        "addresses",
        fuzz_address,
        (b"org.example.echo", b"vm,1\n/x/org.vmchannel.1:org.example.echo", b".hub", b"/:x", b"a" * 1_025),
    ),
    Target("uevents", fuzz_uevents, (_UEVENT, b"libudev\0\xfe\xed", b"add@/\0=\0==\0\xff=\xff\0")),
)
