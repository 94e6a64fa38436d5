# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host's fence service on a real hub, with VMs that exist on paper only."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

from fence_vmchannel.channel import Channel
from fence_vmchannel.errors import ChannelClosed, CloseCode
from fence_vmchannel.messages import (
    Announce,
    AnnounceAnswer,
    FenceAction,
    FenceAnswer,
    FenceCancel,
    FenceCode,
    FenceGreeting,
    FenceProgress,
    FenceRequest,
    FenceTarget,
    PowerState,
    decode_message,
    encode_message,
)
from fence_vmchannel.tlv import encode

HOST = "hv1"


@dataclass
class PaperVm:
    """One VM."""

    name: str
    state: PowerState = PowerState.ON
    aliases: tuple[str, ...] = ()
    refusal: FenceAnswer | None = None  # what any request for it gets instead


def no_vms() -> list[PaperVm]:
    return []


@dataclass
class FakeFenceService:
    """Answers as the policy and hypervisors of a host would; each fault has a switch."""

    vms: list[PaperVm] = field(default_factory=no_vms)
    silent: bool = False  # takes requests and never answers
    losses: int = 0  # so many channels break after their first request
    name_refused: str = ""  # why announced names are refused
    requests: list[FenceRequest] = field(default_factory=lambda: list[FenceRequest]())
    cancelled: list[bytes] = field(default_factory=lambda: list[bytes]())
    announced: list[Announce] = field(default_factory=lambda: list[Announce]())
    acted: dict[bytes, FenceAnswer] = field(default_factory=lambda: dict[bytes, FenceAnswer]())
    heard: asyncio.Event = field(default_factory=asyncio.Event)  # set whenever a message comes

    async def serve(self, channel: Channel) -> None:
        """A `Handler`."""
        tick_ms = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
        greeting = FenceGreeting(HOST, "boot-of-hv1", tick_ms, channel.peer.key, channel.peer.name)
        await channel.accept(encode(greeting))
        while (data := await channel.receive()) is not None:
            match decode_message(data):
                case FenceRequest() as request:
                    self.requests.append(request)
                    self.heard.set()
                    await self._answer(channel, request)
                case Announce() as announce:
                    self.announced.append(announce)
                    self.heard.set()
                    answer = AnnounceAnswer(not self.name_refused, self.name_refused)
                    await channel.send(encode_message(answer))
                case FenceCancel(request_id=cancelled):
                    self.cancelled.append(cancelled)
                    self.heard.set()
                case other:
                    raise AssertionError(f"a client does not send {other}")

    async def _answer(self, channel: Channel, request: FenceRequest) -> None:
        if request.action.destructive:
            operation = f"op-{len(self.acted) + 1}"
            progress = FenceProgress(request.request_id, operation, "begun", 1)
            await channel.send(encode_message(progress))
        if self.silent:
            return
        answer = self.acted.get(request.request_id) or self._act(request)
        if request.action.destructive:
            self.acted[request.request_id] = answer
        if self.losses:
            self.losses -= 1
            raise ChannelClosed(CloseCode.INTERNAL, "lost on purpose")
        await channel.send(encode_message(replace(answer, requester=channel.peer.key)))

    def _act(self, request: FenceRequest) -> FenceAnswer:
        blank = FenceAnswer(request.request_id, True, FenceCode.DONE, PowerState.UNKNOWN, HOST, "")
        match request.action:
            case FenceAction.LIST:
                targets = tuple(FenceTarget(vm.name, f"u-{vm.name}", vm.state, vm.aliases) for vm in self.vms)
                return replace(blank, targets=targets, reason=f"{len(targets)} plugs")
            case FenceAction.MONITOR:
                return replace(blank, reason="fencing would work")
            case _:
                return self._act_on(request, blank)

    def _act_on(self, request: FenceRequest, blank: FenceAnswer) -> FenceAnswer:
        vm = next((one for one in self.vms if request.plug in (one.name, *one.aliases)), None)
        if vm is None:
            reason = f"no VM is called {request.plug!r}"
            return replace(blank, ok=False, code=FenceCode.UNKNOWN_PLUG, reason=reason)
        if vm.refusal is not None:
            return replace(vm.refusal, request_id=request.request_id)
        before = vm.state
        wanted = PowerState.OFF if request.action is FenceAction.OFF else PowerState.ON
        if request.action is not FenceAction.STATUS:
            vm.state = wanted
        already = request.action in (FenceAction.OFF, FenceAction.ON) and before is wanted
        return replace(
            blank,
            code=FenceCode.ALREADY if already else FenceCode.DONE,
            state=vm.state,
            reason="already so" if already else "proven by pidfd",
            operation=f"op-{len(self.acted) + 1}" if request.action.destructive else "",
            vm_uuid=f"u-{vm.name}",
            vm_name=vm.name,
            evidence=("pid 7 has ended (pidfd)",) if request.action is FenceAction.OFF else (),
        )


def refused(reason: str, code: FenceCode = FenceCode.REFUSED, operation: str = "") -> FenceAnswer:
    """What a VM out of reach answers."""
    return FenceAnswer(bytes(16), False, code, PowerState.UNKNOWN, HOST, reason, operation=operation)
