# SPDX-License-Identifier: LGPL-2.1-or-later
"""No sequence of events, restarts included, lets a VM count as off while a process is unproven (S1)."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.host.registry_builders import HOST, VM1, VM2, instance, look, process
from vmchannel_host.hypervisors import Ended, Seen
from vmchannel_host.journal.types import KnownInstance
from vmchannel_host.model import (
    EndCause,
    EndProof,
    Instance,
    InstanceEnded,
    IoState,
    Migration,
    ProcessIdentity,
    RunState,
)
from vmchannel_host.registry.instance_state import LEAVING, InstanceState, Observation, observe
from vmchannel_host.registry.registry import RegistryRecord, RememberEnd, RememberInstance, VmRegistry

PROCESSES = st.builds(process, st.integers(1, 6), st.sampled_from([VM1, VM2]))
LIVES_HERE = (Observation.RUNS, Observation.STOPS, Observation.SENDS)


class Records:
    """Keeps what the registry emits, as the journal does."""

    def __init__(self) -> None:
        self.rows: dict[ProcessIdentity, KnownInstance] = {}

    def keep(self, records: tuple[RegistryRecord, ...], now: float) -> None:
        for record in records:
            match record:
                case RememberInstance(identity, name, host, migration):
                    row = self.rows.get(identity) or KnownInstance(
                        host, identity, "", migration, now, None, None
                    )
                    self.rows[identity] = replace(row, name=name, migration=migration)
                case RememberEnd(evidence):
                    identity, host = evidence.identity, evidence.host
                    unknown = KnownInstance(host, identity, "", Migration.UNKNOWN, now, None, None)
                    row = self.rows.get(identity, unknown)
                    self.rows[identity] = replace(row, end=evidence, ended_at=row.ended_at or now)
                case _:
                    assert_never(record)

    def confirm(self, vm: str, by: str) -> None:
        """As `Journal.remember_confirmed`: what has ended by now."""
        for identity, row in self.rows.items():
            if identity.vm_uuid == vm and row.end is not None and not row.confirmed_by:
                self.rows[identity] = replace(row, confirmed_by=by)


class RegistryMachine(RuleBasedStateMachine):
    """Any events in any order, against a model that knows only what was recorded and what was proven."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = VmRegistry(HOST, standalone=True)
        self.records = Records()
        self.now = 1.0
        self.recorded: set[ProcessIdentity] = set()
        self.proven: set[ProcessIdentity] = set()
        self.leaving: set[ProcessIdentity] = set()  # a migration from it was active or done when last watched
        self.departed: set[str] = set()  # VMs that left, with no sign of life here since
        self.confirmed: set[str] = set()  # VMs of which nothing was heard since the operator's word

    def keep(self, records: tuple[RegistryRecord, ...]) -> None:
        self.now += 1.0
        self.records.keep(records, self.now)

    def note(self, report: Instance) -> None:
        """The model's view of a report."""
        self.confirmed.discard(report.vm_uuid)
        if report.identity in self.proven:
            return
        self.recorded.add(report.identity)
        what = observe(report)
        if what in (Observation.SENDS, Observation.SENT, Observation.RESUMES):
            self.leaving.add(report.identity)
        elif what in (Observation.RUNS, Observation.STOPS, Observation.STARTS):
            tracked = {one.identity: one.state for one in self.registry.unproven(report.vm_uuid)}
            if tracked.get(report.identity) not in (InstanceState.POSTMIGRATE, InstanceState.RESUMED):
                self.leaving.discard(report.identity)
        if what in LIVES_HERE:
            self.departed.discard(report.vm_uuid)

    @rule(
        identity=PROCESSES,
        run_state=st.sampled_from(RunState),
        migration=st.sampled_from(Migration),
        name=st.sampled_from(["", "vm1", "vm2"]),
        by_look=st.booleans(),
    )
    def report(
        self, identity: ProcessIdentity, run_state: RunState, migration: Migration, name: str, by_look: bool
    ) -> None:
        report = Instance(identity, name, run_state, migration)
        self.keep(self.registry.apply_look(look(report)) if by_look else self.registry.apply(Seen(report)))
        self.note(report)

    @rule(
        identity=PROCESSES,
        proof=st.sampled_from(EndProof),
        cause=st.sampled_from(EndCause),
        io=st.sampled_from(IoState),
        departed=st.booleans(),
    )
    def end(
        self, identity: ProcessIdentity, proof: EndProof, cause: EndCause, io: IoState, departed: bool
    ) -> None:
        self.keep(self.registry.apply(Ended(InstanceEnded(HOST, identity, proof, cause, io, departed, 1))))
        self.recorded.add(identity)
        self.confirmed.discard(identity.vm_uuid)
        if identity in self.proven:
            return
        self.proven.add(identity)
        others = [one for one in self.registry.unproven(identity.vm_uuid) if one.instance is not None]
        if (departed or identity in self.leaving) and not others:
            self.departed.add(identity.vm_uuid)

    @rule()
    def empty_look(self) -> None:
        self.keep(self.registry.apply_look(look()))

    @rule(vm=st.sampled_from([VM1, VM2]))
    def operator_confirms(self, vm: str) -> None:
        uuid = process(vm=VM1 if vm == VM1 else VM2).vm_uuid
        covered = frozenset(end.identity for end in self.registry.ended(uuid))
        self.records.confirm(uuid, "root")
        self.registry.confirm_off(uuid, "root", covered)
        self.departed.discard(vm)
        self.confirmed.add(vm)

    @rule(standalone=st.booleans())
    def daemon_restarts(self, standalone: bool) -> None:
        self.registry = VmRegistry(HOST, standalone=standalone)
        self.registry.restore(self.records.rows.values())

    @invariant()
    def a_recorded_process_is_unproven_until_its_end_is_proven(self) -> None:
        for vm in (VM1, VM2):
            expected = {one for one in self.recorded - self.proven if one.vm_uuid == vm}
            assert {one.identity for one in self.registry.unproven(vm)} == expected
            if expected:
                assert self.registry.objections(vm) != ()

    @invariant()
    def a_departure_stands_until_the_vm_is_seen_or_confirmed(self) -> None:
        for vm in (VM1, VM2):
            if vm in self.departed:
                assert self.registry.departed(vm) is not None
                assert self.registry.objections(vm) != ()

    @invariant()
    def an_operators_word_holds_also_after_a_restart(self) -> None:
        for vm in (VM1, VM2):
            if vm in self.confirmed:
                assert self.registry.departed(vm) is None
                assert self.registry.ended(vm) == ()

    @invariant()
    def every_recorded_vm_is_known(self) -> None:
        assert self.registry.vms() == {one.vm_uuid for one in self.recorded}


RegistryMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRegistryMachine = RegistryMachine.TestCase


def test_the_model_knows_every_state_that_a_departure_comes_from() -> None:
    reports = [instance(run_state=run, migration=migration) for run in RunState for migration in Migration]
    leaving = {observe(report) for report in reports} & {
        Observation.SENDS,
        Observation.SENT,
        Observation.RESUMES,
    }
    assert len(leaving) == len(LEAVING)
