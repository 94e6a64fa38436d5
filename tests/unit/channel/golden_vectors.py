# SPDX-License-Identifier: LGPL-2.1-or-later
"""The golden vectors: what each frame, payload and message is in bytes. They never change for a released
version.

`python -m tests.unit.channel.golden_vectors` adds vectors that are missing from tests/data/golden/; it
changes none.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fence_vmchannel.core.connection import (
    ChannelOpened,
    Connection,
    Data,
    Event,
    PeerIdentity,
    Priority,
    Role,
)
from fence_vmchannel.core.frames import FrameType, encode_frame
from fence_vmchannel.core.greeting import (
    EndCode,
    Hello,
    Numbers,
    Offer,
    Welcome,
    encode_challenge,
    encode_end,
    encode_hello,
    encode_progress,
    encode_welcome,
)
from fence_vmchannel.messages import (
    Announce,
    AnnounceAnswer,
    FenceAction,
    FenceAnswer,
    FenceCancel,
    FenceCode,
    FenceGreeting,
    FenceMessage,
    FenceProgress,
    FenceRequest,
    FenceTarget,
    PowerState,
    encode_message,
)
from fence_vmchannel.tlv import encode

FOLDER: Final = Path(__file__).parents[2] / "data" / "golden"
NONCE: Final = 0x0123_4567_89AB_CDEF
TICK: Final = 86_400_000
SESSION: Final = bytes(range(16))
REQUEST: Final = bytes(range(0xA0, 0xB0))
BOOT: Final = "9d3b5d63-9d0c-4f7c-a3a1-0c2d53a0a4f1"
UUID: Final = "6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11"

GUEST_NUMBERS: Final = Numbers(SESSION, 12, 0xDEADBEEF, 7, 0x0BADF00D, 10)
HOST_NUMBERS: Final = Numbers(SESSION, 7, 0x0BADF00D, 11, 0xFEEDFACE, 7)
GUEST_OFFER: Final = Offer(0, 1_024, 4_194_304, BOOT, "vmchannel-guestd 0.1.0")
HOST_OFFER: Final = Offer(0, 1_024, 4_194_304, BOOT[::-1], "vmchanneld 0.1.0")

PAYLOADS: Final[dict[str, bytes]] = {
    "KNOCK": b"",
    "CHALLENGE": encode_challenge(NONCE),
    "HELLO": encode_hello(Hello(GUEST_NUMBERS, GUEST_OFFER, (1,))),
    "WELCOME": encode_welcome(Welcome(1, True, HOST_NUMBERS, HOST_OFFER)),
    "ACK": encode_progress(12, 0xDEADBEEF),
    "ERROR": encode_end(EndCode.NO_COMMON_VERSION, "the peer speaks versions [7]"),
    "OPEN": bytes.fromhex("01 0000000000040000 0013") + b"org.vmchannel.fence" + b"payload",
    "ACCEPT": bytes.fromhex("0000000000040000") + b"payload",
    "DATA": b"a message, or a fragment of one",
    "CREDIT": bytes.fromhex("0000000000000a5f 0000000000040a5f"),
    "CLOSE": bytes.fromhex("0000") + b"done",
    "CANCEL": bytes.fromhex("0005") + b"the other end is gone",
}


def frame_vectors() -> dict[str, bytes]:
    """One whole frame of each type, by its name."""
    vectors: dict[str, bytes] = {}
    for kind in FrameType:
        early = kind in (FrameType.KNOCK, FrameType.CHALLENGE)
        sequenced = kind >= FrameType.OPEN
        vectors[kind.name] = encode_frame(
            kind,
            PAYLOADS[kind.name],
            flags=2 if kind is FrameType.DATA else 0,
            channel=1 if sequenced else 0,
            sequence=13 if sequenced else 0,
            epoch=0 if early else NONCE,
            ack=0 if early else 7,
            ack_check=0 if early else 0x0BADF00D,
            tick=0 if kind is FrameType.KNOCK else TICK,
        )
    return vectors


def messages() -> dict[str, FenceMessage]:
    """One of each message of the fence service, with every field set."""
    return {
        "FenceRequest": FenceRequest(REQUEST, FenceAction.OFF, "node2", BOOT, TICK, 40_000),
        "FenceProgress": FenceProgress(REQUEST, "17", "quit sent", 12),
        "FenceAnswer": FenceAnswer(
            request_id=REQUEST,
            ok=True,
            code=FenceCode.DONE,
            state=PowerState.OFF,
            host="hv1",
            reason="node2 is off",
            operation="17",
            vm_uuid=UUID,
            vm_name="vm2",
            evidence=("process 4711 ended", "a fresh look found none"),
            targets=(FenceTarget("vm2", UUID, PowerState.ON, ("node2", "zwei")),),
            requester=UUID[::-1],
            elapsed_ms=321,
        ),
        "FenceCancel": FenceCancel(REQUEST),
        "Announce": Announce("node1", "corosync"),
        "AnnounceAnswer": AnnounceAnswer(False, "vm9 holds that name"),
    }


def message_vectors() -> dict[str, bytes]:
    """The bytes of `messages`, and of the ACCEPT payload of the fence service, which has no kind."""
    greeting = FenceGreeting("hv1", BOOT, TICK, UUID, "vm1")
    vectors = {name: encode_message(message) for name, message in messages().items()}
    return {"FenceGreeting": encode(greeting), **vectors}


def transcript() -> list[tuple[str, bytes]]:
    """All that a guest and a host say to open a channel, exchange a message each way, and close: who,
    what."""
    host = Connection(
        Role.HOST, PeerIdentity("host boot", "golden host"), random_bytes=random.Random(1).randbytes
    )
    guest = Connection(
        Role.GUEST, PeerIdentity("guest boot", "golden guest"), random_bytes=random.Random(2).randbytes
    )
    said: list[tuple[str, bytes]] = []

    def talk() -> list[Event]:
        events: list[Event] = []
        while True:
            from_guest, from_host = guest.data_to_send(86_400.0), host.data_to_send(86_400.0)
            if not from_guest and not from_host:
                return events + host.events() + guest.events()
            if from_guest:
                said.append(("guest", from_guest))
                host.receive(from_guest, 86_400.0)
            if from_host:
                said.append(("host", from_host))
                guest.receive(from_host, 86_400.0)

    host.link_up(86_400.0)
    guest.link_up(86_400.0)
    talk()
    channel = guest.open("org.vmchannel.fence", window=65_536, priority=Priority.FENCING, payload=b"hello")
    assert any(isinstance(event, ChannelOpened) for event in talk())
    host.accept(channel, window=65_536, payload=b"welcome")
    talk()
    guest.send(channel, b"a request")
    (request,) = [event for event in talk() if isinstance(event, Data)]
    host.grant(channel, request.cost, request.cost + 65_536)
    host.send(channel, b"an answer")
    talk()
    guest.close(channel)
    talk()
    host.handle_time(86_401.0)
    talk()
    return said


def read(name: str) -> dict[str, bytes]:
    """A file of vectors."""
    path = FOLDER / name
    if not path.exists():
        return {}
    raw: dict[str, str] = json.loads(path.read_text("utf-8"))
    return {key: bytes.fromhex(value) for key, value in raw.items()}


def transcript_vectors() -> dict[str, bytes]:
    """The transcript, with numbered names."""
    return {f"{number:02} {who}": data for number, (who, data) in enumerate(transcript())}


FILES: Final[dict[str, Callable[[], dict[str, bytes]]]] = {
    "frames-v1.json": frame_vectors,
    "messages-v1.json": message_vectors,
    "transcript-v1.json": transcript_vectors,
}


def main() -> None:
    """Add what is missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, build in FILES.items():
        vectors = build() | read(name)
        text = json.dumps({key: value.hex() for key, value in vectors.items()}, indent=1)
        (FOLDER / name).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
