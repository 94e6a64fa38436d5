# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who asks, and whether it still is the same incarnation of the same VM (S5).

A stored answer goes to nobody else: not to another process or kernel boot, and not to a guest that was reset
or may have been restored since it asked. What the guest says plays no part beside its kernel's boot id.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from vmchannel_host.fencing.records import RequestStore
from vmchannel_host.fencing.tasks import Tasks
from vmchannel_host.journal.types import JournalError
from vmchannel_host.logs import BoundLogger
from vmchannel_host.model import ProcessIdentity, VmUuid

MAX_REQUEST_S: Final = 3600.0
"""No request has longer (`FenceRequest.within_ms`): after so long none of an earlier daemon is left."""

CATCH_UP_S: Final = 1.0
"""How long the requester's monitor may take to say that it is up to date; asked for a repeated id only."""

_log = BoundLogger(logging.getLogger(__name__), {})


@dataclass(frozen=True, slots=True)
class Requester:
    """One incarnation of who asks.

    The VM's fields come from the socket it speaks through and from its session's greeting, never from a
    request.
    """

    vm: VmUuid | None  # None: the operator
    name: str  # VM's name, or the operator's user name; untrusted text
    process: ProcessIdentity | None = None
    guest_boot_id: str = ""
    interruptions: int = 0  # see `model.Instance`

    @property
    def who(self) -> str:
        """What holds also across a restart of this daemon; a VM's begins with its UUID and a blank."""
        if self.vm is None:
            return f"operator {self.name}"
        one = self.process
        process = f"{one.pid}:{one.start_time}:{one.boot_id}" if one is not None else "-"
        return f"{self.vm} {process} {self.guest_boot_id or '-'}"


class Watching(Protocol):
    """What is asked of the hypervisor."""

    def interruptions(self, identity: ProcessIdentity) -> int: ...

    async def catch_up(self, identity: ProcessIdentity, *, timeout_s: float) -> None: ...


class Incarnations:
    """Tells incarnations apart, within one run of the daemon and from one to the next."""

    def __init__(
        self,
        watching: Watching,
        journal: RequestStore,
        tasks: Tasks,
        clock: Callable[[], float],
        run: str,
    ) -> None:
        """
        Args:
            clock: CLOCK_BOOTTIME, seconds.
            run: names this run of the daemon: counts of interruptions begin anew with each.
        """
        self._watching = watching
        self._journal = journal
        self._tasks = tasks
        self._clock = clock
        self._run = run
        self._earlier_until = clock() + MAX_REQUEST_S  # requests that another run stored may be in time
        self._until: dict[VmUuid, float] = {}  # last deadline of the requests that this run stored
        self._interrupted: dict[VmUuid, float] = {}  # when, as long as the journal does not have it

    def present(self, requester: Requester) -> Requester:
        """The requester with what was heard of its VM until now."""
        if requester.process is None:
            return requester
        return replace(requester, interruptions=self._watching.interruptions(requester.process))

    def key(self, requester: Requester) -> str:
        """The incarnation, to be stored with its request."""
        return f"{requester.who} {self._run}:{requester.interruptions}"

    async def is_same(self, key: str, requester: Requester) -> bool:
        """Whether a key is this requester's, with all that happened to its VM before this call.

        What happened while no daemon ran is unknown, except for a new process or kernel boot
        (docs/safety.md, assumptions).

        Raises:
            HypervisorError: the VM's monitor does not tell what happened.
        """
        who, _, watched = key.rpartition(" ")
        if who != requester.who:
            return False
        if requester.process is not None:
            await self._watching.catch_up(requester.process, timeout_s=CATCH_UP_S)
        heard = self.present(requester).interruptions
        run, _, count = watched.partition(":")
        return count == str(heard) if run == self._run else heard == 0

    def storing(self, requester: Requester, deadline: float) -> None:
        """A request of that requester is about to be stored."""
        if requester.vm is not None:
            self._until[requester.vm] = max(deadline, self._until.get(requester.vm, 0.0))

    def interrupted(self, vm: VmUuid) -> None:
        """That VM was paused, reset or restored: the next daemon must know, which has not heard it."""
        now = self._clock()
        if now >= max(self._earlier_until, self._until.get(vm, 0.0)):
            return
        begun = vm in self._interrupted
        self._interrupted[vm] = now
        if not begun:
            self._tasks.spawn(self._forget(vm), f"interruption of {vm}")

    async def _forget(self, vm: VmUuid) -> None:
        """One at a time for each VM: its guest may be reset in a loop."""
        try:
            written = -1.0
            while written != self._interrupted[vm]:
                written = self._interrupted[vm]
                await self._journal.interrupt_requests(vm, written)
        except JournalError as error:
            _log.error("vm=%s: the journal cannot take that it was interrupted: %s", vm, error)
        finally:
            del self._interrupted[vm]
