# SPDX-License-Identifier: LGPL-2.1-or-later
"""The codec: what goes in comes out, any cut is the same, any bytes are survived."""

from __future__ import annotations

import struct
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.core.frames import (
    HEADER_BYTES,
    MAGIC,
    MAX_BAD_HEADERS,
    MAX_PAYLOAD,
    Damage,
    Frame,
    FrameDecoder,
    encode_frame,
    frames_only,
    unpack_identity,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
ENCODED = st.builds(
    encode_frame,
    st.integers(0, 255),
    st.binary(max_size=300),
    version=st.integers(0, 255),
    flags=st.integers(0, 65_535),
    channel=U32,
    sequence=U64,
    epoch=U64,
    ack=U64,
    ack_check=U32,
    tick=U64,
)


def decode_all(stream: bytes, step: int) -> list[Frame | Damage]:
    decoder = FrameDecoder()
    items: list[Frame | Damage] = []
    for at in range(0, len(stream), step):
        items += decoder.feed(stream[at : at + step])
    return items


def forged_header(length: int) -> bytes:
    """A header with a right checksum that announces `length` bytes."""
    head = MAGIC + struct.pack(">BBHIIQIQQIQ", 1, 34, 0, 1, length, 1, 0, 0, 0, 0, 0)
    return head + struct.pack(">I", crc32(head))


@given(
    st.integers(0, 255),
    st.binary(max_size=MAX_PAYLOAD),
    st.integers(0, 65_535),
    U32,
    U64,
    U64,
    U64,
    U32,
    U64,
)
def test_a_frame_comes_out_as_it_went_in(
    kind: int,
    payload: bytes,
    flags: int,
    channel: int,
    sequence: int,
    epoch: int,
    ack: int,
    check: int,
    tick: int,
) -> None:
    data = encode_frame(
        kind,
        payload,
        version=3,
        flags=flags,
        channel=channel,
        sequence=sequence,
        epoch=epoch,
        ack=ack,
        ack_check=check,
        tick=tick,
    )
    (frame,) = FrameDecoder().feed(data)
    assert isinstance(frame, Frame)
    numbers = sequence, epoch, ack, check, tick
    assert frame[:-1] == (3, kind, flags, channel, *numbers, payload, crc32(payload))
    assert unpack_identity(frame.identity) == (
        3,
        kind,
        flags,
        channel,
        len(payload),
        sequence,
        crc32(payload),
    )
    assert len(data) == HEADER_BYTES + len(payload)


@given(st.lists(ENCODED, max_size=6), st.integers(1, 97))
def test_any_cut_of_the_stream_gives_the_same_frames(frames: list[bytes], step: int) -> None:
    stream = b"".join(frames)
    assert decode_all(stream, step) == decode_all(stream, max(1, len(stream)))
    assert len(decode_all(stream, step)) == len(frames)


@given(st.lists(st.one_of(ENCODED, st.binary(max_size=80), st.just(MAGIC)), max_size=8), st.integers(1, 97))
def test_any_bytes_give_frames_or_damage_and_every_byte_is_accounted_for(
    parts: list[bytes], step: int
) -> None:
    stream = b"".join(parts)
    frames: list[Frame] = []
    total = 0
    for item in decode_all(stream, step):
        if isinstance(item, Damage):
            total += item.skipped_bytes
        else:
            frames.append(item)
            total += HEADER_BYTES + len(item.payload)
    assert total <= len(stream)
    assert frames == list(frames_only(decode_all(stream, max(1, len(stream)))))


@given(ENCODED, st.binary(max_size=200).filter(lambda junk: MAGIC[0] not in junk))
def test_a_frame_behind_garbage_is_found(frame: bytes, junk: bytes) -> None:
    items = FrameDecoder().feed(junk + frame)
    assert items == [*([Damage(len(junk))] if junk else []), *FrameDecoder().feed(frame)]


@given(ENCODED, ENCODED, st.data())
def test_a_changed_byte_never_gives_another_frame(first: bytes, second: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(first) - 1))
    changed = first[:at] + bytes((first[at] ^ data.draw(st.integers(1, 255)),)) + first[at + 1 :]
    frames = list(frames_only(FrameDecoder().feed(changed + second)))
    assert frames == list(frames_only(FrameDecoder().feed(second)))


@given(ENCODED, ENCODED, st.data())
def test_after_lost_bytes_the_decoder_finds_back(first: bytes, second: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(first) - 1))
    end = data.draw(st.integers(at + 1, len(first)))
    decoder = FrameDecoder()
    decoder.feed(first[:at] + first[end:])
    decoder.feed(second)
    third = encode_frame(5, b"third")
    frames: list[Frame] = []
    for _ in range(HEADER_BYTES + MAX_PAYLOAD // len(third) + 2):  # what a half frame can swallow at most
        frames += frames_only(decoder.feed(third))
    assert frames
    assert frames[-1].payload == b"third"


@given(
    st.lists(st.one_of(ENCODED, st.binary(max_size=400), st.just(forged_header(MAX_PAYLOAD))), max_size=12)
)
def test_never_more_than_one_frame_is_buffered(parts: list[bytes]) -> None:
    decoder = FrameDecoder()
    for part in parts:
        decoder.feed(part)
        assert len(decoder._buffer) < HEADER_BYTES + MAX_PAYLOAD  # pyright: ignore[reportPrivateUsage]


def test_a_length_over_the_limit_is_refused_before_anything_is_buffered_for_it() -> None:
    decoder = FrameDecoder()
    header = forged_header(MAX_PAYLOAD + 1)
    assert decoder.feed(header) == [Damage(HEADER_BYTES)]
    frame = encode_frame(5, b"next")
    assert len(decoder.feed(frame)) == 1


def test_garbage_is_reported_at_once_although_no_frame_follows() -> None:
    assert FrameDecoder().feed(b"nonsense") == [Damage(8)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_could_become_a_magic_is_kept(size: int) -> None:
    decoder = FrameDecoder()
    frame = encode_frame(5, b"x")
    assert decoder.feed(b"junk" + frame[:size]) == [Damage(4)]
    assert len(decoder.feed(frame[size:])) == 1


def test_a_payload_that_holds_whole_frames_gives_none_of_them() -> None:
    inner = encode_frame(1) * 20
    outer = bytearray(encode_frame(34, inner))
    outer[-1] ^= 1
    assert FrameDecoder().feed(bytes(outer)) == [Damage(len(outer))]


def test_false_headers_without_end_make_the_decoder_give_up() -> None:
    decoder = FrameDecoder()
    flood = MAGIC * (MAX_BAD_HEADERS + 50) + bytes(HEADER_BYTES)
    assert decoder.feed(flood) == [Damage(len(flood))]
    assert decoder.hopeless
    assert decoder.feed(encode_frame(5)) == [Damage(HEADER_BYTES)]


def test_false_headers_between_good_frames_do_not_add_up() -> None:
    decoder = FrameDecoder()
    for _ in range(MAX_BAD_HEADERS * 2):
        decoder.feed(MAGIC + bytes(HEADER_BYTES) + encode_frame(5))
    assert not decoder.hopeless


@given(ENCODED, ENCODED, st.data())
def test_a_half_frame_that_is_abandoned_gives_back_what_came_behind_it(
    dead: bytes, alive: bytes, data: st.DataObject
) -> None:
    decoder = FrameDecoder()
    half = dead[: data.draw(st.integers(0, len(dead) - 1))]
    frames = list(frames_only(decoder.feed(half + alive))) + list(frames_only(decoder.abandon()))
    whole = list(frames_only(FrameDecoder().feed(alive)))
    assert frames in (whole, [])  # none: the half frame was completed with its bytes, and was wrong
    if len(half) + len(alive) < len(dead):
        assert frames == whole
    assert len(decoder._buffer) < HEADER_BYTES  # pyright: ignore[reportPrivateUsage]


def test_half_frames_in_a_row_are_abandoned_at_once() -> None:
    decoder = FrameDecoder()
    assert decoder.feed(forged_header(60_000) * 50) == []
    assert decoder.pending
    assert decoder.abandon() == [Damage(50 * HEADER_BYTES)]
    assert not decoder.pending


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_like_object_is_taken(kind: type) -> None:
    assert len(FrameDecoder().feed(kind(encode_frame(5)))) == 1


def test_an_identity_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="identity"):
        unpack_identity(b"short")
