# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent asks the host, and what it makes of the answers: a result with proof, or an `AgentError`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from fence_vmchannel.errors import LocalProtocolError
from fence_vmchannel.messages import (
    Announce,
    FenceAction,
    FenceAnswer,
    FenceCode,
    FenceProgress,
    FenceTarget,
    PowerState,
)
from fence_vmchannel.records import Record
from vmchannel_agents.library import Outlets
from vmchannel_agents.outcome import AgentError
from vmchannel_guest.fencing import PATIENCE_S, FencingClient, FencingError, Reach, succeeded
from vmchannel_guest.text import one_line

log = logging.getLogger("vmchannel_agents")

_ACTIONS: Final = {"off": FenceAction.OFF, "on": FenceAction.ON, "reboot": FenceAction.REBOOT}


class Done(Record):
    """The host has done it, with proof."""

    reason: str
    op: str
    host: str
    already: bool
    not_started: bool


class Requests:
    """The requests of one process: one deadline for all, one id for each plug."""

    def __init__(
        self,
        *,
        socket: str,
        port: str,
        timeout_s: float,
        patient: bool,
        reach: Reach | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Start the clock; nothing is opened yet.

        Args:
            socket: of the guest's hub.
            port: name of the port to the host.
            timeout_s: for all requests together.
            patient: wait for a missing hub or port until the deadline (it may be starting).
            reach: opens the fence service; None is the hub, else the port.
            clock: `time.monotonic`.
            sleep: `time.sleep`.
        """
        self._deadline = clock() + timeout_s
        self._client = FencingClient(
            reach or _guest_reach(socket, port),
            patience_s=timeout_s if patient else PATIENCE_S,
            clock=clock,
            sleep=sleep,
        )
        self._ids: dict[tuple[FenceAction, str], bytes] = {}

    def __enter__(self) -> Requests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()

    def carry_out(self, action: str, plug: str) -> Done:
        """Ask for `off`, `on` or `reboot`. Raises AgentError unless the host has proof."""
        answer = self._ask(_ACTIONS[action], plug)
        return Done(
            answer.reason or answer.code.name.lower(),
            answer.operation,
            answer.host,
            answer.code is FenceCode.ALREADY,
            answer.code is FenceCode.NOT_STARTED,
        )

    def status(self, plug: str) -> str:
        """ "on" or "off". Raises AgentError for all else: an unknown VM is never off."""
        return "off" if self._ask(FenceAction.STATUS, plug).state is PowerState.OFF else "on"

    def monitor(self) -> None:
        """Raise AgentError unless fencing would work and this guest may fence something."""
        self._ask(FenceAction.MONITOR, "")
        answer = self._ask(FenceAction.LIST, "")
        if not answer.targets:
            raise AgentError("the host's policy lets this guest fence nothing", host=answer.host)

    def outlets(self, separator: str) -> Outlets:
        """What `list` prints; see `outlets_of`."""
        return outlets_of(self._ask(FenceAction.LIST, "").targets, separator)

    def _ask(self, action: FenceAction, plug: str) -> FenceAnswer:
        what = f"{plug}: " if plug else ""
        try:
            answer = self._client.ask(
                action,
                plug,
                deadline=self._deadline,
                request_id=self._ids.setdefault((action, plug), self._client.new_request_id()),
                progress=_log_progress,
            )
        except FencingError as error:
            raise AgentError(f"{what}{error.reason}", op=error.operation, host=error.host) from error
        except LocalProtocolError as error:
            raise AgentError(f"{what}{error}") from error
        if not succeeded(action, answer):
            raise AgentError(f"{what}{_reason(action, answer)}", op=answer.operation, host=answer.host)
        for line in answer.evidence:
            log.log(logging.INFO if action.destructive else logging.DEBUG, "%s", one_line(line))
        return answer


def outlets_of(targets: tuple[FenceTarget, ...], separator: str) -> Outlets:
    """The lines of `list`: name, alias, state.

    Pacemaker takes every word of every line for a name that the device can fence (`dynamic-list`), and a
    repeated word does no harm. So each VM has one line under its name, with its first alias beside it, and
    one line under each alias, with the VM's name beside it. A name that stands for several VMs keeps its
    line, with unknown state: the host will refuse it and say why, which tells more than "no device found".
    Names that cannot stand in such a line are left out with a warning.
    """
    outlets: Outlets = {}
    for target in targets:
        names = [name for name in (target.plug, *target.aliases) if _fits(name, separator)]
        state = {PowerState.ON: "ON", PowerState.OFF: "OFF"}.get(target.state)
        for name in dict.fromkeys(names):
            other = next((one for one in names if one != name), "")
            outlets[name] = (outlets[name][0], None) if name in outlets else (other, state)
    return outlets


def _fits(name: str, separator: str) -> bool:
    if name and name.isprintable() and separator not in name:
        return True
    log.warning("left out of the list: %s holds the separator, or cannot be printed", one_line(repr(name)))
    return False


def _reason(action: FenceAction, answer: FenceAnswer) -> str:
    if answer.ok:
        return (
            f"the host claims success without the state that {action.name.lower()} needs "
            f"(it is {answer.state.name.lower()}): {answer.reason}"
        )
    return answer.reason or answer.code.name.lower().replace("_", " ")


def _log_progress(progress: FenceProgress) -> None:
    log.debug("%.2f s: %s op=%s", progress.elapsed_ms / 1000, one_line(progress.text), progress.operation)


def _guest_reach(socket: str, port: str) -> Reach:
    from vmchannel_guest.reach import GuestReach

    return GuestReach(socket=socket, port=port, announce=_find_announcement)


def _find_announcement() -> Announce | None:
    from vmchannel_guest.announce import find_announcement, system_sources  # only where no hub runs

    return find_announcement(system_sources())
