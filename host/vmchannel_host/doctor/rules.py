# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is wrong and what to do about it. Pure: facts in, findings out, the worst first."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from vmchannel_host.admin.view import Finding
from vmchannel_host.doctor.facts import (
    DaemonFacts,
    DirectoryFact,
    JournalFact,
    LibvirtFact,
    MachineFacts,
    PolicyFact,
    PortFact,
    SocketFact,
    VmFact,
)

ERROR: Final = "error"  # something cannot be fenced, or its guest cannot fence
WARNING: Final = "warning"  # it will be so, or somebody should look
NOTE: Final = "note"  # good to know; nothing is wrong

LEVELS: Final = (ERROR, WARNING, NOTE)

DISK_ERROR: Final = 16 << 20
DISK_WARNING: Final = 256 << 20
"""Free bytes of the journal's file system below which a fence is about to be refused, or will be one day."""

FEW_FILES: Final = 100
CLOCK_SLACK_S: Final = 2.0
OLDEST_QEMU: Final = (7, 2)
"""What the hypervisor shell was written for and is tested with."""

_NAMED: Final = 5  # VMs that one line names


def judge(machine: MachineFacts, daemon: DaemonFacts | None) -> tuple[Finding, ...]:
    """All findings, the worst first; `daemon` is None when it does not run."""
    found = list(_machine(machine, daemon))
    if daemon is not None:
        found += _daemon(daemon, {one.path for one in machine.sockets if one.clients})
    return tuple(sorted(found, key=lambda one: LEVELS.index(one.level)))


def is_wrong(findings: Iterable[Finding]) -> bool:
    """Whether anything is wrong: notes do not count."""
    return any(one.level != NOTE for one in findings)


# the machine


def _machine(facts: MachineFacts, daemon: DaemonFacts | None) -> Iterator[Finding]:
    for problem in facts.config:
        remedy = "mend it, then `vmchanneld --check-config`; the daemon goes on with what it read before"
        yield Finding(ERROR if daemon is None else WARNING, "configuration", problem, remedy)
    for directory in facts.directories:
        yield from _directory(directory)
    pids = {pid: vm.name for vm in (daemon.vms if daemon else ()) for pid in vm.pids}
    for one in facts.sockets:
        yield from _socket(one, pids)
    if daemon is None and facts.journal_holder is not None:
        text = f"{facts.journal_holder} has the journal open, and does not answer on the admin socket"
        yield Finding(ERROR, "daemon", text, "see its log; if it hangs, end it: systemctl restart vmchanneld")
    if facts.first_pid_namespace is False:
        yield Finding(
            WARNING,
            "processes",
            "this runs in a pid namespace of its own: a QEMU outside it is not seen, and looks ended",
            "run vmchanneld in the host's pid namespace",
        )
    if not facts.root:
        remedy = "run vmchanneld as root; `vmchannelctl doctor` sees more as root too"
        yield Finding(WARNING, "processes", "not root: other users' processes cannot be identified", remedy)
    if facts.late:
        yield Finding(NOTE, "doctor", "time was over before every socket and process was looked at")


def _directory(one: DirectoryFact) -> Iterator[Finding]:
    subject = f"{one.purpose} directory"
    if one.problem:
        remedy = f"make {one.path} a directory of root with mode 0700 (state) or 0755 (run)"
        yield Finding(ERROR, subject, f"{one.path}: {one.problem}", remedy)
    if one.purpose != "state" or one.free_bytes is None:
        return
    room = f"{one.path}: {one.free_bytes >> 20} MiB are free"
    remedy = "make room on its file system, or shorten `journal.keep`"
    if one.free_bytes < DISK_ERROR:
        yield Finding(ERROR, "disk", f"{room}: the journal is about to refuse, and fences with it", remedy)
    elif one.free_bytes < DISK_WARNING:
        yield Finding(WARNING, "disk", f"{room}: a full disk refuses fences", remedy)
    if one.free_files is not None and one.free_files < FEW_FILES:
        yield Finding(WARNING, "disk", f"{one.path}: {one.free_files} inodes are free", remedy)


def _socket(one: SocketFact, vms: dict[int, str]) -> Iterator[Finding]:
    owner = next((vms[program.pid] for program in one.listeners if program.pid in vms), "")
    subject = f"VM {owner}" if owner else one.purpose
    what = "its monitor" if one.purpose == "monitor" else "its port"
    if one.problem:
        remedy = (
            "the daemon must be able to connect to it: see `sockets` in host.yaml and QEMU's command line"
        )
        yield Finding(ERROR, subject, f"{one.path}: {one.problem}", remedy)
        return
    for client in one.clients:
        held = f"{what} {one.path} is held by {client}: QEMU serves one client, the daemon is not heard"
        remedy = (
            "end it, or give it a monitor of its own (a second -qmp): without ours an off can only kill"
            if one.purpose == "monitor"
            else "end it: without the port its guest cannot ask for a fence"
        )
        yield Finding(ERROR, subject, held, remedy)
    if one.mode & 0o002:
        text = f"{one.path} may be used by every user of this host (mode {one.mode:04o}, owner {one.uid})"
        danger = (
            "a monitor gives full power over the VM"
            if one.purpose == "monitor"
            else "who holds it, is the host"
        )
        yield Finding(WARNING, subject, text, f"chmod o-w, and put it in a directory of root: {danger}")
    if one.told and not one.listeners:
        text = f"{one.path}: nobody listens on it: it is left over from a QEMU that has ended"
        yield Finding(NOTE, subject, text, "remove it")


# the daemon


def _daemon(facts: DaemonFacts, held: set[str]) -> Iterator[Finding]:
    if facts.state != "ready":
        yield Finding(WARNING, "daemon", f"it is {facts.state}", "wait, or see its log")
    yield from _journal(facts.journal)
    yield from _policy(facts.policy)
    for text in facts.conflicts:
        yield Finding(ERROR, "identity", text, "give each VM its own UUID and name")
    for libvirt in facts.libvirts:
        yield from _libvirt(libvirt)
    for vm in facts.vms:
        yield from _vm(vm)
    unheard = {(one.vm, one.port) for one in facts.unheard}
    for one in dict.fromkeys(facts.unheard):  # of what runs and of its definition, the same
        text = f"{one.port}: its QEMU connects to {one.path}, where the daemon cannot listen: {one.reason}"
        yield Finding(ERROR, f"VM {one.vm}", text, one.remedy or "see the daemon's log")
    for port in facts.ports:
        if port.path not in held and (port.vm, port.port) not in unheard:
            yield from _port(port)
        if not port.reconnects:
            yield from _once(port)
    yield from _versions(facts)
    alone = [vm.name for vm in facts.vms if vm.pids and not vm.grouped]
    if alone and not facts.policy.allows_nobody:
        text = (
            f"{len(alone)} VMs are in no group and can neither fence nor be fenced by guests: {_some(alone)}"
        )
        yield Finding(NOTE, "policy", text, "`vmchannelctl setup` proposes groups")


def not_reached(one: LibvirtFact) -> str:
    """Says in one line that a libvirt is not reached, why and since when."""
    try:
        since = time.strftime(" since %Y-%m-%d %H:%M:%S UTC", time.gmtime(one.since))
    except (OverflowError, ValueError, OSError):  # no clock of this world
        since = ""
    why = " ".join(one.problem.split())[:300]
    return f"libvirt ({one.uri}) is not reached{since}: {why}"


def _libvirt(one: LibvirtFact) -> Iterator[Finding]:
    if one.problem:
        text = f"{not_reached(one)}; its VMs can be ended, not started, and their ports are not known"
        yield Finding(ERROR, "libvirt", text, _reach(one))
    if one.autostart:
        text = (
            f"autostart: libvirt ({one.uri}) may start these by itself when it starts, at boot at the "
            f"latest, also after an off: {_some(one.autostart)}"
        )
        yield Finding(WARNING, "libvirt", text, "virsh autostart --disable VM, unless that is wanted")


def _reach(one: LibvirtFact) -> str:
    """What to do, by libvirt's English words; the last one fits whatever it says."""
    problem = one.problem.lower()
    if "module is missing" in problem:
        return "install python3-libvirt, then restart vmchanneld"
    if any(word in problem for word in ("permission denied", "access denied", "authentication")):
        return "run vmchanneld as root (qemu:///session: as that user), or permit it in libvirtd.conf"
    if any(word in problem for word in ("connection refused", "no such file")):
        return "start it (systemctl start libvirtd, or virtqemud); see `uri` in host.yaml"
    return f"see whether `virsh -c {shlex.quote(one.uri)} list` answers; if it hangs, restart libvirtd"


def _journal(one: JournalFact) -> Iterator[Finding]:
    if one.problem:
        text, remedy = f"{one.problem}; every fence is refused", "mend what it names, then restart vmchanneld"
        yield Finding(ERROR, "journal", text, remedy)
    if one.verified is False:
        remedy = "see vmchanneld(8), THE JOURNAL; restore a backup, and find out who changed it"
        yield Finding(ERROR, "journal", f"it is not as it was written: {one.bad}", remedy)
    elif one.verified is None and not one.problem:
        yield Finding(NOTE, "journal", "it is too long to be verified here", "`vmchannelctl verify-journal`")
    if one.newest_at is not None and one.now < one.newest_at - CLOCK_SLACK_S:
        behind = one.newest_at - one.now
        text = f"the wall clock is {behind:.0f} s behind the newest record of the journal: it was set back"
        yield Finding(WARNING, "clock", text, "set it right, and run a time service")
    if one.newest_boottime is not None and one.boottime < one.newest_boottime - CLOCK_SLACK_S:
        text = "the clock since boot is behind a record of this same boot: this host was put back in time"
        yield Finding(ERROR, "clock", text, "a restored host must be booted: no deadline of before holds")


def _policy(one: PolicyFact) -> Iterator[Finding]:
    if one.allows_nobody:
        remedy = "`vmchannelctl setup` proposes groups; man vmchannel-host.yaml"
        yield Finding(ERROR, "policy", "it allows nobody to fence: every fence of a guest is refused", remedy)
    if not one.standalone:
        text = (
            "`cluster.standalone` is false: an end that nobody watched counts as a departure to another host"
        )
        remedy = "set it to true if no other host can run these VMs"
        yield Finding(WARNING, "cluster", text, remedy)
    for group, name in one.unknown_members:
        text = f"group {group!r}: no VM called {name!r} was ever seen"
        yield Finding(WARNING, "policy", text, "check the spelling, or start the VM once")
    for group, name in one.doubtful_members:
        text = f"group {group!r}: several VMs are called {name!r}, so the entry gives nobody a right"
        yield Finding(ERROR, "policy", text, "write the VM's UUID in the group")
    for alias, name in one.unknown_aliases:
        text = f"alias {alias!r}: no VM called {name!r} was ever seen, so that plug fails"
        yield Finding(WARNING, "policy", text, "check the spelling, or write the VM's UUID")
    for vm, name, holder in one.refused_names:
        text = (
            f"its node says that it is called {name!r}, which {holder or 'another VM'} holds: the name fails"
        )
        remedy = "rename the node, or pin the name in `aliases` of host.yaml"
        yield Finding(ERROR, f"VM {vm}", text, remedy)


def _vm(vm: VmFact) -> Iterator[Finding]:
    subject = f"VM {vm.name}"
    for text in vm.lost:
        remedy = "`vmchannelctl fence off` ends it; if that fails, see why in its evidence"
        yield Finding(ERROR, subject, f"{text} is not proven to have ended", remedy)
    if not vm.pids and vm.departed:
        remedy = "fence it where it runs; if it is surely off: `vmchannelctl confirm-off`"
        yield Finding(ERROR, subject, f"it cannot be called off: {vm.departed}", remedy)
    for text in () if vm.pids else vm.unsettled:
        remedy = "start it again, or see that its storage has no writer left and `vmchannelctl confirm-off`"
        yield Finding(
            ERROR, subject, f"it cannot be called off: its last writes are unproven: {text}", remedy
        )
    if vm.pids and vm.mute:
        remedy = "see whether QEMU hangs; without the monitor an off can only kill, and its ports are unknown"
        yield Finding(WARNING, subject, f"no monitor of pid {_some(map(str, vm.pids))} answers", remedy)
    elif vm.pids and not vm.has_port:
        level = WARNING if vm.grouped else NOTE
        for_good = (
            " and writes it into its definition (docs/operations.md, VMs that libvirt runs)"
            if vm.libvirt
            else "; for good: a virtserialport named org.vmchannel.0 (docs/operations.md, What a VM needs)"
        )
        remedy = f"`vmchannelctl attach {shlex.quote(vm.name)}` plugs one in{for_good}"
        yield Finding(
            level, subject, "it has no port that is served: its guest cannot ask for a fence", remedy
        )
    for version in vm.qemu:
        if _older(version):
            text = f"its QEMU is {version}, older than {'.'.join(map(str, OLDEST_QEMU))}"
            yield Finding(WARNING, subject, text, "not tested: upgrade QEMU")


def _port(one: PortFact) -> Iterator[Finding]:
    if one.connected or not one.grouped:
        return
    subject, why = f"VM {one.vm}", f": {one.problem}" if one.problem else ""
    if one.guest_open:
        text = f"{one.port}: its guest has the port open and does not greet{why}"
        remedy = "in the guest: see which program has the port open (`vmchannel status`)"
        yield Finding(WARNING, subject, text, remedy)
    else:
        text = f"{one.port}: its guest does not have the port open{why}"
        remedy = "in the guest: start vmchannel-guestd (`vmchannel status` tells more)"
        yield Finding(WARNING, subject, text, remedy)


def _once(one: PortFact) -> Iterator[Finding]:
    text = (
        f"{one.port}: its QEMU connects once: after a restart of the daemon the port is lost until the VM "
        "restarts"
    )
    remedy = "add reconnect=1 to its -chardev, or <reconnect enabled='yes' timeout='1'/> to its <source>"
    yield Finding(WARNING if one.grouped else NOTE, f"VM {one.vm}", text, remedy)


def _versions(facts: DaemonFacts) -> Iterator[Finding]:
    ours = _release(facts.version)
    others: dict[str, list[str]] = {}
    for port in facts.ports:
        theirs = _release(port.software)
        if port.connected and theirs and ours and theirs != ours:
            others.setdefault(port.software, []).append(port.vm)
    for software, vms in sorted(others.items()):
        text = f"{_some(vms)}: its guest runs {software}, this host {facts.version}"
        yield Finding(NOTE, "versions", text, "they work together; upgrade the older one when you can")


def _release(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text, re.ASCII)
    return tuple(int(part) for part in found.groups(default="0")) if found else ()


def _older(version: str) -> bool:
    release = _release(version)
    return bool(release) and release[:2] < OLDEST_QEMU


def _some(names: Iterable[str]) -> str:
    all_names: Sequence[str] = list(names)
    more = f" and {len(all_names) - _NAMED} more" if len(all_names) > _NAMED else ""
    return ", ".join(all_names[:_NAMED]) + more
