# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `doctor` judges: plain frozen facts about the machine and about what the daemon knows. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SocketPurpose = Literal["monitor", "port"]
DirectoryPurpose = Literal["state", "run"]


@dataclass(frozen=True, slots=True)
class Program:
    """A process, as people look for it."""

    pid: int
    command: str  # untrusted text; "" when it cannot be read

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command or 'unknown program'})"


@dataclass(frozen=True, slots=True)
class SocketFact:
    """A unix socket that the daemon needs: a monitor, or a port's chardev."""

    path: str
    purpose: SocketPurpose
    problem: str = ""  # why it cannot be used; "" when it is there
    mode: int = 0o600  # permission bits
    uid: int = 0  # of its owner
    listeners: tuple[Program, ...] = ()
    clients: tuple[Program, ...] = ()  # others than the daemon whose connections are being served
    told: bool = True  # whether the kernel says who listens and who is connected


@dataclass(frozen=True, slots=True)
class DirectoryFact:
    """A directory of the daemon."""

    path: str
    purpose: DirectoryPurpose
    problem: str = ""  # why it cannot be used; "" when it can
    free_bytes: int | None = None  # for the daemon's user; None: not told
    free_files: int | None = None  # inodes; None: the file system does not count them


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What the machine tells, whether the daemon runs or not."""

    config: tuple[str, ...] = ()  # problems of the files, one line each
    directories: tuple[DirectoryFact, ...] = ()
    sockets: tuple[SocketFact, ...] = ()
    first_pid_namespace: bool | None = True  # the processes of the whole host are seen; None: not told
    root: bool = True
    journal_holder: Program | None = None  # who has the journal open; None: nobody, or not told
    late: bool = False  # time was over before everything was looked at


@dataclass(frozen=True, slots=True)
class VmFact:
    """A VM that the daemon knows."""

    name: str  # name, or UUID where none was told; untrusted text
    pids: tuple[int, ...] = ()  # of the processes that were seen; empty: none is left here
    mute: bool = False  # a process of it is there, and no monitor answers
    has_port: bool = True  # a port that is served
    libvirt: bool = False  # libvirt runs it
    grouped: bool = True  # some group holds it
    departed: str = ""  # why it may live elsewhere
    unsettled: tuple[str, ...] = ()  # our kills whose last writes are unproven, where that refuses an off
    lost: tuple[str, ...] = ()  # processes known from the records only whose end is not proven
    qemu: tuple[str, ...] = ()  # versions of its QEMUs, "" where not told


@dataclass(frozen=True, slots=True)
class PortFact:
    """A port that is served."""

    vm: str  # untrusted text
    port: str
    path: str  # of its chardev's socket
    guest_open: bool
    connected: bool  # the guest has greeted
    grouped: bool = True  # some group holds its VM
    software: str = ""  # what the guest's hub says that it is; untrusted text
    problem: str = ""  # why it is not connected, as far as known
    reconnects: bool = True  # False: its QEMU connects to us, once


@dataclass(frozen=True, slots=True)
class UnheardFact:
    """A port to which the VM's QEMU connects, or will, where the daemon cannot listen."""

    vm: str  # untrusted text
    port: str  # untrusted text
    path: str  # untrusted text
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class PolicyFact:
    """The policy against what is known of VMs."""

    allows_nobody: bool = False
    standalone: bool = True  # or a bus with other hosts
    unknown_members: tuple[tuple[str, str], ...] = ()  # (group, name) that no VM bears
    doubtful_members: tuple[tuple[str, str], ...] = ()  # (group, name) that several VMs bear
    unknown_aliases: tuple[tuple[str, str], ...] = ()  # (alias, name) that no VM bears
    refused_names: tuple[tuple[str, str, str], ...] = ()  # (VM, node name, who holds it) that were refused


@dataclass(frozen=True, slots=True)
class LibvirtFact:
    """A libvirt that is configured."""

    uri: str
    problem: str = ""  # why it is not used; "" while it answers; untrusted text
    since: float = 0.0  # of the problem: wall clock, seconds
    autostart: tuple[str, ...] = ()  # VMs of groups that it starts by itself; untrusted text


@dataclass(frozen=True, slots=True)
class JournalFact:
    """The journal and the clocks that it is written by."""

    problem: str = ""  # why it cannot be used; "" while it can
    verified: bool | None = True  # None: the walk did not end in time
    bad: str = ""  # what the walk found
    newest_at: float | None = None  # wall clock of the newest record that was read, seconds
    newest_boottime: float | None = None  # CLOCK_BOOTTIME of it, if it is of this boot
    now: float = 0.0  # wall clock, seconds
    boottime: float = 0.0


@dataclass(frozen=True, slots=True)
class DaemonFacts:
    """What the daemon knows."""

    version: str
    state: str = "ready"
    vms: tuple[VmFact, ...] = ()
    ports: tuple[PortFact, ...] = ()
    unheard: tuple[UnheardFact, ...] = ()
    conflicts: tuple[str, ...] = ()  # sentences
    libvirts: tuple[LibvirtFact, ...] = ()
    policy: PolicyFact = field(default_factory=PolicyFact)
    journal: JournalFact = field(default_factory=JournalFact)
