# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `doctor` says to which facts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmchannel_host.admin.view import Finding
from vmchannel_host.doctor.facts import (
    DaemonFacts,
    DirectoryFact,
    JournalFact,
    LibvirtFact,
    MachineFacts,
    PolicyFact,
    PortFact,
    Program,
    SocketFact,
    UnheardFact,
    VmFact,
)
from vmchannel_host.doctor.rules import DISK_ERROR, DISK_WARNING, LEVELS, is_wrong, judge

QEMU = Program(4711, "qemu-system-x86_64 -name vm1")
OTHER = Program(99, "socat - /run/vms/vm1/qmp.sock")
VM = VmFact("vm1", pids=(4711,))
PORT = PortFact("vm1", "org.vmchannel.0", "/run/vms/vm1/ch.sock", guest_open=True, connected=True)
MONITOR = SocketFact("/run/vms/vm1/qmp.sock", "monitor", listeners=(QEMU,))
STATE = DirectoryFact("/var/lib/vmchannel", "state", free_bytes=1 << 40, free_files=10**6)
MACHINE = MachineFacts(directories=(STATE,), sockets=(MONITOR,))
DAEMON = DaemonFacts("0.1.0", vms=(VM,), ports=(PORT,))


def only(machine: MachineFacts = MACHINE, daemon: DaemonFacts | None = DAEMON) -> Finding:
    """The one finding."""
    [found] = judge(machine, daemon)
    return found


def test_nothing_is_said_of_a_host_where_nothing_is_wrong() -> None:
    assert judge(MACHINE, DAEMON) == ()
    assert judge(MACHINE, None) == ()


@pytest.mark.parametrize(
    ("machine", "level", "words"),
    [
        (MachineFacts(config=("host.yaml:3:1: hots: unknown key",)), "warning", ["host.yaml:3:1: hots"]),
        (MachineFacts(first_pid_namespace=False), "warning", ["pid namespace"]),
        (MachineFacts(root=False), "warning", ["not root"]),
        (MachineFacts(late=True), "note", ["time was over"]),
    ],
)
def test_the_machine(machine: MachineFacts, level: str, words: list[str]) -> None:
    assert_says(only(machine), level, words)


@pytest.mark.parametrize(
    ("one", "level", "words"),
    [
        (
            replace(STATE, problem="No such file or directory"),
            "error",
            ["/var/lib/vmchannel", "No such file"],
        ),
        (replace(STATE, free_bytes=DISK_ERROR - 1), "error", ["15 MiB are free"]),
        (replace(STATE, free_bytes=DISK_WARNING - 1), "warning", ["255 MiB are free"]),
        (replace(STATE, free_files=3), "warning", ["3 inodes"]),
    ],
)
def test_a_directory(one: DirectoryFact, level: str, words: list[str]) -> None:
    assert_says(only(replace(MACHINE, directories=(one,))), level, words)


@pytest.mark.parametrize(
    ("one", "level", "words"),
    [
        (
            replace(MONITOR, problem="not permitted (mode 0600, owner 107)"),
            "error",
            ["qmp.sock", "owner 107"],
        ),
        (replace(MONITOR, clients=(OTHER,)), "error", ["VM vm1", "qmp.sock", "pid 99 (socat"]),
        (replace(MONITOR, mode=0o777), "warning", ["VM vm1", "every user", "0777"]),
        (replace(MONITOR, listeners=()), "note", ["nobody listens"]),
        (replace(MONITOR, purpose="port", clients=(OTHER,)), "error", ["its port", "pid 99 (socat"]),
    ],
)
def test_a_socket(one: SocketFact, level: str, words: list[str]) -> None:
    assert_says(only(replace(MACHINE, sockets=(one,))), level, words)


def test_a_kernel_that_does_not_tell_who_listens_makes_no_finding() -> None:
    untold = replace(MONITOR, listeners=(), told=False)
    assert judge(replace(MACHINE, sockets=(untold,)), DAEMON) == ()


@pytest.mark.parametrize(
    ("one", "level", "words"),
    [
        (replace(VM, lost=("pid 7 (start 1)",)), "error", ["VM vm1", "pid 7", "not proven"]),
        (
            VmFact("vm1", departed="pid 7 had handed the VM over"),
            "error",
            ["handed the VM over", "confirm-off"],
        ),
        (VmFact("vm1", unsettled=("pid 7 gone: I/O unproven",)), "error", ["I/O unproven", "confirm-off"]),
        (replace(VM, mute=True), "warning", ["no monitor of pid 4711"]),
        (replace(VM, has_port=False), "warning", ["no port", "`vmchannelctl attach vm1`"]),
        (replace(VM, name="a b", has_port=False), "warning", ["`vmchannelctl attach 'a b'`"]),
        (
            replace(VM, has_port=False, libvirt=True),
            "warning",
            ["attach vm1` plugs one in and writes it into"],
        ),
        (replace(VM, has_port=False, grouped=True), "warning", ["no port"]),
        (replace(VM, grouped=False), "note", ["in no group", "vm1"]),
        (replace(VM, qemu=("6.2.0",)), "warning", ["6.2.0", "older than 7.2"]),
    ],
)
def test_a_vm(one: VmFact, level: str, words: list[str]) -> None:
    assert_says(only(daemon=replace(DAEMON, vms=(one,))), level, words)


@pytest.mark.parametrize("version", ["7.2.0", "7.2", "8.1.3", "10.0.0", "", "weird"])
def test_a_qemu_that_is_new_enough_or_tells_no_version_makes_no_finding(version: str) -> None:
    assert judge(MACHINE, replace(DAEMON, vms=(replace(VM, qemu=(version,)),))) == ()


def test_a_vm_that_left_and_is_here_again_makes_no_finding() -> None:
    assert judge(MACHINE, replace(DAEMON, vms=(replace(VM, departed="it left once"),))) == ()


@pytest.mark.parametrize(
    ("one", "level", "words"),
    [
        (replace(PORT, connected=False, problem="no greeting"), "warning", ["does not greet", "no greeting"]),
        (replace(PORT, connected=False, guest_open=False), "warning", ["start vmchannel-guestd"]),
        (replace(PORT, reconnects=False), "warning", ["org.vmchannel.0", "connects once", "reconnect=1"]),
        (replace(PORT, reconnects=False, grouped=False), "note", ["connects once"]),
        (replace(PORT, software="vmchannel-guestd 0.2.0"), "note", ["vmchannel-guestd 0.2.0", "0.1.0"]),
    ],
)
def test_a_port(one: PortFact, level: str, words: list[str]) -> None:
    assert_says(only(daemon=replace(DAEMON, ports=(one,))), level, words)


def test_a_port_without_a_guest_matters_only_where_a_group_holds_its_vm() -> None:
    quiet = replace(PORT, connected=False, guest_open=False, grouped=False)
    assert judge(MACHINE, replace(DAEMON, ports=(quiet,))) == ()


def test_a_port_that_somebody_holds_is_told_once() -> None:
    held = SocketFact(PORT.path, "port", listeners=(QEMU,), clients=(OTHER,))
    found = only(replace(MACHINE, sockets=(held,)), replace(DAEMON, ports=(replace(PORT, connected=False),)))
    assert_says(found, "error", ["pid 99"])


def test_a_port_whose_socket_cannot_be_had_is_told_once() -> None:
    one = UnheardFact("vm1", PORT.port, "/run/p.sock", "there is no directory /run", "make it")
    facts = replace(DAEMON, ports=(replace(PORT, connected=False),), unheard=(one, one))
    assert_says(only(daemon=facts), "error", ["VM vm1", PORT.port, "/run/p.sock", "no directory", "make it"])


@pytest.mark.parametrize(
    ("one", "level", "words"),
    [
        (PolicyFact(allows_nobody=True), "error", ["nobody", "setup"]),
        (PolicyFact(standalone=False), "warning", ["cluster.standalone"]),
        (PolicyFact(unknown_members=(("web", "vm9"),)), "warning", ["'web'", "'vm9'"]),
        (PolicyFact(doubtful_members=(("web", "vm1"),)), "error", ["'web'", "'vm1'", "UUID"]),
        (PolicyFact(unknown_aliases=(("node9", "vm9"),)), "warning", ["'node9'", "'vm9'"]),
        (
            PolicyFact(refused_names=(("vm2", "node1", "vm1"),)),
            "error",
            ["VM vm2", "'node1'", "vm1", "aliases"],
        ),
    ],
)
def test_the_policy(one: PolicyFact, level: str, words: list[str]) -> None:
    assert_says(only(daemon=replace(DAEMON, policy=one)), level, words)


@pytest.mark.parametrize(
    ("one", "level", "words"),
    [
        (JournalFact("disk is full", None), "error", ["disk is full", "refused"]),
        (JournalFact(verified=False, bad="record 7: wrong hash"), "error", ["record 7: wrong hash"]),
        (JournalFact(verified=None), "note", ["verify-journal"]),
        (JournalFact(newest_at=100.0, now=40.0), "warning", ["60 s behind"]),
        (JournalFact(newest_boottime=100.0, boottime=40.0), "error", ["put back in time"]),
    ],
)
def test_the_journal_and_the_clocks(one: JournalFact, level: str, words: list[str]) -> None:
    assert_says(only(daemon=replace(DAEMON, journal=one)), level, words)


def test_doubts_about_identity_and_a_daemon_that_is_not_ready() -> None:
    assert_says(only(daemon=replace(DAEMON, conflicts=("two VMs ...",))), "error", ["two VMs ..."])
    assert_says(only(daemon=replace(DAEMON, state="stopping")), "warning", ["stopping"])


def test_without_a_daemon_a_wrong_file_is_an_error_and_a_held_journal_is_told() -> None:
    assert_says(only(MachineFacts(config=("host.yaml: wrong",)), None), "error", ["host.yaml: wrong"])
    held = MachineFacts(journal_holder=Program(5, "vmchanneld"))
    assert_says(only(held, None), "error", ["pid 5 (vmchanneld)", "journal"])
    assert judge(held, DAEMON) == ()


@settings(max_examples=40, deadline=None)
@given(st.from_type(MachineFacts), st.none() | st.from_type(DaemonFacts))
def test_whatever_the_facts_the_worst_stands_first_and_what_is_wrong_has_a_remedy(
    machine: MachineFacts, daemon: DaemonFacts | None
) -> None:
    found = judge(machine, daemon)
    order = [LEVELS.index(one.level) for one in found]
    assert order == sorted(order)
    assert all(one.subject and (one.remedy or one.level == "note") for one in found)
    assert is_wrong(found) == any(one.level in ("error", "warning") for one in found)


def assert_says(found: Finding, level: str, words: list[str]) -> None:
    """The finding has that level and these words somewhere."""
    text = " ".join((found.subject, found.text, found.remedy))
    assert (found.level, [word for word in words if word not in text]) == (level, []), found


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        ("Failed to connect socket to '/run/libvirt/libvirt-sock': Connection refused", "start it"),
        ("Failed to connect socket to '/run/libvirt/libvirt-sock': No such file or directory", "start it"),
        ("Failed to connect socket to '/run/libvirt/libvirt-sock': Permission denied", "as root"),
        ("libvirt's Python module is missing: No module named 'libvirt'", "python3-libvirt"),
        ("list has not returned in time", "virsh -c qemu:///system list"),
    ],
)
def test_a_libvirt_that_is_not_reached(problem: str, remedy: str) -> None:
    fact = LibvirtFact("qemu:///system", problem + "\n", since=86400.0)
    found = only(daemon=replace(DAEMON, libvirts=(fact,)))
    assert_says(found, "error", ["qemu:///system", problem, "1970-01-02 00:00:00 UTC"])
    assert remedy in found.remedy
    assert "\n" not in found.text


def test_a_libvirt_that_answers_is_no_finding() -> None:
    assert judge(MACHINE, replace(DAEMON, libvirts=(LibvirtFact("qemu:///system"),))) == ()


def test_what_libvirt_starts_by_itself() -> None:
    fact = LibvirtFact("qemu:///system", autostart=("vm1",))
    found = only(daemon=replace(DAEMON, libvirts=(fact,)))
    assert_says(found, "warning", ["autostart", "after an off", "vm1"])
