# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel tells of unix sockets, read from bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.doctor.unix_sockets import SocketTable, UnixSocket, parse_answer

DONE = struct.pack("=IHHII", 16, 3, 2, 1, 0)


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    data = struct.pack("=HH", 4 + len(value), kind) + value
    return data + bytes(-len(data) % 4)


def message(inode: int, state: int, *attributes: bytes, kind: int = 20) -> bytes:
    """One message of a dump (linux/unix_diag.h)."""
    body = struct.pack("=BBBBIII", 1, 1, state, 0, inode, 0, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body


def test_a_listener_and_a_served_client_are_told_apart() -> None:
    name = attribute(0, b"/run/a.sock\0")
    place = attribute(1, struct.pack("=II", 77, 1))
    data = message(10, 10, name, place) + message(11, 1, name, place, attribute(2, struct.pack("=I", 12)))
    sockets, done = parse_answer(data + DONE)
    assert done is True
    assert sockets == [
        UnixSocket(10, "/run/a.sock", 77, True, 0),
        UnixSocket(11, "/run/a.sock", 77, False, 12),
    ]
    assert SocketTable(sockets).ends_at("/run/a.sock") == ([10], [12])
    assert SocketTable(sockets).ends_at("/run/b.sock") == ([], [])


def test_an_abstract_name_is_no_path_and_another_kind_of_message_is_skipped() -> None:
    sockets, done = parse_answer(message(1, 1, attribute(0, b"\0/run/a.sock")) + message(2, 1, kind=99))
    assert (sockets, done) == ([UnixSocket(1, "", 0, False, 0)], None)


def test_an_error_ends_the_dump() -> None:
    assert parse_answer(struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -1)) == ([], False)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("=IHHII", 4, 20, 2, 1, 0),
        struct.pack("=IHHII", 1000, 20, 2, 1, 0),
        struct.pack("=IHHII", 17, 20, 2, 1, 0) + b"x",
        message(1, 1, struct.pack("=HH", 2, 0)),
        message(1, 1, struct.pack("=HH", 99, 0)),
    ],
)
def test_a_length_that_lies_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"than it says|too short"):
        parse_answer(data)


@given(st.binary(max_size=300))
def test_any_bytes_are_sockets_or_refused(data: bytes) -> None:
    try:
        sockets, _ = parse_answer(data)
    except ValueError:
        return
    assert len(sockets) <= len(data)
