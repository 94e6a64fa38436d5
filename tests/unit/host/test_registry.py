# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the registry knows of VMs, and what it does not believe (S1, S9)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.host.registry_builders import (
    HOST,
    VM1,
    VM2,
    VM3,
    end,
    ended,
    instance,
    known,
    look,
    mute,
    process,
    seen,
    vanished,
)
from vmchannel_host.hypervisors import Ended, Seen
from vmchannel_host.model import (
    NIL_UUID,
    EndCause,
    EndProof,
    HostName,
    InstanceEnded,
    IoState,
    Migration,
    PidNamespace,
    ProcessIdentity,
    RunState,
)
from vmchannel_host.registry.conflicts import ConflictKind
from vmchannel_host.registry.instance_state import (
    TRANSITIONS,
    ImpossibleTransition,
    InstanceState,
    Observation,
    advance,
    from_migration,
    observe,
    to_migration,
)
from vmchannel_host.registry.registry import RememberEnd, RememberInstance, VmRegistry
from vmchannel_host.registry.vm_history import KEPT_ENDS


@pytest.fixture
def registry() -> VmRegistry:
    return VmRegistry(HOST, standalone=True)


@pytest.fixture
def shared_registry() -> VmRegistry:
    """Other hosts could run the VMs too."""
    return VmRegistry(HOST, standalone=False)


# --- the table


def test_every_pair_of_state_and_observation_is_in_the_table_but_receiving_after_sending() -> None:
    missing = {
        (state, seen) for state in InstanceState for seen in Observation if (state, seen) not in TRANSITIONS
    }
    assert missing == {
        (InstanceState.OUTGOING, Observation.RECEIVES),
        (InstanceState.POSTMIGRATE, Observation.RECEIVES),
        (InstanceState.RESUMED, Observation.RECEIVES),
    }


def test_only_a_proven_end_leads_to_gone_and_nothing_leads_back() -> None:
    into = {key for key, target in TRANSITIONS.items() if target is InstanceState.GONE}
    assert into == {(state, Observation.ENDS) for state in InstanceState} | {
        (InstanceState.GONE, seen) for seen in Observation
    }


def test_a_mute_monitor_changes_no_state() -> None:
    assert all(advance(state, Observation.MUTE) is state for state in InstanceState)


def test_what_is_not_in_the_table_is_an_error() -> None:
    with pytest.raises(ImpossibleTransition, match="receives after postmigrate"):
        advance(InstanceState.POSTMIGRATE, Observation.RECEIVES)


def test_a_source_that_runs_again_after_the_handover_is_never_plainly_running() -> None:
    state = advance(InstanceState.POSTMIGRATE, Observation.RUNS)
    assert state is InstanceState.RESUMED
    assert advance(state, Observation.STOPS) is InstanceState.RESUMED


@pytest.mark.parametrize("run_state", RunState)
@pytest.mark.parametrize("migration", Migration)
def test_every_report_is_an_observation_and_none_is_an_end(run_state: RunState, migration: Migration) -> None:
    assert observe(instance(run_state=run_state, migration=migration)) is not Observation.ENDS


@pytest.mark.parametrize("state", [state for state in InstanceState if state is not InstanceState.GONE])
def test_a_state_that_is_remembered_never_comes_back_less_suspect(state: InstanceState) -> None:
    order = [Migration.NONE, Migration.UNKNOWN, Migration.INCOMING, Migration.OUTGOING, Migration.COMPLETED]
    again = to_migration(from_migration(to_migration(state)))
    assert order.index(again) >= order.index(to_migration(state))


# --- seen and ended


def test_a_vm_that_is_seen_is_known_with_its_name_and_recorded(registry: VmRegistry) -> None:
    records = registry.apply(seen())
    assert records == (RememberInstance(process(), "vm1", HOST, Migration.NONE),)
    assert registry.vms() == {VM1}
    assert registry.directory().bearers("vm1") == {VM1}
    assert registry.instances(VM1) == (instance(),)


def test_the_same_report_again_is_not_recorded_again(registry: VmRegistry) -> None:
    registry.apply(seen())
    assert registry.apply(seen(run_state=RunState.PAUSED)) == ()


def test_a_migration_that_begins_is_recorded_at_once(registry: VmRegistry) -> None:
    registry.apply(seen())
    records = registry.apply(seen(migration=Migration.OUTGOING))
    assert records == (RememberInstance(process(), "vm1", HOST, Migration.OUTGOING),)


def test_a_proven_end_leaves_no_objection(registry: VmRegistry) -> None:
    registry.apply(seen())
    assert registry.apply(ended()) == (RememberEnd(end()),)
    assert registry.unproven(VM1) == ()
    assert registry.ended(VM1) == (end(),)
    assert registry.objections(VM1) == ()


@pytest.mark.parametrize("run_state", RunState)
def test_a_live_process_stands_against_off_in_every_run_state(
    registry: VmRegistry, run_state: RunState
) -> None:
    registry.apply(seen(run_state=run_state))
    assert "not proven to have ended" in registry.objections(VM1)[0]


def test_a_look_that_finds_nothing_ends_nothing(registry: VmRegistry) -> None:
    registry.apply(seen())
    registry.apply_look(look())
    assert [one.identity for one in registry.unproven(VM1)] == [process()]


def test_a_look_adds_what_no_event_told(registry: VmRegistry) -> None:
    records = registry.apply_look(look(instance()))
    assert [type(record) for record in records] == [RememberInstance]
    assert registry.knows(VM1)


def test_a_report_that_was_under_way_when_the_end_was_proven_revives_nothing(registry: VmRegistry) -> None:
    registry.apply(seen())
    registry.apply(ended())
    assert registry.apply(seen()) == ()
    assert registry.unproven(VM1) == ()


def test_a_second_proof_settles_io_and_adds_a_departure_but_takes_none_back(registry: VmRegistry) -> None:
    registry.apply(seen())
    registry.apply(Ended(end(io=IoState.UNPROVEN)))
    (record,) = registry.apply(Ended(end(io=IoState.SETTLED, departed=True)))
    assert isinstance(record, RememberEnd)
    assert (record.evidence.io, record.evidence.departed) == (IoState.SETTLED, True)
    assert registry.apply(Ended(end(departed=False))) == ()
    assert registry.departed(VM1) is not None


def test_the_end_of_a_process_that_was_never_seen_is_kept_too(registry: VmRegistry) -> None:
    assert registry.apply(ended()) == (RememberEnd(end()),)
    assert registry.knows(VM1)


def test_a_vm_never_seen_has_no_objections_and_is_not_known(registry: VmRegistry) -> None:
    assert registry.objections(VM1) == ()
    assert not registry.knows(VM1)
    assert registry.names(VM1) == frozenset()


# --- records


def test_a_recorded_process_without_a_proof_is_unproven_after_a_restart(registry: VmRegistry) -> None:
    registry.restore([known()])
    (tracked,) = registry.unproven(VM1)
    assert (tracked.identity, tracked.instance, tracked.host) == (process(), None, HOST)
    assert registry.instances(VM1) == ()
    assert registry.objections(VM1) != ()
    assert registry.names(VM1) == {"vm1"}


def test_a_recorded_end_is_known_after_a_restart(registry: VmRegistry) -> None:
    registry.restore([known(ended_at=1100.0)])
    assert registry.objections(VM1) == ()
    assert registry.ended(VM1) == (end(),)


def test_a_departure_survives_a_restart(registry: VmRegistry) -> None:
    registry.restore([known(ended_at=1100.0, proof=end(departed=True))])
    assert registry.departed(VM1) is not None


def test_a_departure_is_history_after_a_restart_when_the_vm_ran_here_later(registry: VmRegistry) -> None:
    left = known(ended_at=1100.0, proof=end(departed=True))
    registry.restore([left, known(101, first_seen=1200.0, ended_at=1300.0)])
    assert registry.departed(VM1) is None
    assert registry.ended(VM1) == (end(101),)


@pytest.mark.parametrize(
    ("first_seen", "migration"),
    [(1100.0, Migration.NONE), (1050.0, Migration.NONE), (1200.0, Migration.UNKNOWN)],
    ids=["at the same time", "before", "never seen to run"],
)
def test_a_departure_stands_after_a_restart_beside_a_process_that_proves_no_return(
    registry: VmRegistry, first_seen: float, migration: Migration
) -> None:
    left = known(ended_at=1100.0, proof=end(departed=True))
    other = known(101, first_seen=first_seen, ended_at=1300.0, migration=migration)
    registry.restore([left, other])
    assert registry.departed(VM1) is not None


def test_a_process_that_never_ran_the_vm_ends_no_departure_after_a_restart_either(
    registry: VmRegistry,
) -> None:
    (record,) = registry.apply(seen(101, run_state=RunState.PRELAUNCH))
    assert isinstance(record, RememberInstance)
    again = VmRegistry(HOST, standalone=True)
    left = known(ended_at=1100.0, proof=end(departed=True))
    again.restore([left, known(101, first_seen=1200.0, migration=record.migration)])
    assert again.departed(VM1) is not None


def test_a_destination_that_was_watched_before_a_restart_brings_the_vm_back_after_it(
    registry: VmRegistry,
) -> None:
    left = known(ended_at=1100.0, proof=end(departed=True))
    registry.restore([left, known(101, first_seen=1050.0, migration=Migration.INCOMING)])
    assert registry.departed(VM1) is not None
    registry.apply(seen(101))
    assert registry.departed(VM1) is None


def test_an_end_found_after_a_restart_is_judged_by_the_migration_last_watched(registry: VmRegistry) -> None:
    registry.restore([known(migration=Migration.OUTGOING)])
    (record,) = registry.apply(vanished())
    assert isinstance(record, RememberEnd)
    assert record.evidence.departed
    assert "during a migration" in str(registry.departed(VM1))


# --- departures


@pytest.mark.parametrize(
    ("run_state", "migration"),
    [
        (RunState.POSTMIGRATE, Migration.COMPLETED),
        (RunState.POSTMIGRATE, Migration.NONE),
        (RunState.RUNNING, Migration.OUTGOING),
        (RunState.FINISH_MIGRATE, Migration.OUTGOING),
        (RunState.FINISH_MIGRATE, Migration.NONE),
        (RunState.RUNNING, Migration.COMPLETED),
    ],
)
def test_an_end_at_or_after_a_switch_over_is_a_departure(
    registry: VmRegistry, run_state: RunState, migration: Migration
) -> None:
    registry.apply(seen())
    registry.apply(seen(run_state=run_state, migration=migration))
    registry.apply(mute())  # what was last watched counts
    registry.apply(ended())
    assert registry.departed(VM1) is not None
    assert registry.objections(VM1) != ()


def test_a_migration_that_failed_leaves_no_departure(registry: VmRegistry) -> None:
    registry.apply(seen(migration=Migration.OUTGOING))
    registry.apply(seen(migration=Migration.NONE))
    registry.apply(ended())
    assert registry.departed(VM1) is None


def test_a_vm_that_is_seen_again_has_not_departed(registry: VmRegistry) -> None:
    registry.apply(seen(run_state=RunState.POSTMIGRATE))
    registry.apply(ended())
    registry.apply(seen(101))
    assert registry.departed(VM1) is None
    assert registry.ended(VM1) == ()


def test_a_process_whose_record_lacks_the_namespace_is_recorded_again(registry: VmRegistry) -> None:
    registry.apply(seen())
    identity = replace(process(), pid_namespace=PidNamespace(4026531836))
    (record,) = registry.apply(Seen(replace(instance(), identity=identity)))
    assert isinstance(record, RememberInstance)
    assert record.identity.pid_namespace == 4026531836
    assert registry.apply(Seen(replace(instance(), identity=identity))) == ()


@pytest.mark.parametrize("run_state", [RunState.PRELAUNCH, RunState.INMIGRATE, RunState.UNKNOWN])
def test_a_process_that_does_not_run_the_vm_ends_no_departure(
    registry: VmRegistry, run_state: RunState
) -> None:
    registry.apply(seen(run_state=RunState.POSTMIGRATE))
    registry.apply(ended())
    registry.apply(seen(101, run_state=run_state))
    assert registry.departed(VM1) is not None


def test_the_end_of_the_process_that_forked_a_daemonized_qemu_is_history(registry: VmRegistry) -> None:
    by_itself = Ended(end(100, cause=EndCause.NONE, io=IoState.UNPROVEN))
    registry.apply(mute(100))
    registry.apply(mute(101))
    registry.apply(seen(101))
    registry.apply(by_itself)
    assert registry.ended(VM1) == ()
    other = VmRegistry(HOST, standalone=True)
    other.apply(mute(100))
    other.apply(mute(101))
    other.apply(by_itself)
    assert other.ended(VM1) != ()  # until the second is seen to be the QEMU
    other.apply(seen(101, run_state=RunState.PRELAUNCH))
    assert other.ended(VM1) == ()


def test_it_is_history_after_a_restart_too(registry: VmRegistry) -> None:
    forked = end(100, cause=EndCause.NONE, io=IoState.UNPROVEN)
    left = known(100, migration=Migration.UNKNOWN, first_seen=1000.0, ended_at=1000.2, proof=forked)
    registry.restore([left, known(101, first_seen=1000.1)])
    assert registry.ended(VM1) == ()


@pytest.mark.parametrize(
    ("first", "second", "proof"),
    [
        (seen(100), seen(101), end(100, cause=EndCause.NONE, io=IoState.UNPROVEN)),
        (mute(100), mute(101), end(100, cause=EndCause.NONE, io=IoState.UNPROVEN)),
        (mute(100), seen(101), end(100, cause=EndCause.KILL, io=IoState.UNPROVEN)),
        (mute(100), seen(101), end(100, cause=EndCause.NONE, io=IoState.UNPROVEN, departed=True)),
        (mute(100), seen(121), end(100, cause=EndCause.NONE, io=IoState.UNPROVEN)),
        (mute(101), seen(100), end(101, cause=EndCause.NONE, io=IoState.UNPROVEN)),
    ],
    ids=["it ran the VM", "neither answers", "killed by us", "in a migration", "long before", "after it"],
)
def test_the_end_of_a_process_that_may_have_run_the_vm_stands(
    registry: VmRegistry, first: Seen, second: Seen, proof: InstanceEnded
) -> None:
    registry.apply(first)
    registry.apply(second)
    registry.apply(Ended(proof))
    assert registry.ended(VM1) == (proof,)


def test_a_second_copy_that_was_there_before_ends_no_departure(registry: VmRegistry) -> None:
    registry.apply(seen(101))
    registry.apply(seen(100, migration=Migration.OUTGOING))
    registry.apply(ended(100))
    registry.apply(mute(101))
    registry.apply(seen(101, run_state=RunState.PAUSED))
    assert registry.departed(VM1) is not None


def test_a_second_copy_that_only_now_answers_ends_no_departure(registry: VmRegistry) -> None:
    registry.apply(mute(101))
    registry.apply(seen(100, migration=Migration.OUTGOING))
    registry.apply(ended(100))
    registry.apply(seen(101))
    assert registry.departed(VM1) is not None


def test_a_migration_that_was_watched_at_both_ends_is_no_departure(registry: VmRegistry) -> None:
    registry.apply(seen(100, migration=Migration.OUTGOING))
    registry.apply(seen(101, run_state=RunState.INMIGRATE, migration=Migration.INCOMING))
    registry.apply(seen(100, run_state=RunState.POSTMIGRATE, migration=Migration.COMPLETED))
    registry.apply(seen(101))
    assert registry.conflicts(VM1) == ()
    registry.apply(ended(100))
    assert registry.departed(VM1) is None


def test_a_destination_that_runs_after_its_source_ended_brings_the_vm_back(registry: VmRegistry) -> None:
    registry.apply(seen(100, migration=Migration.OUTGOING))
    registry.apply(seen(101, run_state=RunState.INMIGRATE, migration=Migration.INCOMING))
    registry.apply(ended(100))
    assert registry.departed(VM1) is not None
    registry.apply(seen(101))
    assert registry.departed(VM1) is None


def covered(registry: VmRegistry) -> frozenset[ProcessIdentity]:
    """What an operator's word covers now."""
    return frozenset(end.identity for end in registry.ended(VM1))


def test_an_operator_ends_a_departure_but_not_a_process(registry: VmRegistry) -> None:
    registry.apply(seen(100, run_state=RunState.POSTMIGRATE))
    registry.apply(ended(100))
    registry.apply(mute(101))
    registry.confirm_off(VM1, "root", covered(registry))
    assert registry.departed(VM1) is None
    assert len(registry.objections(VM1)) == 1


def test_an_operators_word_is_told_with_the_end_that_it_covers_until_the_vm_is_seen(
    registry: VmRegistry,
) -> None:
    registry.apply(seen(100, run_state=RunState.POSTMIGRATE))
    registry.apply(ended(100))
    registry.confirm_off(VM1, "root", covered(registry))
    registry.confirm_off(VM1, "mallory", covered(registry))
    ((told, by),) = registry.confirmed(VM1)
    assert (told.identity, by) == (process(100), "root")
    assert registry.ended(VM1) == ()
    registry.apply(seen(101))
    assert registry.confirmed(VM1) == ()


def test_an_operators_word_ends_no_departure_that_comes_after_it(registry: VmRegistry) -> None:
    registry.apply(seen(100, run_state=RunState.POSTMIGRATE))
    registry.apply(ended(100))
    word = covered(registry)
    registry.apply(seen(101, run_state=RunState.POSTMIGRATE))
    registry.apply(ended(101))
    registry.confirm_off(VM1, "root", word)
    assert registry.departed(VM1) is not None


def test_an_operators_word_covers_no_process_that_has_not_ended(registry: VmRegistry) -> None:
    registry.apply(seen(100, run_state=RunState.POSTMIGRATE))
    registry.confirm_off(VM1, "root", frozenset({process(100)}))
    registry.apply(ended(100))
    assert registry.departed(VM1) is not None


def test_an_operators_word_is_repeated_from_the_records(registry: VmRegistry) -> None:
    left = end(100, departed=True)
    registry.restore([replace(known(100, ended_at=2000.0, proof=left), confirmed_by="root")])
    assert registry.departed(VM1) is None
    assert [by for _, by in registry.confirmed(VM1)] == ["root"]


def test_a_departure_recorded_after_an_operators_word_stands_after_a_restart(registry: VmRegistry) -> None:
    left, again = end(100, departed=True), end(101, departed=True)
    registry.restore(
        [
            replace(known(100, ended_at=2000.0, proof=left), confirmed_by="root"),
            known(101, first_seen=2100.0, ended_at=2200.0, proof=again),
        ]
    )
    assert registry.departed(VM1) is not None


@pytest.mark.parametrize("proof", [EndProof.ABSENT, EndProof.OTHER_BOOT])
def test_an_end_that_nobody_watched_is_a_departure_unless_the_host_stands_alone(proof: EndProof) -> None:
    for standalone in (True, False):
        registry = VmRegistry(HOST, standalone=standalone)
        registry.apply(seen())
        registry.apply(
            Ended(
                InstanceEnded(HOST, process(), proof, vanished().evidence.cause, IoState.UNPROVEN, False, 0)
            )
        )
        assert (registry.departed(VM1) is None) == standalone


def test_what_standalone_says_can_be_reloaded(registry: VmRegistry) -> None:
    registry.apply(seen())
    registry.apply(vanished())
    assert registry.departed(VM1) is None
    registry.set_standalone(False)
    assert "nobody watched" in str(registry.departed(VM1))


def test_a_kill_of_a_qemu_that_never_answered_proves_no_off_where_other_hosts_are(
    shared_registry: VmRegistry,
) -> None:
    shared_registry.apply(mute())
    shared_registry.apply(ended())
    assert "never answered" in str(shared_registry.departed(VM1))


def test_a_kill_of_a_qemu_that_answered_before_it_hung_proves_its_end(shared_registry: VmRegistry) -> None:
    shared_registry.apply(seen())
    shared_registry.apply(mute())
    shared_registry.apply(ended())
    assert shared_registry.objections(VM1) == ()


def test_a_destination_killed_before_it_had_the_vm_leaves_it_at_its_source(
    shared_registry: VmRegistry,
) -> None:
    shared_registry.apply(seen(run_state=RunState.INMIGRATE))
    shared_registry.apply(ended())
    assert "source" in str(shared_registry.departed(VM1))


def test_a_failed_migration_within_the_host_is_no_departure(shared_registry: VmRegistry) -> None:
    shared_registry.apply(seen(100))
    shared_registry.apply(seen(101, run_state=RunState.INMIGRATE))
    shared_registry.apply(ended(101))
    assert shared_registry.departed(VM1) is None


# --- conflicts


def kinds(registry: VmRegistry) -> set[ConflictKind]:
    return {conflict.kind for conflict in registry.all_conflicts()}


def test_a_nil_uuid_is_a_conflict_and_no_vm(registry: VmRegistry) -> None:
    registry.apply(seen(vm=NIL_UUID))
    (conflict,) = registry.conflicts(NIL_UUID)
    assert conflict.kind is ConflictKind.NIL_UUID
    assert conflict.refuses
    assert "-uuid" in conflict.text
    assert registry.vms() == frozenset()
    assert NIL_UUID not in registry.directory()
    assert not registry.knows(NIL_UUID)


def test_one_uuid_with_two_names_is_refused_and_both_are_named(registry: VmRegistry) -> None:
    registry.apply(seen(100, name="vm1"))
    registry.apply(seen(101, name="copy"))
    conflict = registry.conflicts(VM1)[0]
    assert conflict.kind is ConflictKind.TWO_NAMES
    assert conflict.refuses
    assert "'vm1'" in conflict.text
    assert "'copy'" in conflict.text
    assert conflict.text in registry.objections(VM1)


def test_two_names_are_joined_by_a_migration_that_is_watched(registry: VmRegistry) -> None:
    registry.apply(seen(100, name="vm1", migration=Migration.OUTGOING))
    registry.apply(seen(101, name="vm1-incoming", run_state=RunState.INMIGRATE, migration=Migration.INCOMING))
    assert registry.conflicts(VM1) == ()


def test_two_names_are_not_joined_by_a_destination_alone(registry: VmRegistry) -> None:
    registry.apply(seen(100, name="vm1"))
    registry.apply(seen(101, name="other", run_state=RunState.INMIGRATE, migration=Migration.INCOMING))
    assert kinds(registry) == {ConflictKind.TWO_NAMES}


def test_two_names_are_not_joined_by_a_migration_to_elsewhere(registry: VmRegistry) -> None:
    registry.apply(seen(100, name="vm1", migration=Migration.OUTGOING))
    registry.apply(seen(101, name="copy"))
    assert kinds(registry) == {ConflictKind.TWO_NAMES}


def test_two_names_are_not_joined_by_two_sources_or_two_destinations(registry: VmRegistry) -> None:
    registry.apply(seen(100, VM1, name="a", migration=Migration.OUTGOING))
    registry.apply(seen(101, VM1, name="b", run_state=RunState.POSTMIGRATE))
    registry.apply(seen(102, VM2, name="c", run_state=RunState.INMIGRATE))
    registry.apply(seen(103, VM2, name="d", run_state=RunState.INMIGRATE))
    assert [one.kind for one in registry.conflicts(VM1)] == [ConflictKind.TWO_NAMES]
    assert [one.kind for one in registry.conflicts(VM2)] == [ConflictKind.TWO_NAMES]


def test_two_instances_without_a_migration_are_shown_but_do_not_stop_a_fence(registry: VmRegistry) -> None:
    registry.apply(seen(100))
    registry.apply(seen(101))
    (conflict,) = registry.conflicts(VM1)
    assert conflict.kind is ConflictKind.TWO_INSTANCES
    assert not conflict.refuses


def test_a_source_that_was_resumed_beside_its_destination_is_a_conflict(registry: VmRegistry) -> None:
    registry.apply(seen(100, migration=Migration.OUTGOING))
    registry.apply(seen(101, run_state=RunState.INMIGRATE, migration=Migration.INCOMING))
    registry.apply(seen(100, run_state=RunState.POSTMIGRATE, migration=Migration.COMPLETED))
    registry.apply(seen(101))
    registry.apply(seen(100, migration=Migration.COMPLETED))
    assert kinds(registry) == {ConflictKind.TWO_INSTANCES}


def test_a_process_that_is_only_recorded_makes_no_conflict(registry: VmRegistry) -> None:
    registry.restore([known(100, name="old")])
    registry.apply(seen(101, name="new"))
    assert registry.conflicts(VM1) == ()
    assert registry.names(VM1) == {"old", "new"}


def test_a_report_that_cannot_be_is_told_and_believed_in_nothing(registry: VmRegistry) -> None:
    registry.apply(seen(run_state=RunState.POSTMIGRATE))
    registry.apply(seen(run_state=RunState.INMIGRATE))
    assert kinds(registry) == {ConflictKind.CONTRADICTION}
    registry.apply(ended())
    assert registry.departed(VM1) is not None


def test_conflicts_of_the_last_look_are_told_until_the_next(registry: VmRegistry) -> None:
    registry.apply_look(look(conflicts=("two QEMUs on one socket",)))
    assert [conflict.text for conflict in registry.all_conflicts()] == ["two QEMUs on one socket"]
    registry.apply_look(look())
    assert registry.all_conflicts() == ()


# --- names and bounds


def test_a_vm_that_is_off_keeps_its_last_name(registry: VmRegistry) -> None:
    registry.apply(seen(100, name="before"))
    registry.apply(ended(100))
    registry.apply(seen(101, name="after"))
    registry.apply(ended(101))
    assert registry.names(VM1) == {"after"}
    assert registry.name(VM1) == "after"


def test_a_name_is_kept_however_many_nameless_processes_follow(registry: VmRegistry) -> None:
    registry.apply(seen(1))
    registry.apply(ended(1))
    for pid in range(2, 50):
        registry.apply(mute(pid))
        registry.apply(ended(pid))
    assert registry.names(VM1) == {"vm1"}


def test_a_name_borne_by_two_vms_shows_both(registry: VmRegistry) -> None:
    registry.apply(seen(100, VM1, name="web"))
    registry.apply(seen(101, VM2, name="web"))
    registry.apply(seen(102, VM3, name="db"))
    assert registry.directory().bearers("web") == {VM1, VM2}


def test_the_directory_is_made_anew_only_when_a_name_may_have_changed(registry: VmRegistry) -> None:
    registry.apply(seen())
    first = registry.directory()
    registry.apply(seen(run_state=RunState.PAUSED))
    assert registry.directory() is first
    registry.apply(seen(name="renamed"))
    assert registry.directory().names(VM1) == {"renamed"}


def test_a_vm_that_is_only_defined_has_a_name_and_was_never_seen() -> None:
    defined = {VM2: "new", NIL_UUID: "none"}
    registry = VmRegistry(HOST, standalone=True, defined=lambda: defined)
    registry.apply(seen())
    assert registry.directory().bearers("new") == {VM2}
    assert NIL_UUID not in registry.directory()
    assert registry.vms() == {VM1}
    assert not registry.knows(VM2)
    assert registry.directory() is registry.directory()
    defined = {VM3: "new"}
    assert registry.directory().bearers("new") == {VM3}


def test_s9_a_vm_that_is_defined_under_another_name_bears_both() -> None:
    registry = VmRegistry(HOST, standalone=True, defined=lambda: {VM1: "later", VM2: "vm1"})
    registry.apply(seen())
    assert registry.directory().names(VM1) == {"vm1", "later"}
    assert registry.directory().bearers("vm1") == {VM1, VM2}


def test_a_vm_that_restarts_for_ever_costs_bounded_memory(registry: VmRegistry) -> None:
    registry.apply(seen(1, run_state=RunState.POSTMIGRATE))
    registry.apply(ended(1))
    for pid in range(2, 200):  # none of these ever ran the VM: the departure stands
        registry.apply(seen(pid, run_state=RunState.PRELAUNCH))
        registry.apply(ended(pid))
    assert len(registry.ended(VM1)) <= KEPT_ENDS + 1
    assert "pid 1 " in str(registry.departed(VM1))


def test_s1_a_kill_whose_writes_are_unproven_stands_until_the_vm_is_seen_to_live(
    registry: VmRegistry,
) -> None:
    registry.apply(seen(1))
    registry.apply(Ended(end(1, io=IoState.UNPROVEN)))
    for pid in range(2, 200):  # none of these gets the disk, which the dead one still holds
        registry.apply(seen(pid, run_state=RunState.PRELAUNCH))
        registry.apply(Ended(end(pid, cause=EndCause.NONE, io=IoState.UNPROVEN)))
    assert process(1) in [one.identity for one in registry.ended(VM1)]
    assert len(registry.ended(VM1)) <= KEPT_ENDS + 1
    registry.apply(seen(200))
    registry.apply(ended(200))
    assert [one.identity for one in registry.ended(VM1)] == [process(200)]


def test_a_look_of_another_host_is_kept_under_its_name(registry: VmRegistry) -> None:
    other = HostName("hv2")
    seen_there = look(instance())
    registry.apply_look(type(seen_there)(other, 5.0, seen_there.instances))
    assert registry.unproven(VM1)[0].host == other


def test_a_qemu_that_no_configured_socket_leads_to_is_nobodys_vm(registry: VmRegistry) -> None:
    foreign = replace(instance(name=""), configured=False)
    assert registry.apply(Seen(foreign)) == ()
    assert registry.vms() == frozenset()


def test_a_qemu_that_no_configured_socket_leads_to_is_an_instance_of_a_vm_that_is_expected_or_known(
    registry: VmRegistry,
) -> None:
    registry.expect([VM1])
    registry.apply(Seen(replace(instance(100, VM1, name=""), configured=False)))
    registry.apply(seen(200, VM2))
    registry.apply(Seen(replace(instance(201, VM2, name=""), configured=False)))
    assert [one.identity for one in registry.unproven(VM1)] == [process(100, VM1)]
    assert [one.identity for one in registry.unproven(VM2)] == [process(200, VM2), process(201, VM2)]
