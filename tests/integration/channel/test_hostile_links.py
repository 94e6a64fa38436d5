# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that breaks the rules of its link, session or channels: only that link, session or channel ends.

Throughout an honest VM sends numbered records; each comes back once, in order, in the same session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest

from fence_vmchannel.channel import Channel
from fence_vmchannel.core.events import Limits
from fence_vmchannel.core.frames import HEADER_BYTES, FrameType, encode_frame
from fence_vmchannel.core.greeting import (
    Hello,
    Numbers,
    Offer,
    decode_challenge,
    decode_welcome,
    encode_hello,
)
from fence_vmchannel.errors import CloseCode
from fence_vmchannel.messages import (
    FENCE_SERVICE,
    Announce,
    FenceAction,
    FenceRequest,
    encode_message,
)
from tests.data.peer_v1 import PeerV1
from tests.fakes.hub_pair import VM, eventually
from tests.fakes.raw_guest import RawGuest, opening
from tests.integration.channel.hostile_rig import HONEST, Scene, code_of, scene

CLOSED = struct.pack(">H", CloseCode.NORMAL)
REQUEST = FenceRequest(os.urandom(16), FenceAction.OFF, "vm2", "host-boot", 1, 10_000)


def oversize(length: int) -> bytes:
    """A header that is right but for its length."""
    frame = bytearray(encode_frame(FrameType.DATA, b"x", epoch=7))
    frame[12:16] = length.to_bytes(4, "big")
    frame[56:60] = crc32(frame[:56]).to_bytes(4, "big")
    return bytes(frame)


async def write_all(sock: socket.socket, data: bytes) -> None:
    """Write; the hub may have had enough before the end."""
    with contextlib.suppress(ConnectionError):
        await asyncio.get_running_loop().sock_sendall(sock, data)


async def greets(stage: Scene) -> None:
    """The attacker's port works when it behaves."""
    guest = await stage.guest()
    await guest.greet()
    guest.send(FrameType.OPEN, opening("org.example.echo"), channel=1)
    assert (await guest.answer(1)).type == FrameType.ACCEPT
    await guest.close()


# --- bytes ---


@pytest.mark.parametrize("length", [65_537, 2**31, 2**32 - 1])
async def test_a_length_over_the_limit_is_believed_no_byte_of(tmp_path: Path, length: int) -> None:
    async with scene(tmp_path) as stage, stage.undisturbed():
        guest = await stage.guest()
        guest.write(oversize(length) * 500)
        await guest.greet()  # nothing waits for what was announced
        await guest.close()


async def test_a_half_frame_is_waited_for_a_second_and_what_follows_it_is_read(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage, stage.undisturbed():
        guest = await stage.guest()
        guest.write(encode_frame(FrameType.DATA, bytes(65_536))[:-1_000])
        await guest.greet()  # its frames are swallowed as payload until the half one is given up
        await guest.close()


async def test_a_guest_that_never_says_hello_stays_unconnected_and_is_asked_at_a_bounded_rate(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path) as stage, stage.undisturbed():
        guest = await stage.guest()
        for _ in range(100):
            guest.send(FrameType.KNOCK, epoch=0)
            await guest.flush()
            await asyncio.sleep(0.01)  # one at a time: knocks that come together are one
        assert not stage.attacked.opened
        assert 0 < await guest.waiting_bytes() < 50 * (HEADER_BYTES + 8), "a challenge for each knock"
        await guest.close()


# --- sessions ---


async def test_a_session_that_is_replayed_word_for_word_does_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage, stage.undisturbed():
        guest = await stage.guest()
        await guest.greet()
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=1)
        await guest.answer(1)
        guest.send(FrameType.DATA, encode_message(REQUEST), channel=1)
        assert await eventually(lambda: len(stage.service.asked) == 1)
        await guest.close()
        sock = await stage.socket()
        await write_all(sock, bytes(guest.written) * 3)
        await asyncio.sleep(0.2)
        assert len(stage.service.asked) == 1, "it was acted on again"
        sock.close()
        await greets(stage)


async def test_whoever_names_another_vms_session_gets_a_new_one_of_his_own(tmp_path: Path) -> None:
    """Also with that VM's boot id and right numbers: a session belongs to its port."""
    async with scene(tmp_path) as stage, stage.undisturbed():
        guest = await stage.guest()
        guest.send(FrameType.KNOCK, epoch=0)
        nonce = decode_challenge((await guest.expect(FrameType.CHALLENGE)).payload)
        stolen = Numbers(stage.honest_session, 1, 1, 1, 1, 0)
        offer = Offer(0, 1_024, 4_194_304, "honest-boot", "honest")
        guest.send(FrameType.HELLO, encode_hello(Hello(stolen, offer, (1,))), epoch=nonce)
        welcome = decode_welcome((await guest.expect(FrameType.WELCOME)).payload)
        assert not welcome.resumed
        assert welcome.numbers.session_id != stage.honest_session
        await guest.close()


async def test_a_message_that_names_another_vm_is_taken_as_its_senders(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage, stage.undisturbed():
        guest = await stage.guest()
        await guest.greet()
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE, payload=HONEST.key.encode()), channel=1)
        await guest.answer(1)
        for message in (REQUEST, Announce(HONEST.name, "corosync"), Announce(HONEST.key, "corosync")):
            guest.send(FrameType.DATA, encode_message(message), channel=1)
        assert await eventually(lambda: len(stage.service.asked) == 3)
        assert {requester.vm for _, requester in stage.service.asked} == {VM.key}
        await guest.close()


FORGERIES: dict[str, Callable[[RawGuest], None]] = {
    "an acknowledgement of what was not sent": lambda guest: guest.forge(ack=10**9),
    "an acknowledgement that goes back": lambda guest: guest.forge(ack=0),
    "an acknowledgement of other frames": lambda guest: guest.forge(ack_check=1),
    "a sequence number ahead": lambda guest: guest.forge(sequence=10**9),
    "a sequence number twice": lambda guest: guest.forge(sequence=1),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
async def test_forged_numbers_lead_to_a_new_greeting_and_nothing_else(
    tmp_path: Path, forge: Callable[[RawGuest], None]
) -> None:
    async with scene(tmp_path) as stage, stage.undisturbed():
        guest = await stage.guest()
        await guest.greet()
        guest.send(FrameType.OPEN, opening("org.example.echo"), channel=1)
        await guest.answer(1)
        forge(guest)
        assert (await guest.expect(FrameType.CHALLENGE)).payload
        assert stage.attacked.channels == 1, "the session may go on"
        await guest.greet()
        await guest.close()


# --- channels ---


@pytest.mark.parametrize(
    "credit",
    [(2**63, 2**64 - 1), (10**9, 2 * 10**9), (0, 0)],
    ids=["of all there is", "of what was not sent", "taken back"],
)
async def test_forged_credit_ends_its_channel_only(tmp_path: Path, credit: tuple[int, int]) -> None:
    async with scene(tmp_path) as stage, stage.undisturbed():
        guest = await stage.guest()
        await guest.greet()
        for number in (1, 3):
            guest.send(FrameType.OPEN, opening("org.example.echo"), channel=number)
            assert (await guest.answer(number)).type == FrameType.ACCEPT
        guest.send(FrameType.CREDIT, struct.pack(">QQ", *credit), channel=1)
        assert code_of((await guest.answer(1)).payload) == CloseCode.PROTOCOL
        guest.send(FrameType.DATA, b"still here?", channel=3)
        assert (await guest.expect(FrameType.DATA)).payload == b"still here?"
        await guest.close()


async def test_channels_beyond_the_limit_are_refused_one_by_one_and_those_there_are_stay(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path, limits=Limits(channels=50)) as stage, stage.undisturbed():
        guest = await stage.guest()
        await guest.greet()
        codes: list[int] = []
        for number in range(1, 401, 2):
            guest.send(FrameType.OPEN, opening("org.example.echo"), channel=number)
            answer = await guest.answer(number)
            codes.append(-1 if answer.type == FrameType.ACCEPT else code_of(answer.payload))
        assert codes == [-1] * 50 + [CloseCode.LIMIT] * 150
        assert stage.attacked.channels == 50
        guest.send(FrameType.DATA, b"still here?", channel=1)
        assert (await guest.expect(FrameType.DATA)).payload == b"still here?"
        await guest.close()


async def test_a_guest_that_asks_and_never_reads_is_answered_no_more_than_its_window(tmp_path: Path) -> None:
    window = 50_000
    async with scene(tmp_path) as stage:
        stage.hub.offer("org.example.talk", talk)
        async with stage.undisturbed():
            guest = await stage.guest()
            await guest.greet()
            for number in range(1, 41, 2):
                guest.send(FrameType.OPEN, opening("org.example.talk", window), channel=number)
            await guest.flush()
            assert await eventually(lambda: stage.attacked.unsent_bytes > 100_000)
            echoed = stage.echoed
            assert await eventually(lambda: stage.echoed > echoed + 50)
            assert stage.attacked.unsent_bytes <= 20 * window + 100_000
            await guest.close()


async def talk(channel: Channel) -> None:
    """Says more than anybody wants to hear."""
    await channel.accept()
    while True:
        await channel.send(bytes(10_000))


async def test_floods_of_opens_and_closes_with_and_without_answers_leave_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage, stage.undisturbed():
        guest = await stage.guest()
        await guest.greet()
        for number in range(1, 6_001, 2):
            service = ("org.example.echo", "nobody\n,/offers" * 30)[number % 4 == 1]
            guest.send(FrameType.OPEN, opening(service, 1_000), channel=number)
            guest.send(FrameType.CLOSE, CLOSED, channel=number)
            if number % 200 == 1:
                await guest.flush()
                await guest.drain_input()
        await guest.drain_input()
        assert await eventually(lambda: stage.attacked.channels == 0)
        await guest.close()


# --- what is said of it ---


async def test_refusals_of_a_link_are_counted_and_logged_at_a_bounded_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with scene(tmp_path) as stage, stage.undisturbed():
        for _ in range(6):
            sock = await stage.socket()
            await write_all(sock, b"\xf5VMC" * 100_000)
            sock.close()
        guest = await stage.guest()
        await guest.greet()
        for number in range(1, 201, 2):
            guest.send(FrameType.OPEN, opening("nobody.offers.this"), channel=number)
            assert code_of((await guest.answer(number)).payload) == CloseCode.UNKNOWN_SERVICE
        await guest.close()
    lines = [record.getMessage() for record in caplog.records if VM.name in record.getMessage()]
    assert [line for line in lines if "link refused: 'too much garbage'" in line]
    assert [line for line in lines if "nobody.offers.this" in line]
    assert len(lines) < 50
    assert all(line.isprintable() for line in lines)


# --- names ---

NAMES = ("vm,1", "vm\n\x1b[2J1", "a/b/../c", "x" * 300, "münchen vm:1", "%s{}", "-rf")


@pytest.mark.parametrize("name", NAMES, ids=["comma", "newline", "slashes", "300", "colon", "format", "dash"])
async def test_a_vm_of_any_name_is_a_peer_like_others(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with scene(tmp_path, name=name) as stage, stage.undisturbed():
        guest = await stage.guest()
        await guest.greet()
        assert await eventually(lambda: stage.attacked.opened)
        peers = {peer.peer: peer.connected for peer in stage.hub.status().peers}
        assert peers == {name: True, HONEST.name: True}
        opening_of = asyncio.create_task(stage.hub.open(name, "org.example.x"), name="open by name")
        frame = await guest.expect(FrameType.OPEN)
        guest.send(FrameType.ACCEPT, struct.pack(">Q", 1_000), channel=frame.channel)
        await guest.flush()
        assert (await opening_of).peer.key == VM.key
        await guest.close()
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["port.sock"], "a name is never part of a path"


# --- versions ---


async def test_a_guest_of_version_1_that_nobody_updates_is_served_on_a_real_socket(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage, stage.undisturbed():
        sock, peer, loop = await stage.socket(), PeerV1(host=False), asyncio.get_running_loop()
        async with asyncio.timeout(10):
            while not peer.messages:
                await loop.sock_sendall(sock, peer.take_output())
                agreed, accepted = peer.agreed, peer.accepted
                peer.receive(await loop.sock_recv(sock, 65_536))
                if peer.agreed and not agreed:
                    peer.open(1, b"org.example.echo")
                if peer.accepted is not None and accepted is None:
                    peer.send(1, b"version 1")
        assert peer.messages == [b"version 1"]
        sock.close()


async def test_a_guest_without_a_common_version_is_told_so_and_its_port_serves_the_next(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path) as stage, stage.undisturbed():
        sock, peer, loop = (
            await stage.socket(),
            PeerV1(host=False, versions=(7, 9)),
            asyncio.get_running_loop(),
        )
        async with asyncio.timeout(10):
            while peer.refused is None:
                await loop.sock_sendall(sock, peer.take_output())
                peer.receive(await loop.sock_recv(sock, 65_536))
        assert peer.refused == (2, "the peer speaks versions [7, 9]")
        sock.close()
        await greets(stage)
