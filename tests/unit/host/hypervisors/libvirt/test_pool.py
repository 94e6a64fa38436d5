# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections that calls borrow: nobody shares one, none is closed under a call, none is kept for ever."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from vmchannel_host.hypervisors.libvirt.link import LibvirtError
from vmchannel_host.hypervisors.libvirt.pool import MAX_IDLE, ConnectionPool


class FakeConnection:
    """One that can die, and tells whether it was closed."""

    def __init__(self) -> None:
        self.alive = True
        self.closed = False

    def isAlive(self) -> int:  # noqa: N802 - libvirt's name
        return int(self.alive)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class Opener:
    """Opens connections, and keeps count of them."""

    def __init__(self) -> None:
        self.opened: list[FakeConnection] = []
        self.refuses = False

    def __call__(self) -> FakeConnection:
        if self.refuses:
            raise LibvirtError("not reached")
        self.opened.append(FakeConnection())
        return self.opened[-1]


@pytest.fixture
def opener() -> Opener:
    return Opener()


@pytest.fixture
def pool(opener: Opener) -> ConnectionPool[FakeConnection]:
    return ConnectionPool(opener, FakeConnection.close)


def test_calls_one_after_another_use_one_connection(
    pool: ConnectionPool[FakeConnection], opener: Opener
) -> None:
    for _ in range(3):
        with pool.borrow():
            pass
    assert len(opener.opened) == 1


def test_calls_at_one_time_share_no_connection(pool: ConnectionPool[FakeConnection], opener: Opener) -> None:
    with pool.borrow() as one, pool.borrow() as other:
        assert one is not other
    assert [connection.closed for connection in opener.opened] == [False, False]


def test_what_is_not_needed_any_more_is_closed(pool: ConnectionPool[FakeConnection], opener: Opener) -> None:
    with ExitStack() as calls:
        for _ in range(MAX_IDLE + 2):
            calls.enter_context(pool.borrow())
    assert sum(connection.closed for connection in opener.opened) == 2


def test_a_connection_that_died_idle_is_not_lent(
    pool: ConnectionPool[FakeConnection], opener: Opener
) -> None:
    with pool.borrow() as first:
        pass
    first.alive = False
    with pool.borrow() as second:
        assert second is not first
    assert first.closed
    assert not second.closed


def test_a_connection_that_dies_under_a_call_is_closed_after_it(
    pool: ConnectionPool[FakeConnection],
) -> None:
    def call() -> None:
        with pool.borrow() as connection:
            lent.append(connection)
            connection.alive = False
            raise LibvirtError("client socket is closed")

    lent: list[FakeConnection] = []
    with pytest.raises(LibvirtError):
        call()
    assert lent[0].closed


def test_a_pool_that_is_closed_closes_what_is_lent_when_it_is_given_back(
    pool: ConnectionPool[FakeConnection], opener: Opener
) -> None:
    with pool.borrow():
        pass
    with pool.borrow() as lent, pool.borrow():
        pass
    with pool.borrow() as lent:
        pool.close()
        assert [one.closed for one in opener.opened if one is not lent] == [True]
        assert not lent.closed
    assert lent.closed


def test_what_cannot_be_opened_is_the_borrower_s_error(
    pool: ConnectionPool[FakeConnection], opener: Opener
) -> None:
    opener.refuses = True
    with pytest.raises(LibvirtError, match="not reached"), pool.borrow():
        pass
    opener.refuses = False
    with pool.borrow() as connection:
        assert not connection.closed
