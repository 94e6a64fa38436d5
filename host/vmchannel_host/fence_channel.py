# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fence service on a VM's channel: messages in, answers out. The rules are in `fencing/`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from fence_vmchannel.channel import Channel
from fence_vmchannel.errors import ChannelError, CloseCode, RemoteProtocolError, ServiceRefused
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
    decode_message,
    encode_message,
)
from fence_vmchannel.pace import Pace
from fence_vmchannel.tlv import encode
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.fencing.service import FenceService, ProgressSink
from vmchannel_host.fencing.turns import Turns
from vmchannel_host.logs import BoundLogger, RateLimiter
from vmchannel_host.model import VmUuid
from vmchannel_host.vm_ports import VmPort

_log = BoundLogger(logging.getLogger(__name__), {})

MAX_CHANNELS: Final = 32
"""Channels of one VM to the fence service; each may hold up to a window in either direction."""

MAX_REQUESTS: Final = 8
"""Requests of one channel that may be under way; the next is read when one is answered (the sender waits)."""

MAX_PROGRESS: Final = 32
"""Progress messages that wait for one channel; a further one is dropped: it is for people."""


class Answers(Protocol):
    """What answers: `fencing.service.FenceService`."""

    def greeting(self, requester: Requester) -> FenceGreeting: ...

    async def answer(
        self, request: FenceRequest, requester: Requester, progress: ProgressSink | None = None
    ) -> FenceAnswer: ...

    async def announce(self, announce: Announce, requester: Requester) -> AnnounceAnswer: ...

    def cancel(self, request_id: bytes, requester: Requester) -> bool: ...


class FenceChannels:
    """Serves the channels of the fence service, one `serve` each."""

    def __init__(
        self,
        service: Answers,
        on_guest: Callable[[Requester], None],
        pace: Pace,
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve none yet.

        Args:
            service: answers.
            on_guest: is told who has opened a channel, before anything is read from it.
            pace: counts each VM's channels and messages: who is too fast is read later, and his deadlines do
                not wait.
            on_refused: called when a message ends its channel because it is none that a client may send.
        """
        self._service = service
        self._on_guest = on_guest
        self._pace = pace
        self._on_refused = on_refused
        self._open: Counter[VmUuid | None] = Counter()  # channels by VM
        self._turns = Turns()
        self._log_limit = RateLimiter()

    async def serve(self, channel: Channel) -> None:
        """Answer one channel until it closes. Its requests that are intents go on without it (S5)."""
        requester = requester_of(channel)
        if requester is None:
            channel.close(CloseCode.NOT_PERMITTED, "fencing is for VMs; the operator uses vmchannelctl")
            return
        if self._open[requester.vm] >= MAX_CHANNELS:
            raise ServiceRefused(CloseCode.LIMIT, f"{MAX_CHANNELS} fence channels of this VM are open")
        self._open[requester.vm] += 1
        try:
            await self._serve(channel, requester)
        finally:
            self._open[requester.vm] -= 1
            if not self._open[requester.vm]:
                del self._open[requester.vm]

    async def _serve(self, channel: Channel, requester: Requester) -> None:
        await self._pace.turn(requester.vm)
        self._on_guest(requester)
        await channel.accept(encode(self._service.greeting(requester)))
        progress: asyncio.Queue[FenceProgress] = asyncio.Queue(MAX_PROGRESS)
        free = asyncio.Semaphore(MAX_REQUESTS)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_send_progress(channel, progress), name="fence progress")
                while (message := await channel.receive()) is not None:
                    await self._pace.turn(requester.vm)
                    await free.acquire()
                    tasks.create_task(
                        self._handle(channel, requester, decode_message(message), progress, free),
                        name="fence request",
                    )
                raise _Closed
        except* _Closed:
            pass
        except* RemoteProtocolError as group:
            line = _log.bind(vm=requester.vm, peer=str(channel.peer))
            why = group.exceptions[0]
            self._on_refused()
            line.limited(self._log_limit, logging.WARNING, requester.vm, "fence channel ended: %s", why)
            channel.close(CloseCode.PROTOCOL, str(group.exceptions[0])[:200])
        except* ChannelError:
            pass  # the channel has ended; the client asks again with the same id

    async def _handle(
        self,
        channel: Channel,
        requester: Requester,
        message: FenceMessage,
        progress: asyncio.Queue[FenceProgress],
        free: asyncio.Semaphore,
    ) -> None:
        def tell(one: FenceProgress) -> None:
            with contextlib.suppress(asyncio.QueueFull):
                progress.put_nowait(one)

        try:
            match message:
                case FenceRequest():
                    await self._turns.turn(requester.vm)
                    answer = await self._service.answer(message, requester, tell)
                    await channel.send(encode_message(answer))
                case Announce():
                    await channel.send(encode_message(await self._service.announce(message, requester)))
                case FenceCancel():
                    self._service.cancel(message.request_id, requester)
                case FenceProgress() | FenceAnswer() | AnnounceAnswer():
                    raise RemoteProtocolError(f"a {type(message).__name__} is for clients")
        finally:
            free.release()


class Metered:
    """A fence service whose answers are counted, whoever asks."""

    def __init__(
        self,
        service: FenceService,
        count: Callable[[FenceAction, FenceCode, float], None],
        clock: Callable[[], float],
    ) -> None:
        """`count` gets action, code and seconds of every answer."""
        self._service = service
        self._count = count
        self._clock = clock
        self.greeting = service.greeting
        self.announce = service.announce
        self.cancel = service.cancel
        self.operator_request = service.operator_request

    async def answer(
        self, request: FenceRequest, requester: Requester, progress: ProgressSink | None = None
    ) -> FenceAnswer:
        """`FenceService.answer`."""
        began = self._clock()
        answer = await self._service.answer(request, requester, progress)
        self._count(request.action, answer.code, self._clock() - began)
        return answer


class _Closed(Exception):
    """The peer closed the channel: end the tasks that serve it."""


async def _send_progress(channel: Channel, waiting: asyncio.Queue[FenceProgress]) -> None:
    while True:
        await channel.send(encode_message(await waiting.get()))


def requester_of(channel: Channel) -> Requester | None:
    """Who speaks through a channel: the VM of its socket (S9); None for a local application."""
    port = channel.peer.info
    if not isinstance(port, VmPort):
        return None
    said = channel.peer_identity
    return Requester(
        vm=port.vm_uuid, name=port.name, process=port.identity, guest_boot_id=said.boot_id if said else ""
    )
