# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fencing client: asks the host to fence, and takes nothing but the host's own answer for an answer.

Blocking, without asyncio. A request keeps its id for as long as it is asked (S5), so that a lost link, a
restarted hub or host daemon never makes a second action of it. What is not answered by the deadline is a
failure, whatever may have happened on the host (S1).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Final, Protocol

from fence_vmchannel.errors import (
    ChannelClosed,
    ChannelError,
    CloseCode,
    DeadlineExceeded,
    HubUnreachable,
    LinkError,
    LocalProtocolError,
    PortBusy,
    PortNotFound,
    ServiceRefused,
)
from fence_vmchannel.messages import (
    MAX_PLUG,
    REQUEST_ID_BYTES,
    AnnounceAnswer,
    FenceAction,
    FenceAnswer,
    FenceCancel,
    FenceCode,
    FenceGreeting,
    FenceProgress,
    FenceRequest,
    PowerState,
    decode_message,
    encode_message,
)
from fence_vmchannel.records import Record
from fence_vmchannel.tlv import decode

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

_FIRST_PAUSE_S: Final = 0.1
_LAST_PAUSE_S: Final = 1.0
_CANCEL_S: Final = 0.2
_TOO_SHORT_S: Final = 0.5
"""An attempt that began so late fails for want of time; what was wrong before is the reason."""

_MAX_WITHIN_MS: Final = 3_600_000

PATIENCE_S: Final = 10.0
"""How long a way to the host may be missing before that is the answer."""

ProgressSink = Callable[[FenceProgress], None]


class FenceLine(Protocol):
    """An open channel to the host's fence service. Deadlines are seconds of `time.monotonic`.

    Calls raise `ChannelError`: `DeadlineExceeded` in time, others when the channel has ended.
    """

    @property
    def greeting(self) -> bytes:
        """The ACCEPT's payload: a `FenceGreeting`."""
        ...

    def send(self, message: bytes, *, deadline: float) -> None:
        """Send one message."""
        ...

    def receive(self, *, deadline: float) -> bytes | None:
        """The next message; None when the host has closed the channel."""
        ...

    def close(self) -> None:
        """End it. May be called twice."""
        ...


class Reach(Protocol):
    """How to open a `FenceLine`: `GuestReach`, or a test's."""

    def __call__(self, *, deadline: float) -> FenceLine:
        """Try once. Raises ChannelError."""
        ...


class FencingError(ChannelError):
    """There is no answer. `host` and `operation` are what is known of them, else ""."""

    def __init__(self, reason: str, *, host: str = "", operation: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.host = host
        self.operation = operation


class HostUnreachable(FencingError):
    """Nothing was asked: no hub, no port, or no session with a host. Mend that and ask again."""


class NotPermitted(FencingError):
    """This user, or this guest, may not use the fence service."""


class NoAnswer(FencingError):
    """It was asked, and no answer came in time. The outcome is unknown: treat it as failed."""


def succeeded(action: FenceAction, answer: FenceAnswer) -> bool:
    """Whether the answer claims what was asked for. An `ok` without the state that fits it is no claim."""
    match action:
        case FenceAction.OFF:
            return answer.ok and answer.state is PowerState.OFF
        case FenceAction.ON:
            return answer.ok and answer.state is PowerState.ON
        case FenceAction.REBOOT:
            # S8: off was proven; that it does not come up again is no failure of the fence.
            return answer.ok and (answer.state is PowerState.ON or answer.code is FenceCode.NOT_STARTED)
        case FenceAction.STATUS:
            return answer.ok and answer.state in (PowerState.ON, PowerState.OFF)
        case FenceAction.LIST | FenceAction.MONITOR:
            return answer.ok


class _Line(Record):
    """The line in use."""

    line: FenceLine
    greeting: FenceGreeting
    accepted_at: float


class _Asking:
    """One request while it is asked."""

    def __init__(
        self, request_id: bytes, action: FenceAction, plug: str, progress: ProgressSink | None
    ) -> None:
        self.request_id = request_id
        self.action = action
        self.plug = plug
        self.progress = progress
        self.deadline = 0.0  # of the caller
        self.answer_by = 0.0  # of the host, a little earlier, so that its "failed" still arrives
        self.patient_until = 0.0
        self.sent = False
        self.operation = ""
        self.trouble = ""


class _AskAgain(ChannelError):
    """The host cannot take this request as it is, or not now; the same id may be asked again."""

    def __init__(self, answer: FenceAnswer) -> None:
        super().__init__(answer.reason or answer.code.name.lower())
        self.answer = answer


class FencingClient:
    """Asks the host's fence service. Keeps its line open between requests; not for several threads."""

    def __init__(
        self,
        reach: Reach,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """Make a client; nothing is opened before the first request.

        Args:
            reach: opens the fence service.
            patience_s: how long a hub or port may be missing, or the host unavailable, before that is the
                answer. A host that is known but silent is waited for until the deadline.
            clock: seconds of `time.monotonic`.
            sleep: waits some seconds.
            random_bytes: unguessable bytes, for request ids.
        """
        self._reach = reach
        self._patience_s = patience_s
        self._clock = clock
        self._sleep = sleep
        self._random_bytes = random_bytes
        self._current: _Line | None = None
        self._host = ""

    @property
    def host(self) -> str:
        """The host that last greeted; "" before."""
        return self._host

    def new_request_id(self) -> bytes:
        """An id for one request, to be used for all its repetitions."""
        return self._random_bytes(REQUEST_ID_BYTES)

    def ask(
        self,
        action: FenceAction,
        plug: str = "",
        *,
        deadline: float,
        request_id: bytes | None = None,
        progress: ProgressSink | None = None,
    ) -> FenceAnswer:
        """Ask until there is an answer or the deadline passes. Blocks.

        Args:
            action: what to do or to tell.
            plug: VM or node, as the user wrote it; "" for LIST and MONITOR.
            deadline: seconds of `time.monotonic`.
            request_id: of the request; None makes one. The same id never acts twice.
            progress: is called with what the host says on the way; must not raise.

        Returns:
            The host's answer; see `succeeded` for whether it is what was asked for.

        Raises:
            LocalProtocolError: the plug can be no plug. Nothing was asked.
            HostUnreachable, NotPermitted: nothing was asked.
            NoAnswer: the outcome is unknown; treat it as failed.
        """
        _check_plug(plug)
        start = self._clock()
        margin = min(2.0, max(0.0, deadline - start) / 10)
        asking = _Asking(request_id or self.new_request_id(), action, plug, progress)
        asking.deadline = deadline
        asking.answer_by = deadline - margin
        asking.patient_until = start + self._patience_s
        pause_s = _FIRST_PAUSE_S
        while True:
            late = asking.answer_by - self._clock() < _TOO_SHORT_S
            try:
                return self._ask_once(asking)
            except (ChannelError, OSError) as error:
                self._note(asking, error, late=late)
            left = asking.deadline - self._clock()
            if left <= 0:
                raise self._over(asking)
            self._sleep(min(pause_s, left))
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def close(self) -> None:
        """Close the line. The client may be used again."""
        current, self._current = self._current, None
        if current is not None:
            with contextlib.suppress(ChannelError, OSError):
                current.line.close()

    def __enter__(self) -> FencingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one attempt ---

    def _ask_once(self, asking: _Asking) -> FenceAnswer:
        current = self._current or self._open(asking.answer_by)
        request = FenceRequest(
            asking.request_id,
            asking.action,
            asking.plug,
            current.greeting.boot_id,
            current.greeting.tick_ms,
            self._within_ms(asking, current),
        )
        asking.sent = True  # from here on it may have reached the host
        current.line.send(encode_message(request), deadline=asking.deadline)
        answer = self._await_answer(asking, current)
        if answer.code is FenceCode.STALE and not answer.ok:
            raise _AskAgain(answer)
        if answer.code is FenceCode.UNAVAILABLE and not answer.ok and self._clock() < asking.patient_until:
            raise _AskAgain(answer)
        return answer

    def _open(self, deadline: float) -> _Line:
        line = self._reach(deadline=deadline)
        try:
            greeting = decode(FenceGreeting, line.greeting)
        except BaseException:
            line.close()
            raise
        self._host = greeting.host
        # The host took its tick before now: a time counted from now on its clock ends no later than on ours.
        self._current = _Line(line, greeting, self._clock())
        return self._current

    def _within_ms(self, asking: _Asking, current: _Line) -> int:
        if self._clock() >= asking.answer_by:
            raise DeadlineExceeded("no time was left to ask")
        return max(1, min(_MAX_WITHIN_MS, int((asking.answer_by - current.accepted_at) * 1000)))

    def _await_answer(self, asking: _Asking, current: _Line) -> FenceAnswer:
        while True:
            try:
                data = current.line.receive(deadline=asking.deadline)
            except DeadlineExceeded:
                self._cancel(asking, current)
                raise
            if data is None:
                raise ChannelClosed(CloseCode.NORMAL, "the host closed the channel without an answer")
            match decode_message(data):
                case FenceAnswer() as answer if answer.request_id == asking.request_id:
                    if answer.requester == current.greeting.vm_uuid:  # S6: the answer is for this VM
                        return answer
                    log.warning("an answer for another requester is ignored")
                case FenceProgress() as progress if progress.request_id == asking.request_id:
                    asking.operation = progress.operation
                    if asking.progress is not None:
                        asking.progress(progress)
                case AnnounceAnswer(accepted=False, reason=reason):
                    log.warning("the host refuses this node's name: %s", reason)
                case other:
                    log.debug("a %s that answers no open request is ignored", type(other).__name__)

    def _cancel(self, asking: _Asking, current: _Line) -> None:
        """Tell the host that nobody waits; what is no intent yet is dropped there."""
        message = encode_message(FenceCancel(asking.request_id))
        with contextlib.suppress(ChannelError, OSError):
            current.line.send(message, deadline=self._clock() + _CANCEL_S)

    # --- failures ---

    def _note(self, asking: _Asking, error: ChannelError | OSError, *, late: bool) -> None:
        """Remember why an attempt failed; raise if another one would fail as well."""
        self.close()
        if not asking.trouble or not late:
            asking.trouble = str(error) or type(error).__name__
        log.info("%s %r: %s", asking.action.name.lower(), asking.plug, asking.trouble)
        if isinstance(error, ServiceRefused) and error.code is CloseCode.NOT_PERMITTED:
            raise NotPermitted(error.reason, host=self._host) from error
        if isinstance(error, LocalProtocolError):
            raise error
        if _is_missing(error) and not asking.sent and self._clock() >= asking.patient_until:
            raise self._over(asking) from error  # once sent, an answer is worth waiting for

    def _over(self, asking: _Asking) -> FencingError:
        known = {"host": self._host, "operation": asking.operation}
        if asking.sent:
            return NoAnswer(f"no answer in time, the outcome is unknown: {asking.trouble}", **known)
        return HostUnreachable(asking.trouble, **known)


def _is_missing(error: Exception) -> bool:
    """Whether there is nobody to talk to, rather than somebody who is silent."""
    if isinstance(error, ServiceRefused):
        return error.code in (CloseCode.PEER_GONE, CloseCode.UNKNOWN_SERVICE, CloseCode.LIMIT)
    return isinstance(error, HubUnreachable | PortNotFound | PortBusy) or type(error) is LinkError


def _check_plug(plug: str) -> None:
    """Raise LocalProtocolError for what no VM can be called; the wire would change or refuse it."""
    if len(plug) > MAX_PLUG:
        raise LocalProtocolError(f"the plug has {len(plug)} characters, at most {MAX_PLUG} are allowed")
    try:
        plug.encode()
    except UnicodeEncodeError as error:
        raise LocalProtocolError("the plug is not valid UTF-8") from error
