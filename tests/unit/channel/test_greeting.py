# SPDX-License-Identifier: LGPL-2.1-or-later
"""The payloads of the greeting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.core.greeting import (
    MAX_WORDS,
    EndCode,
    Hello,
    Numbers,
    Offer,
    Welcome,
    decode_challenge,
    decode_end,
    decode_hello,
    decode_progress,
    decode_welcome,
    encode_challenge,
    encode_end,
    encode_hello,
    encode_progress,
    encode_welcome,
)
from fence_vmchannel.errors import RemoteProtocolError

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
WORDS = st.text(st.characters(codec="utf-8"), max_size=MAX_WORDS)
NUMBERS = st.builds(Numbers, st.binary(min_size=16, max_size=16), U64, U32, U64, U32, U64)
OFFERS = st.builds(Offer, U64, U32, U32, WORDS, WORDS)
HELLOS = st.builds(Hello, NUMBERS, OFFERS, st.lists(st.integers(0, 255), max_size=9).map(tuple))
WELCOMES = st.builds(Welcome, st.integers(0, 255), st.booleans(), NUMBERS, OFFERS)

EXAMPLE_NUMBERS = Numbers(bytes(range(16)), 9, 8, 7, 6, 5)
EXAMPLE_OFFER = Offer(1, 2, 3, "boot", "software")
DECODERS: list[tuple[Callable[[bytes], object], bytes]] = [
    (decode_hello, encode_hello(Hello(EXAMPLE_NUMBERS, EXAMPLE_OFFER, (1, 2)))),
    (decode_welcome, encode_welcome(Welcome(1, True, EXAMPLE_NUMBERS, EXAMPLE_OFFER))),
    (decode_challenge, encode_challenge(5)),
    (decode_progress, encode_progress(5, 6)),
]


@given(HELLOS, st.binary(max_size=20))
def test_a_hello_comes_out_as_it_went_in_whatever_later_versions_add(hello: Hello, more: bytes) -> None:
    assert decode_hello(encode_hello(hello) + more) == hello


@given(WELCOMES, st.binary(max_size=20))
def test_a_welcome_comes_out_as_it_went_in_whatever_later_versions_add(welcome: Welcome, more: bytes) -> None:
    assert decode_welcome(encode_welcome(welcome) + more) == welcome


@pytest.mark.parametrize(("decode", "payload"), DECODERS)
def test_every_truncation_is_refused(decode: Callable[[bytes], object], payload: bytes) -> None:
    decode(payload)
    for size in range(len(payload)):
        with pytest.raises(RemoteProtocolError):
            decode(payload[:size])


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(payload: bytes) -> None:
    for decode, _ in DECODERS:
        try:
            decode(payload)
        except RemoteProtocolError:
            continue


@given(st.binary(max_size=600))
def test_the_words_of_an_error_are_always_readable_and_bounded(payload: bytes) -> None:
    _, reason = decode_end(payload)
    assert len(reason) <= MAX_WORDS


def test_an_error_comes_out_as_it_went_in() -> None:
    assert decode_end(encode_end(EndCode.GARBAGE, "why")) == (EndCode.GARBAGE, "why")


def test_long_words_are_cut() -> None:
    offer = Offer(0, 0, 0, "b" * 500, "s" * 500)
    hello = decode_hello(encode_hello(Hello(EXAMPLE_NUMBERS, offer, (1,))))
    assert hello.offer.boot_id == "b" * MAX_WORDS


def test_words_that_are_not_utf8_are_refused() -> None:
    payload = encode_hello(Hello(EXAMPLE_NUMBERS, EXAMPLE_OFFER, (1,))).replace(b"boot", b"\xff\xff\xff\xff")
    with pytest.raises(RemoteProtocolError, match="UTF-8"):
        decode_hello(payload)


def test_a_challenge_without_a_nonce_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="nonce"):
        decode_challenge(encode_challenge(0))
