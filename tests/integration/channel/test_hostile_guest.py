# SPDX-License-Identifier: LGPL-2.1-or-later
"""A hostile guest on its port, towards a real hub with the fence channel, beside an honest VM (S7)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import struct
import time
from pathlib import Path

import pytest

from fence_vmchannel.core.frames import MAGIC, FrameType, encode_frame
from fence_vmchannel.errors import CloseCode
from fence_vmchannel.messages import (
    FENCE_SERVICE,
    AnnounceAnswer,
    FenceAction,
    FenceRequest,
    encode_message,
)
from fence_vmchannel.pace import Pace
from tests.fakes.hub_pair import VM
from tests.fakes.raw_guest import opening
from tests.integration.channel.hostile_rig import code_of, scene
from vmchannel_host.fence_channel import MAX_CHANNELS


@pytest.mark.parametrize("message", [b"", b"garbage", encode_message(AnnounceAnswer(True, ""))])
async def test_what_is_no_message_of_a_client_ends_its_fence_channel_and_is_counted(
    tmp_path: Path, message: bytes
) -> None:
    async with scene(tmp_path) as stage:
        guest = await stage.guest()
        await guest.greet()
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=1)
        assert (await guest.answer(1)).type == FrameType.ACCEPT
        guest.send(FrameType.DATA, message, channel=1)
        assert code_of((await guest.expect(FrameType.CLOSE)).payload) == CloseCode.PROTOCOL
        assert stage.refused == ["fence"]
        await stage.honest_is_served()
        await guest.close()


async def test_a_guest_gets_so_many_fence_channels_and_a_closed_one_makes_room(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        guest = await stage.guest()
        await guest.greet()
        for number in range(MAX_CHANNELS):
            guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=2 * number + 1)
            assert (await guest.answer(2 * number + 1)).type == FrameType.ACCEPT
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=1_001)
        refused = await guest.answer(1_001)
        assert (refused.type, code_of(refused.payload)) == (FrameType.CLOSE, CloseCode.LIMIT)
        guest.send(FrameType.CLOSE, struct.pack(">H", CloseCode.NORMAL), channel=1)
        await asyncio.sleep(0.1)  # its handler ends
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=1_003)
        assert (await guest.answer(1_003)).type == FrameType.ACCEPT
        await stage.honest_is_served()
        await guest.close()


async def test_bad_messages_and_new_sessions_in_a_loop_do_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with scene(tmp_path) as stage:
        guest = await stage.guest()
        for _ in range(8):  # as many as may be had at once
            await guest.greet()
        for number in range(1, 201, 2):
            guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=number)
            assert (await guest.answer(number)).type == FrameType.ACCEPT
            guest.send(FrameType.DATA, b"\xff\xff\x1b[2J\n", channel=number)
            assert code_of((await guest.answer(number)).payload) == CloseCode.PROTOCOL
        for number in range(201, 401, 2):
            guest.send(FrameType.OPEN, opening("no\nservice\x1b[2J"), channel=number)
            assert code_of((await guest.answer(number)).payload) == CloseCode.UNKNOWN_SERVICE
        await stage.honest_is_served()
        await guest.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) < 40
    assert not [line for line in lines if not line.isprintable()]


async def test_a_guest_that_asks_too_fast_is_read_later_and_the_others_are_served(tmp_path: Path) -> None:
    four_in_an_hour = Pace(0.001, time.monotonic, burst_s=4_000)
    async with scene(tmp_path, pace=four_in_an_hour) as stage:
        guest = await stage.guest()
        await guest.greet()
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=1)
        assert (await guest.answer(1)).type == FrameType.ACCEPT
        for number in range(8):
            request = FenceRequest(bytes([number]) * 16, FenceAction.STATUS, "vm2", "host-boot", 1, 1_000)
            guest.send(FrameType.DATA, encode_message(request), channel=1)
        for _ in range(3):
            await guest.expect(FrameType.DATA)
        await stage.honest_is_served()
        assert [requester.name for _, requester in stage.service.asked] == 3 * [VM.name]
        await guest.close()


async def test_a_guest_that_opens_channels_too_fast_is_read_later_whatever_service_it_asks_for(
    tmp_path: Path,
) -> None:
    four_in_an_hour = Pace(0.001, time.monotonic, burst_s=4_000)
    async with scene(tmp_path, opening=four_in_an_hour) as stage:
        await stage.honest_is_served()
        guest = await stage.guest()
        await guest.greet()
        for number, service in enumerate(("org.example.echo", FENCE_SERVICE, "org.example.none") * 2):
            guest.send(FrameType.OPEN, opening(service), channel=2 * number + 1)
            if number < 5:  # the fifth is one too many: nothing is read after it
                await guest.answer(2 * number + 1)
        for number in range(4):
            guest.send(FrameType.CLOSE, struct.pack(">H", CloseCode.NORMAL), channel=2 * number + 1)
        await guest.flush()
        for _ in range(2):
            await stage.honest_is_served()
        assert stage.attacked.channels == 4  # nobody has read that they are closed
        await guest.close()


async def test_what_a_guest_opens_and_closes_in_a_flood_waits_for_its_time_and_is_served_then(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path, opening=Pace(400, time.monotonic, burst_s=0.1)) as stage:
        guest = await stage.guest()
        await guest.greet()
        async with stage.undisturbed():
            for number in range(200):
                guest.send(FrameType.OPEN, opening("org.example.echo"), channel=2 * number + 1)
                guest.send(FrameType.CLOSE, struct.pack(">H", CloseCode.NORMAL), channel=2 * number + 1)
            await guest.flush()
            guest.send(FrameType.OPEN, opening("org.example.echo"), channel=1_001)
            assert (await guest.answer(1_001)).type == FrameType.ACCEPT
        await guest.close()


async def test_the_largest_and_the_strangest_messages_end_their_channel_only(tmp_path: Path) -> None:
    bombs = (
        b"",
        b"\0\1" + struct.pack(">HI", 999, 0) * 5_000,  # tiny unknown fields
        b"\0\3" + struct.pack(">HI", 10, 0) * 5_000,  # one tag again and again
        b"\0\3" + struct.pack(">HI", 11, 29_994) + struct.pack(">HI", 4, 29_988) + bytes(29_988),
        b"\0\1" + struct.pack(">HI", 1, 0xFFFF_FFFF),  # a length that lies
        b"\0\1" + struct.pack(">HI", 3, 3) + b"\xff\xfe\0",  # no UTF-8
        encode_message(AnnounceAnswer(True, "I am the host")),
    )
    async with scene(tmp_path) as stage:
        guest = await stage.guest()
        await guest.greet()
        for number, bomb in enumerate(bombs):
            channel = 2 * number + 1
            guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=channel)
            await guest.answer(channel)
            guest.send(FrameType.DATA, bomb, channel=channel)
            assert code_of((await guest.answer(channel)).payload) == CloseCode.PROTOCOL
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=101)
        assert (await guest.answer(101)).type == FrameType.ACCEPT
        await guest.close()


GARBAGE = {
    "noise": random.Random(1).randbytes(400_000),
    "magics": MAGIC * 100_000,
    "half a frame": encode_frame(FrameType.DATA, bytes(65_536))[:-1],
    "knocks": encode_frame(FrameType.KNOCK) * 5_000,
    "another's session": encode_frame(FrameType.OPEN, opening("x"), channel=1, sequence=1, epoch=99) * 1_000,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
async def test_after_any_garbage_the_guest_can_greet_and_the_honest_vm_noticed_nothing(
    tmp_path: Path, garbage: bytes
) -> None:
    async with scene(tmp_path) as stage:
        loop = asyncio.get_running_loop()
        sock, _ = await loop.sock_accept(stage.qemu)
        with contextlib.suppress(ConnectionError):  # the hub has had enough
            await loop.sock_sendall(sock, garbage)
        await stage.honest_is_served()
        sock.close()
        guest = await stage.guest()
        await guest.greet()
        guest.send(FrameType.OPEN, opening("org.example.echo"), channel=1)
        assert (await guest.answer(1)).type == FrameType.ACCEPT
        await guest.close()
