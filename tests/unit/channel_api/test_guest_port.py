# SPDX-License-Identifier: LGPL-2.1-or-later
"""The link over a guest's port, against a port that behaves as the real one was measured to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fence_vmchannel.errors import LinkError
from fence_vmchannel.links.base import wait_for
from fence_vmchannel.links.guest_port import WRITE_SIZE, GuestPort
from tests.fakes.fake_port import ScriptedPort


@pytest.fixture
def device() -> Iterator[ScriptedPort]:
    device = ScriptedPort()
    yield device
    device.close()


def read_all(link: GuestPort) -> bytes:
    link.refresh()
    pieces: list[bytes] = []
    while piece := link.receive():
        pieces.append(piece)
    return b"".join(pieces)


def test_a_port_whose_host_is_away_is_not_present_and_does_not_spin(device: ScriptedPort) -> None:
    link = GuestPort(device, "p")
    assert read_all(link) == b""
    assert not link.present
    assert not wait_for(link, 0)  # nothing to do until something changes
    reads = device.reads
    for _ in range(10):
        read_all(link)
    assert device.reads == reads


def test_the_host_coming_and_going_shows_as_present(device: ScriptedPort) -> None:
    link = GuestPort(device, "p")
    read_all(link)
    device.connect()
    assert wait_for(link, 0)
    read_all(link)
    assert link.present
    device.disconnect()
    read_all(link)
    assert not link.present


def test_what_the_host_wrote_before_it_left_is_read_first(device: ScriptedPort) -> None:
    link = GuestPort(device, "p")
    device.connect()
    read_all(link)
    device.deliver(b"x" * 10_000)
    device.disconnect()
    assert read_all(link) == b"x" * 10_000
    assert not link.present


def test_a_write_waits_while_the_host_does_not_read(device: ScriptedPort) -> None:
    link = GuestPort(device, "p")
    device.connect(room=1000)
    link.refresh()
    data = memoryview(bytes(3000))
    assert link.send(data) == 1000
    assert link.send(data) == 0
    device.drain(500)
    assert wait_for(link, 0)
    link.refresh()
    assert link.send(data) == 500


def test_no_write_is_larger_than_a_port_takes(device: ScriptedPort) -> None:
    link = GuestPort(device, "p")
    device.connect()
    link.refresh()
    assert link.send(memoryview(bytes(100_000))) == WRITE_SIZE


def test_nothing_is_written_while_the_host_is_away(device: ScriptedPort) -> None:
    link = GuestPort(device, "p")
    read_all(link)
    assert link.send(memoryview(b"x")) == 0
    assert not device.written


def test_an_unplugged_port_ends_its_link(device: ScriptedPort) -> None:
    link = GuestPort(device, "p")
    device.connect()
    link.refresh()
    device.unplug()
    with pytest.raises(LinkError, match="unplugged"):
        link.refresh()


def test_reading_from_an_unplugged_port_ends_its_link(device: ScriptedPort) -> None:
    link = GuestPort(device, "p")
    device.connect()
    device.deliver(b"x")
    link.refresh()
    device.unplug()
    with pytest.raises(LinkError, match="No such device"):
        link.receive()


def test_room_in_a_port_is_no_news_unless_a_write_waits(device: ScriptedPort) -> None:
    link = GuestPort(device, "p")
    device.connect()
    link.refresh()
    device.drain(1000)
    assert not wait_for(link, 0)
    assert link.send(memoryview(bytes(1000))) == 1000
    assert link.send(memoryview(b"x")) == 0
    device.drain(1000)
    assert wait_for(link, 0)
