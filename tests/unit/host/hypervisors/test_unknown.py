# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which VMs an unidentified process may be an instance of (decision 0008)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.host.hypervisors.test_instances import FACTS, UUID, Processes, identity, processes
from vmchannel_host.fencing.evidence import silent_reasons
from vmchannel_host.hypervisors.instances import Watched
from vmchannel_host.hypervisors.process import Candidate, Unidentified
from vmchannel_host.hypervisors.unknown import MAX_FOLLOWED, UnknownProcesses
from vmchannel_host.model import HostName, Look, Migration, Port, PortName, UnknownProcess, VmUuid

OTHER = VmUuid("11111111-2222-4333-8444-555555555555")
HUNG = Candidate(99, 1000, "/usr/bin/qemu-system-x86_64")
NOWHERE: frozenset[str] = frozenset()
MONITOR = frozenset({"/run/vm1.qmp"})

__all__ = ["processes"]


def problem() -> Unidentified:
    return Unidentified("pid 99 hangs", pid=99, anyones=True)


def not_of(known: UnknownProcesses, listens: frozenset[str] | None = NOWHERE) -> frozenset[VmUuid]:
    (judged,) = known.judge({HUNG: problem()}, {HUNG: listens})
    return judged.not_of


@pytest.fixture
def vm(processes: Processes) -> Watched:
    watched = Watched(processes.make(identity()))
    watched.learn(FACTS, asked_at=0)
    return watched


def test_it_may_be_any_vm_at_first() -> None:
    known = UnknownProcesses()
    known.learn([HUNG], {})
    assert not_of(known) == frozenset()


def test_it_is_no_instance_of_a_vm_whose_own_instance_lived_beside_it(vm: Watched) -> None:
    known = UnknownProcesses()
    known.learn([HUNG], {vm: MONITOR})
    assert not_of(known) == {UUID}
    known.learn([HUNG], {})  # it was fenced
    assert not_of(known) == {UUID}


def test_it_may_be_a_new_start_of_a_vm_that_had_ended_before_it(vm: Watched) -> None:
    known = UnknownProcesses()
    known.learn([], {vm: MONITOR})
    known.learn([HUNG], {})
    assert not_of(known) == frozenset()


def test_one_that_serves_a_socket_of_the_vm_may_be_it_though_it_lived_beside_it(vm: Watched) -> None:
    known = UnknownProcesses()
    known.learn([HUNG], {vm: MONITOR})
    assert not_of(known, MONITOR) == frozenset()
    known.learn([HUNG], {vm: frozenset({"/run/vm1.port"})})
    assert not_of(known, MONITOR) == frozenset()  # a socket that it used earlier counts too


def test_var_run_is_run(vm: Watched) -> None:
    known = UnknownProcesses()
    known.learn([HUNG], {vm: MONITOR})
    assert not_of(known, frozenset({"/var/run/vm1.qmp"})) == frozenset()


def test_where_its_sockets_are_unknown_nothing_is_excluded(vm: Watched) -> None:
    known = UnknownProcesses()
    known.learn([HUNG], {vm: MONITOR})
    assert not_of(known, None) == frozenset()


def test_s1_an_instance_whose_monitor_never_answered_may_be_migrating_to_it(
    vm: Watched, processes: Processes
) -> None:
    known, mute = UnknownProcesses(), Watched(processes.make(identity()))
    known.learn([HUNG], {mute: MONITOR})
    assert not_of(known) == frozenset()
    known.learn([HUNG], {vm: MONITOR})
    assert not_of(known) == {UUID}
    known.learn([HUNG], {mute: MONITOR})  # a later start of the VM
    assert not_of(known) == frozenset()


@pytest.mark.parametrize("migration", [Migration.OUTGOING, Migration.INCOMING, Migration.COMPLETED])
def test_it_may_be_the_other_end_of_a_migration(vm: Watched, migration: Migration) -> None:
    known = UnknownProcesses()
    known.learn([HUNG], {vm: MONITOR})
    vm.learn(replace(FACTS, migration=migration), asked_at=0)
    known.learn([HUNG], {vm: MONITOR})
    assert not_of(known) == frozenset()


def test_an_instance_that_the_configuration_does_not_lead_to_excludes_nothing(processes: Processes) -> None:
    """Anybody on the host can run a QEMU with the VM's UUID."""
    known = UnknownProcesses()
    known.learn([HUNG], {Watched(processes.make(identity()), configured=False): NOWHERE})
    assert not_of(known) == frozenset()


def test_another_process_of_the_same_pid_inherits_nothing(vm: Watched) -> None:
    known = UnknownProcesses()
    known.learn([HUNG], {vm: MONITOR})
    for other in (replace(HUNG, start_time=1001), replace(HUNG, executable="/usr/libexec/qemu-kvm")):
        known.learn([HUNG, other], {})
        (judged,) = known.judge({other: problem()}, {other: NOWHERE})
        assert judged.not_of == frozenset()


def test_what_is_remembered_is_bounded_and_the_rest_may_be_any_vm(vm: Watched) -> None:
    known = UnknownProcesses()
    many = [replace(HUNG, pid=pid) for pid in range(MAX_FOLLOWED + 1)]
    known.learn(many, {vm: MONITOR})
    judged = known.judge(dict.fromkeys(many, problem()), dict.fromkeys(many, NOWHERE))
    assert sum(one.not_of == {UUID} for one in judged) == MAX_FOLLOWED


def test_the_sockets_of_an_instance_are_those_of_its_command_line_and_its_ports(processes: Processes) -> None:
    watched = Watched(processes.make(identity()))
    watched.process.command = replace(watched.process.command, sockets=("vm1.qmp", "/run/x/../vm1.log"))
    port = Port(PortName("org.vmchannel.0"), "/run/vm1.port", guest_open=False)
    watched.learn(replace(FACTS, ports=(port,)), asked_at=0)
    assert watched.sockets(lambda _pid: "/srv") == {"/srv/vm1.qmp", "/run/vm1.log", "/run/vm1.port"}


def test_a_look_is_silent_about_every_vm_but_those_that_it_is_not() -> None:
    look = Look(HostName("hv1"), 1.0, (), unknown=(UnknownProcess("pid 99 hangs", frozenset({OTHER})),))
    assert silent_reasons(look, UUID) == ["pid 99 hangs"]
    assert silent_reasons(look, OTHER) == []
