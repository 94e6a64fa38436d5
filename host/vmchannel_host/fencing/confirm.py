# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operator's word that a VM is off (S1, *departure*): for what no proof on this host can ever tell.

It ends the doubt about ends that are proven here: a VM that left in a migration, or was killed and whose last
writes nobody can show to have landed. It never replaces the proof of an end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from fence_vmchannel.messages import FenceAction, FenceCode
from vmchannel_host.fencing import evidence
from vmchannel_host.fencing.coordinator import RunningOperation
from vmchannel_host.fencing.evidence import Claim, Rules
from vmchannel_host.fencing.instances import Instances
from vmchannel_host.fencing.ordered import LookReport
from vmchannel_host.fencing.run import MAX_LOOK_S
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.journal.types import JournalError
from vmchannel_host.model import OperationId, VmUuid
from vmchannel_host.policy.aliases import AliasTable
from vmchannel_host.policy.policy import Policy, Refused

_NONE: Final = OperationId("")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What became of an operator's word."""

    code: FenceCode  # DONE, ALREADY (nothing stands against its being off), or why the word was not taken
    reason: str  # one line for people
    vm_uuid: VmUuid | None = None  # None: no VM was found
    name: str = ""  # untrusted text
    lines: tuple[str, ...] = ()  # the ends that it covers now, one each

    @property
    def ok(self) -> bool:
        """Whether the VM's recorded past stands no longer against calling it off."""
        return self.code in (FenceCode.DONE, FenceCode.ALREADY)


class OperatorWord:
    """Takes it: after a fresh look, durably, and only for what has ended."""

    def __init__(
        self,
        *,
        instances: Instances,
        policy: Callable[[], Policy],
        names: AliasTable,
        rules: Callable[[], Rules],
        running: Callable[[], Iterable[RunningOperation]],
    ) -> None:
        self._instances = instances
        self._policy = policy
        self._names = names
        self._rules = rules
        self._running = running

    async def confirm_off(self, plug: str, by: str) -> Confirmed:
        """Take the word of `by` that the VM is off. Answers within the time of a look and of the journal."""
        registry = self._instances.registry
        found = self._policy().resolve(
            None, FenceAction.STATUS, plug, vms=registry.directory(), names=self._names
        )
        if isinstance(found, Refused):
            return Confirmed(found.code, found.reason)
        vm, name = found.vm_uuid, found.name
        busy = next((one.operation for one in self._running() if one.vm == vm), None)
        if busy is not None:
            return Confirmed(FenceCode.BUSY, f"busy op={busy}: wait for its end", vm, name)
        self._instances.prove_absent(vm)
        covered = frozenset(end.identity for end in registry.ended(vm))  # what is judged, and nothing later
        try:
            report = await self._instances.report(vm, name, timeout_s=MAX_LOOK_S, operation=_NONE, number=0)
            refused = self._judge(vm, name, report)
            if refused is not None:
                return refused
            if not await self._instances.confirm_off(vm, by or "operator", covered):
                reason = "more of its processes ended meanwhile: look again, and confirm again"
                return Confirmed(FenceCode.FAILED, reason, vm, name)
        except (HypervisorError, JournalError, TimeoutError) as error:
            what = (
                "the journal cannot take it" if isinstance(error, JournalError) else "this host cannot look"
            )
            reason = f"{what}: {evidence.cut(str(error)) or 'no answer in time'}"
            return Confirmed(FenceCode.UNAVAILABLE, reason, vm, name)
        _log.warning("vm=%s confirmed off by %r: %d ends", vm, by, len(covered))
        lines = tuple(map(evidence.end_line, report.ends))
        return Confirmed(FenceCode.DONE, f"confirmed off by {by!r}", vm, name, lines)

    def _judge(self, vm: VmUuid, name: str, report: LookReport) -> Confirmed | None:
        """Why the word is not taken, or not needed; None when it is."""
        known = self._instances.registry.knows(vm)
        claim = Claim(vm, name, known, ended=(), owed=frozenset(), reports=(report,))
        doubt = evidence.confirm_doubt(claim)
        if doubt is not None:
            return Confirmed(doubt.code, doubt.reason, vm, name)
        if evidence.off_doubt(claim, self._rules()) is None:
            told = tuple(evidence.confirmed_lines(report))
            return Confirmed(FenceCode.ALREADY, "nothing stands against its being off", vm, name, told)
        return None
