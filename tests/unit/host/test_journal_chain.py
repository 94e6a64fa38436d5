# SPDX-License-Identifier: LGPL-2.1-or-later
"""The chain without a file: canonical bytes, what a hash covers, what a signature is good for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.journal.chain import MAX_BODY, Head, Link, Signer, canonical, genesis, parse_body
from vmchannel_host.journal.types import JournalMisuse, Json

LINK = Link("journal-1", 7, 1_700_000_000_000_000, 5_000_000, "boot", "fence.intent", "op-1", "{}", b"p" * 32)

JSON_VALUES: st.SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=5))
def test_a_body_comes_back_as_it_was(body: Mapping[str, Json]) -> None:
    assert parse_body(canonical(body)) == body


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_keys_changes_no_byte(body: dict[str, int]) -> None:
    assert canonical(dict(reversed(body.items()))) == canonical(body)


def test_a_body_is_ascii_even_with_half_a_surrogate() -> None:
    assert canonical({"name": "\ud800é\n"}) == '{"name":"\\ud800\\u00e9\\n"}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x" * MAX_BODY])
def test_what_is_no_json_or_too_large_is_refused(value: float | str) -> None:
    with pytest.raises(JournalMisuse):
        canonical({"value": value})


def test_a_body_that_nests_without_end_is_refused() -> None:
    body: dict[str, Json] = {}
    body["self"] = body
    with pytest.raises(JournalMisuse):
        canonical(body)


@pytest.mark.parametrize(
    "other",
    [
        replace(LINK, journal_id="journal-2"),
        replace(LINK, seq=8),
        replace(LINK, at_us=LINK.at_us + 1),
        replace(LINK, boottime_us=LINK.boottime_us + 1),
        replace(LINK, boot_id="boot2"),
        replace(LINK, kind="fence.outcome"),
        replace(LINK, operation="op-2"),
        replace(LINK, body='{"a":1}'),
        replace(LINK, prev=b"q" * 32),
        replace(LINK, kind="fence.intentop", operation="-1"),  # moving text between fields
    ],
)
def test_every_field_counts_in_the_hash(other: Link) -> None:
    assert other.digest() != LINK.digest()


def test_two_journals_begin_differently() -> None:
    assert genesis("journal-1") != genesis("journal-2")


def test_a_signature_holds_for_its_own_record_and_key_only() -> None:
    signer, stranger = Signer(Ed25519PrivateKey.generate()), Signer(Ed25519PrivateKey.generate())
    digest = LINK.digest()
    signature = signer.record(digest)
    assert signer.verifier.record(digest, signature)
    assert not signer.verifier.record(replace(LINK, seq=8).digest(), signature)
    assert not stranger.verifier.record(digest, signature)
    assert not signer.verifier.record(digest, b"")


def test_a_signed_record_is_no_signed_head() -> None:
    signer = Signer(Ed25519PrivateKey.generate())
    head = Head("journal-1", 0, genesis("journal-1"), 1, b"h" * 32)
    assert signer.verifier.head(head, signer.head(head))
    assert not signer.verifier.head(head, signer.record(head.signed_bytes()))
    assert not signer.verifier.head(replace(head, seq=0), signer.head(head))
    assert not signer.verifier.head(replace(head, checkpoint_seq=1), signer.head(head))


def test_a_body_that_is_nested_without_end_is_no_body() -> None:
    with pytest.raises(ValueError, match="too deep"):
        parse_body("[" * 100_000)
