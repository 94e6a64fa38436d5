# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's fence service as the fencing client sees it, in memory and in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fence_vmchannel.errors import DeadlineExceeded
from fence_vmchannel.messages import (
    FenceAction,
    FenceAnswer,
    FenceCancel,
    FenceCode,
    FenceGreeting,
    FenceMessage,
    FenceRequest,
    PowerState,
    decode_message,
    encode_message,
)
from fence_vmchannel.tlv import encode

REQUESTER = "11111111-1111-4111-8111-111111111111"
GREETING = FenceGreeting("hv1", "boot-of-hv1", 5_000, REQUESTER, "vm1")

STATES = {
    FenceAction.OFF: PowerState.OFF,
    FenceAction.ON: PowerState.ON,
    FenceAction.REBOOT: PowerState.ON,
    FenceAction.STATUS: PowerState.ON,
    FenceAction.LIST: PowerState.UNKNOWN,
    FenceAction.MONITOR: PowerState.UNKNOWN,
}


class VirtualTime:
    """A clock that moves only when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def done(request: FenceRequest) -> FenceAnswer:
    """The answer of a host that did what it was asked."""
    return FenceAnswer(
        request.request_id,
        True,
        FenceCode.DONE,
        STATES[request.action],
        "hv1",
        "proven",
        operation="op-1",
        vm_uuid="target",
        vm_name=request.plug,
        requester=REQUESTER,
    )


def failed(request: FenceRequest, code: FenceCode, reason: str = "") -> FenceAnswer:
    """The answer of a host that did not."""
    return replace(done(request), ok=False, code=code, state=PowerState.UNKNOWN, reason=reason or code.name)


Reply = FenceMessage | bytes | Exception
"""What the client gets next: a message, raw bytes, or an error."""

Behaviour = Callable[[FenceRequest], Iterable[Reply]]


@dataclass
class Trouble:
    """What goes wrong with one attempt to open, and how long that takes."""

    error: Exception
    takes_s: float = 0.0


def answer_done(request: FenceRequest) -> Iterable[Reply]:
    """The behaviour of a host that does all that it is asked."""
    return (done(request),)


class FakeHost:
    """A `Reach`. `troubles` come first; then every line answers by `behaviours`, the last one for ever."""

    def __init__(self, time: VirtualTime, *behaviours: Behaviour, greeting: bytes | None = None) -> None:
        self.time = time
        self.behaviours = deque(behaviours or (answer_done,))
        self.greeting = encode(GREETING) if greeting is None else greeting
        self.troubles: deque[Trouble] = deque()
        self.requests: list[FenceRequest] = []
        self.cancelled: list[bytes] = []
        self.opened = 0
        self.closed = 0

    def __call__(self, *, deadline: float) -> FakeLine:
        if self.troubles:
            trouble = self.troubles.popleft()
            self.time.sleep(trouble.takes_s)
            raise trouble.error
        self.opened += 1
        return FakeLine(self)

    def react(self, request: FenceRequest) -> Iterable[Reply]:
        self.requests.append(request)
        behaviour = self.behaviours.popleft() if len(self.behaviours) > 1 else self.behaviours[0]
        return behaviour(request)


class FakeLine:
    """A `FenceLine`."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self._replies: deque[Reply] = deque()
        self._open = True

    @property
    def greeting(self) -> bytes:
        return self._host.greeting

    def send(self, message: bytes, *, deadline: float) -> None:
        match decode_message(message):
            case FenceRequest() as request:
                self._replies.extend(self._host.react(request))
            case FenceCancel(request_id=cancelled):
                self._host.cancelled.append(cancelled)
            case other:
                raise AssertionError(f"a client does not send {other}")

    def receive(self, *, deadline: float) -> bytes | None:
        if not self._replies:
            self._host.time.now = max(self._host.time.now, deadline)
            raise DeadlineExceeded("waiting: no answer from the host in time")
        match self._replies.popleft():
            case Exception() as error:
                raise error
            case bytes() as raw:
                return raw
            case message:
                return encode_message(message)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._host.closed += 1
