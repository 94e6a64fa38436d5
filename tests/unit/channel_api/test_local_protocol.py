# SPDX-License-Identifier: LGPL-2.1-or-later
"""The messages of ".hub"."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.errors import RemoteProtocolError
from fence_vmchannel.hub.events import (
    HubEvent,
    HubStatus,
    Overflow,
    PeerConnected,
    PeerDisconnected,
    PeerStatus,
    PortAdded,
    PortRemoved,
    PortUnusable,
    ServiceOffered,
    ServiceWithdrawn,
    SessionWasReset,
    Synced,
)
from fence_vmchannel.hub.local_protocol import (
    HubInfo,
    LocalMessage,
    OfferQuery,
    Origin,
    StatusQuery,
    WatchQuery,
    decode_local,
    encode_local,
    gather_status,
)

PEER = PeerStatus("vm1", "org.vmchannel.0", "vm", True, True, "ab", "sw", 3, 10, 20, "", "uuid")
SAMPLES: list[LocalMessage] = [
    StatusQuery(),
    WatchQuery(),
    OfferQuery("org.example.a"),
    HubInfo("hub", "boot"),
    Origin("vm1", "org.vmchannel.0", "vm", b"payload", "uuid"),
    PortAdded("p", "host"),
    PortRemoved("p", "host", "key"),
    PortUnusable("p", "host", "busy"),
    PeerConnected("host", "p", "ab", True, "sw"),
    PeerDisconnected("host", "p", "cut"),
    SessionWasReset("host", "p", "why"),
    ServiceOffered("org.example.a", "hub"),
    ServiceWithdrawn("org.example.a"),
    Synced(),
    Overflow(7),
    PEER,
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_reads_back_as_it_was(message: LocalMessage) -> None:
    assert decode_local(encode_local(message)) == message


def test_every_message_has_a_sample() -> None:
    assert {type(sample) for sample in SAMPLES} == set(get_args(LocalMessage)) | set(get_args(HubEvent))


def test_a_kind_of_a_newer_version_is_skipped() -> None:
    assert decode_local(b"\xff\xffanything") is None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        decode_local(data)
    except RemoteProtocolError:
        return


def test_a_status_is_gathered_from_its_items_and_newer_ones_are_skipped() -> None:
    items = [encode_local(PEER), b"\xff\xff", encode_local(ServiceOffered("a", "hub"))]
    status = gather_status(encode_local(HubInfo("hub", "boot")), items)
    assert status == HubStatus("hub", "boot", (PEER,), (ServiceOffered("a", "hub"),))


def test_a_status_of_nobody_is_an_error() -> None:
    with pytest.raises(RemoteProtocolError):
        gather_status(b"\xff\xff", [])
