# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of watched instances and its events. Pidfds are pipes: readable once the writer closes."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from dataclasses import replace

import pytest

from vmchannel_host.hypervisors import Ended, Seen
from vmchannel_host.hypervisors.cmdline import CommandLine
from vmchannel_host.hypervisors.instances import MAX_REMEMBERED, EventQueue, InstanceTable, Watched
from vmchannel_host.hypervisors.process import VerifiedProcess
from vmchannel_host.hypervisors.qmp_state import MonitorFacts
from vmchannel_host.model import (
    BootId,
    EndCause,
    EndProof,
    HostName,
    Instance,
    InstanceEnded,
    IoState,
    Migration,
    ProcessIdentity,
    RunState,
    VmUuid,
)

UUID = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
FACTS = MonitorFacts("vm1", RunState.RUNNING, Migration.NONE, (), resettable=True)


def identity(pid: int = 10, vm_uuid: VmUuid = UUID) -> ProcessIdentity:
    return ProcessIdentity(pid, 1, "/usr/bin/qemu-system-x86_64", vm_uuid, BootId("boot"))


def ended(who: ProcessIdentity) -> InstanceEnded:
    return InstanceEnded(
        HostName("hv1"), who, EndProof.PIDFD, EndCause.NONE, IoState.UNPROVEN, departed=False, elapsed_ms=0
    )


def seen(who: ProcessIdentity, run_state: RunState) -> Seen:
    return Seen(Instance(who, "vm1", run_state, Migration.NONE))


class Processes:
    """Makes processes whose pidfd is one end of a pipe."""

    def __init__(self) -> None:
        self._writers: list[int] = []
        self._made: list[VerifiedProcess] = []

    def make(self, who: ProcessIdentity, name: str = "vm1") -> VerifiedProcess:
        reader, writer = os.pipe()
        self._writers.append(writer)
        process = VerifiedProcess(who, CommandLine((who.vm_uuid,), name), reader)
        self._made.append(process)
        return process

    def holds(self, process: VerifiedProcess) -> bool:
        """Whether its pidfd is open: a pipe that nobody can read any more is an error for its writer."""
        poll = select.poll()
        poll.register(self._writers[self._made.index(process)], 0)
        return not poll.poll(0)

    def close(self) -> None:
        for process in self._made:
            process.close()
        for writer in self._writers:
            os.close(writer)


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    made.close()


async def test_of_one_instance_only_the_newest_state_waits() -> None:
    queue = EventQueue()
    for run_state in (RunState.RUNNING, RunState.PAUSED, RunState.SHUTDOWN):
        queue.put(seen(identity(), run_state))
    queue.put(seen(identity(11), RunState.RUNNING))
    assert await queue.get() == seen(identity(), RunState.SHUTDOWN)
    assert await queue.get() == seen(identity(11), RunState.RUNNING)


async def test_an_end_is_not_merged_with_a_state() -> None:
    queue = EventQueue()
    queue.put(seen(identity(), RunState.RUNNING))
    queue.put(Ended(ended(identity())))
    assert isinstance(await queue.get(), Seen)
    assert await queue.get() == Ended(ended(identity()))


async def test_ends_that_nobody_reads_are_bounded() -> None:
    queue = EventQueue()
    for pid in range(MAX_REMEMBERED + 5):
        queue.put(Ended(ended(identity(pid))))
    assert await queue.get() == Ended(ended(identity(5)))


async def test_a_new_consumer_first_gets_what_is_there(processes: Processes) -> None:
    table = InstanceTable()
    watched = table.adopt(processes.make(identity()))
    watched.learn(FACTS, asked_at=0)
    events = table.events()
    assert await anext(events) == Seen(watched.instance())


async def test_an_unchanged_instance_is_not_reported_again(processes: Processes) -> None:
    table = InstanceTable()
    events = table.events()
    watched = table.adopt(processes.make(identity()))
    table.changed(watched)
    table.changed(watched)
    assert isinstance(await anext(events), Seen)
    table.conclude(watched, ended(identity()))
    assert await anext(events) == Ended(ended(identity()))


def test_a_process_is_watched_once_and_the_second_pidfd_is_given_back(processes: Processes) -> None:
    table = InstanceTable()
    first, second = processes.make(identity()), processes.make(identity())
    assert table.adopt(first) is table.adopt(second)
    assert processes.holds(first)
    assert not processes.holds(second)
    assert not first.ended()


def test_how_an_instance_ended_is_remembered(processes: Processes) -> None:
    table = InstanceTable()
    table.conclude(table.adopt(processes.make(identity())), ended(identity()))
    assert table.ended(identity()) == ended(identity())
    assert table.all() == ()


def test_without_an_answering_monitor_the_state_is_unknown_and_the_name_is_kept(processes: Processes) -> None:
    watched = Watched(processes.make(identity(), name="by-command-line"))
    assert watched.instance().name == "by-command-line"
    watched.learn(FACTS, asked_at=0)
    instance = watched.instance()
    assert (instance.run_state, instance.migration) == (RunState.UNKNOWN, Migration.UNKNOWN)
    assert instance.name == "vm1"
    assert not instance.resettable
    assert not watched.departed


@pytest.mark.parametrize("status", ["setup", "active", "completed"])
def test_a_migration_event_makes_a_departure_without_any_query(processes: Processes, status: str) -> None:
    watched = Watched(processes.make(identity()))
    watched.learn(FACTS, asked_at=0)
    watched.hear("MIGRATION", {"status": status})
    assert watched.departed


def test_a_failed_migration_is_no_departure_once_it_is_asked(processes: Processes) -> None:
    watched = Watched(processes.make(identity()))
    watched.learn(FACTS, asked_at=0)
    watched.hear("MIGRATION", {"status": "active"})
    watched.hear("MIGRATION", {"status": "failed"})
    assert watched.departed
    watched.learn_state(RunState.RUNNING, Migration.NONE, asked_at=2)
    assert not watched.departed


def test_an_answer_that_was_asked_for_before_an_event_does_not_undo_it(processes: Processes) -> None:
    watched = Watched(processes.make(identity()))
    watched.learn(FACTS, asked_at=0)
    watched.hear("MIGRATION", {"status": "completed"})
    watched.learn_state(RunState.RUNNING, Migration.NONE, asked_at=0)
    assert watched.departed


def test_a_shutdown_that_was_followed_by_a_reset_is_no_leaving(processes: Processes) -> None:
    watched = Watched(processes.make(identity()))
    watched.hear("SHUTDOWN", {})
    assert watched.shutdown_seen
    watched.hear("RESUME", {})
    assert not watched.shutdown_seen


def test_one_uuid_with_two_names_is_a_conflict_unless_a_migration_joins_them(processes: Processes) -> None:
    table = InstanceTable()
    first = table.adopt(processes.make(identity(10), name="a"))
    table.adopt(processes.make(identity(11), name="b"))
    (conflict,) = table.conflicts()
    assert "'a', 'b'" in conflict
    first.learn(replace(FACTS, name="a", migration=Migration.OUTGOING), asked_at=0)
    assert table.conflicts() == ()


def test_two_vms_with_two_names_are_no_conflict(processes: Processes) -> None:
    table = InstanceTable()
    table.adopt(processes.make(identity(10), name="a"))
    other = VmUuid("11111111-2222-4333-8444-555555555555")
    table.adopt(processes.make(identity(11, other), name="b"))
    assert table.conflicts() == ()
