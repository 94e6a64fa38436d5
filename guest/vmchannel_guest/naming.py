# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeping the host told of this guest's node name, for as long as the hub runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final, Protocol

from fence_vmchannel.channel import Channel
from fence_vmchannel.errors import ChannelError
from fence_vmchannel.hub.events import HubEvent, Overflow, PeerConnected, PeerDisconnected, SessionWasReset
from fence_vmchannel.hub.watch import Watch
from fence_vmchannel.messages import (
    FENCE_SERVICE,
    Announce,
    AnnounceAnswer,
    decode_message,
    encode_message,
)
from vmchannel_guest.text import one_line

log = logging.getLogger(__name__)

POLL_S: Final = 60.0
"""How often the name is looked at again: corosync may be configured while the guest runs."""

NAMELESS_POLL_S: Final = 5.0
"""The same while there is no name yet: the network may be starting."""

_ANSWER_S: Final = 10.0


class NamingHub(Protocol):
    """What is needed of the `Hub`."""

    def watch(self) -> Watch:
        """See `Hub.watch`."""
        ...

    async def open(self, peer: str, service: str, *, payload: bytes = b"", port: str = "") -> Channel:
        """See `Hub.open`."""
        ...


class NodeNaming:
    """Announces the node's name over each connected port: when its session opens, and when the name changes.

    A refused name is announced again at every look: its other holder may let it go.
    """

    def __init__(
        self, hub: NamingHub, find: Callable[[], Announce | None], *, poll_s: float = POLL_S
    ) -> None:
        """`find` says what to announce; it may block for some seconds and runs in a thread."""
        self._hub = hub
        self._find = find
        self._poll_s = poll_s
        self._told: dict[str, Announce] = {}  # by port: the name that the host has accepted
        self._connected: set[str] = set()
        self._refused: dict[str, str] = {}  # by port: the reason that was logged
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Announce until cancelled, or until the hub stops."""
        async with asyncio.TaskGroup() as tasks:
            speaker = tasks.create_task(self._speak(), name="node name")
            with self._hub.watch() as events:
                async for event in events:
                    self._take(event)
            speaker.cancel()

    def _take(self, event: HubEvent) -> None:
        match event:
            case PeerConnected():
                self._connected.add(event.port)
                self._told.pop(event.port, None)
                self._wake.set()
            case PeerDisconnected():
                self._connected.discard(event.port)
            case Overflow():
                self._connected.clear()  # a new snapshot follows
            case SessionWasReset():
                self._told.pop(event.port, None)
                self._wake.set()
            case _:
                pass

    async def _speak(self) -> None:
        while True:
            announce = await asyncio.to_thread(self._find)
            if announce is not None:
                for port in sorted(self._connected):
                    if self._told.get(port) != announce:
                        await self._announce(port, announce)
            with contextlib.suppress(TimeoutError):
                nameless_s = min(NAMELESS_POLL_S, self._poll_s)
                async with asyncio.timeout(nameless_s if announce is None else self._poll_s):
                    await self._wake.wait()
            self._wake.clear()

    async def _announce(self, port: str, announce: Announce) -> None:
        try:
            async with asyncio.timeout(_ANSWER_S):
                answer = await self._exchange(port, announce)
        except (ChannelError, TimeoutError) as error:
            log.info("node name not announced on port %s: %s", one_line(port, 80), error or "no answer")
            return
        if answer.accepted:
            self._told[port] = announce
            self._refused.pop(port, None)
            log.info("announced node name %s (%s)", one_line(announce.node_name), announce.source)
        elif self._refused.get(port) != answer.reason:
            self._refused[port] = answer.reason
            log.warning(
                "the host refuses the node name %s: %s",
                one_line(announce.node_name),
                one_line(answer.reason),
            )

    async def _exchange(self, port: str, announce: Announce) -> AnnounceAnswer:
        async with await self._hub.open("", FENCE_SERVICE, port=port) as channel:
            await channel.send(encode_message(announce))
            while (data := await channel.receive()) is not None:
                message = decode_message(data)
                if isinstance(message, AnnounceAnswer):
                    return message
        return AnnounceAnswer(False, "the host closed the channel without an answer")
