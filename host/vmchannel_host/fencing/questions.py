# SPDX-License-Identifier: LGPL-2.1-or-later
"""Questions about power states: status, list, monitor. They change nothing.

A cache may answer ON only. OFF is the same claim as a finished `off` and needs the same evidence (S0): a
fresh look, records that can be read, and `evidence.off_doubt`. Whatever is between is UNKNOWN.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from fence_vmchannel.messages import FenceAction, FenceCode, FenceTarget, PowerState
from vmchannel_host.fencing import codec, evidence
from vmchannel_host.fencing.evidence import Claim, Rules
from vmchannel_host.fencing.instances import Instances
from vmchannel_host.fencing.ordered import LookReport, Outcome
from vmchannel_host.fencing.records import OperationLog
from vmchannel_host.fencing.run import MAX_LOOK_S, failed
from vmchannel_host.fencing.shared_look import SharedLook
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.journal.types import JournalError, JournalShort
from vmchannel_host.model import Instance, Migration, OperationId, RunState, VmUuid
from vmchannel_host.policy.aliases import AliasTable
from vmchannel_host.policy.policy import Policy, Target

CHECKED_S: Final = 10.0
"""How long one proof that the journal can be written serves `monitor`, seconds: each writes a record."""

_NONE: Final = OperationId("")


class Questions:
    """Answers what is asked of the VMs' states."""

    def __init__(
        self,
        *,
        instances: Instances,
        look: SharedLook,
        policy: Callable[[], Policy],
        names: AliasTable,
        rules: Callable[[], Rules],
        journal: OperationLog,
        clock: Callable[[], float],
    ) -> None:
        self._instances = instances
        self._look = look
        self._policy = policy
        self._names = names
        self._rules = rules
        self._journal = journal
        self._clock = clock
        self._written_at = float("-inf")

    async def status(self, vm: VmUuid, name: str, *, timeout_s: float) -> Outcome:
        """The power state of one VM, proven, or a failure."""
        conflict = self._instances.conflict(vm)
        if conflict:
            return failed(_NONE, FenceCode.AMBIGUOUS, evidence.cut(conflict))
        alive = _alive(self._instances.registry.instances(vm))
        if alive is not None:
            return _on(alive)
        try:
            async with asyncio.timeout(min(MAX_LOOK_S, timeout_s)):
                report = await self._report(vm, name)
                if report.overtaken:
                    report = await self._report(vm, name)
        except (HypervisorError, JournalError, TimeoutError) as error:
            return failed(_NONE, FenceCode.FAILED, _look_failed(error))
        return self._judge(vm, name, report)

    async def targets(self, requester: VmUuid | None, *, timeout_s: float) -> tuple[FenceTarget, ...]:
        """The plugs that the requester may name, with their states: ON or OFF where proven, else UNKNOWN."""
        registry = self._instances.registry
        wanted = self._policy().targets(
            requester, FenceAction.LIST, vms=registry.directory(), names=self._names
        )
        states = {one.vm_uuid: PowerState.ON for one in wanted if _alive(registry.instances(one.vm_uuid))}
        rest = [one for one in wanted if one.vm_uuid not in states]
        if rest:
            states |= await self._look_for(rest, min(MAX_LOOK_S, timeout_s))
        return tuple(
            FenceTarget(one.name or one.vm_uuid, one.vm_uuid, states[one.vm_uuid], one.aliases)
            for one in wanted
        )

    async def monitor(self, requester: VmUuid | None, *, timeout_s: float) -> Outcome:
        """Would fencing work? A permitted plug, a journal that takes a record, a hypervisor that can look."""
        registry = self._instances.registry
        wanted = self._policy().targets(
            requester, FenceAction.MONITOR, vms=registry.directory(), names=self._names
        )
        if not wanted:
            reason = "no VM may be fenced from here: add this VM and its peers to a group of the policy"
            return failed(_NONE, FenceCode.REFUSED, reason)
        but = ""
        try:
            await self._check_journal()
        except JournalShort as error:
            but = f"; only off, for on and reboot are refused: {error}"
        except JournalError as error:
            return failed(_NONE, FenceCode.UNAVAILABLE, f"the journal cannot be written: {error}")
        try:
            await self._look.look(timeout_s=min(MAX_LOOK_S, timeout_s))
        except (HypervisorError, JournalError, TimeoutError) as error:
            return failed(_NONE, FenceCode.UNAVAILABLE, _look_failed(error))
        return Outcome(
            _NONE, True, FenceCode.DONE, PowerState.UNKNOWN, f"{len(wanted)} plugs can be fenced{but}"
        )

    async def _report(self, vm: VmUuid, name: str) -> LookReport:
        self._instances.prove_absent(vm)  # first: a proof must be older than the look that counts (S2)
        asked_at, look = await self._look.look(timeout_s=MAX_LOOK_S)
        await self._journal.check()
        return self._instances.facts(vm, name, asked_at, look)

    async def _look_for(self, wanted: Iterable[Target], timeout_s: float) -> dict[VmUuid, PowerState]:
        states = {one.vm_uuid: PowerState.UNKNOWN for one in wanted}
        for vm in states:
            self._instances.prove_absent(vm)  # first: a proof must be older than the look that counts (S2)
        try:
            asked_at, look = await self._look.look(timeout_s=timeout_s)
            await self._journal.check()
        except (HypervisorError, JournalError, TimeoutError):
            return states
        for one in wanted:
            report = self._instances.facts(one.vm_uuid, one.name, asked_at, look)
            states[one.vm_uuid] = self._judge(one.vm_uuid, one.name, report).state
        return states

    def _judge(self, vm: VmUuid, name: str, report: LookReport) -> Outcome:
        found = evidence.instances_of((report,), vm)
        alive = _alive(found.values())
        if alive is not None and evidence.conflict((report,), vm, name) is None:
            return _on(alive)
        recognised = self._instances.registry.knows(vm) or self._policy().names_uuid(vm)
        claim = Claim(vm, name, recognised, ended=(), owed=frozenset(), reports=(report,))
        doubt = evidence.off_doubt(claim, self._rules())
        ends = (*map(evidence.end_line, report.ends), *evidence.confirmed_lines(report))
        lines = (*ends, evidence.look_line(report, vm))
        if doubt is None:
            return Outcome(_NONE, True, FenceCode.DONE, PowerState.OFF, "off", lines)
        if found and alive is None:
            reason = "migrated away, where it runs is unknown here: only a migration's source is left"
            return failed(_NONE, FenceCode.MIGRATED_AWAY, reason, lines)
        return failed(_NONE, doubt.code, doubt.reason, lines)

    async def _check_journal(self) -> None:
        if self._clock() - self._written_at < CHECKED_S:
            return
        body: codec.Body = {"text": "monitor: the journal can be written"}
        await self._journal.append(codec.CHECK, _NONE, body, if_room=True)
        self._written_at = self._clock()


def _alive(instances: Iterable[Instance]) -> Instance | None:
    """An instance that is on: any process but one that has handed its VM over."""
    return next((one for one in instances if not _handed_over(one)), None)


def _handed_over(instance: Instance) -> bool:
    return instance.run_state is RunState.POSTMIGRATE or (
        instance.migration is Migration.COMPLETED and instance.run_state is not RunState.RUNNING
    )


def _on(instance: Instance) -> Outcome:
    line = f"pid {instance.identity.pid}: {instance.run_state.value}"
    return Outcome(_NONE, True, FenceCode.DONE, PowerState.ON, "on", (line,))


def _look_failed(error: Exception) -> str:
    return f"this host cannot look: {evidence.cut(str(error)) or 'no answer in time'}"
