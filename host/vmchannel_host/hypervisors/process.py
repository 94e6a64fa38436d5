# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU processes of this host: found in /proc, identified while a pidfd is open, ended through it (S1, S9).

The order is what makes an identity: pidfd_open first, then executable, command line and start time from
/proc, then the pidfd still silent. Until a process has ended, its pid cannot belong to another, so what was
read in between is this process's.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import fnmatch
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.cmdline import CommandLine, parse_command_line
from vmchannel_host.hypervisors.proc_stat import COMMAND_LENGTH, STAT_BYTES, Stat, parse_stat
from vmchannel_host.model import NO_NAMESPACE, BootId, EndProof, PidNamespace, ProcessIdentity, VmUuid

EXECUTABLES = ("qemu-system-*", "qemu-kvm", "kvm")
"""Base names of programs that run VMs, as shell patterns."""

_DELETED = " (deleted)"
"""The kernel's suffix when the file was replaced, as an upgrade of the QEMU package does."""

_PIDFD_INFO = struct.Struct("QQ11Ii")
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info)
_PIDFD_INFO_EXIT = 1 << 3

HOST_PID_NAMESPACE = PidNamespace(0xEFFFFFFC)
"""Inode of the namespace that the kernel begins with (PROC_PID_INIT_INO in linux/proc_ns.h)."""

_OUTSIDE = "outside this daemon's pid namespace: run the daemon in the host's"

MAX_SOCKETS_SEEN = 4096
"""Descriptors looked at to find where a process listens; of one with more nothing is known."""

_LISTENING = 1 << 16  # __SO_ACCEPTCON, among the flags of /proc/net/unix

END_S = 0.5
"""How long a process that exits is waited for, in seconds. It takes microseconds; longer when the kernel must
first write what it closes."""

ProcessKey = tuple[int, int]
"""(pid, start time): one process of this boot."""


class ProcessGone(HypervisorError):
    """No such process any more."""


class NotAVm(HypervisorError):
    """The process is not a QEMU that runs a VM."""


class Unidentified(HypervisorError):
    """The process is, or may be, a QEMU, but whose cannot be said.

    Attributes:
        vm_uuids: VMs it may be an instance of, as far as its command line tells.
        pid: of the process; 0 when it is of no use.
        sockets: unix sockets on its command line; None when that cannot be read.
        anyones: its command line could not be read, so it may be an instance of any VM.
    """

    def __init__(
        self,
        reason: str,
        vm_uuids: tuple[VmUuid, ...] = (),
        *,
        pid: int = 0,
        sockets: tuple[str, ...] | None = None,
        anyones: bool = False,
    ) -> None:
        super().__init__(reason)
        self.vm_uuids = vm_uuids
        self.pid = pid
        self.sockets = sockets
        self.anyones = anyones


class _Exiting(Unidentified):
    """It shows no program any more and has not ended: it may still write, and whose it is nobody can say."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"pid {pid} exits: it shows no program any more", pid=pid, anyones=True)


class VerifiedProcess:
    """A QEMU process that was identified while its pidfd was open. Owns the pidfd."""

    def __init__(self, identity: ProcessIdentity, command: CommandLine, pidfd: int) -> None:
        self.identity = identity
        self.command = command
        self._pidfd = pidfd
        self._had_ended = False  # when the pidfd was closed
        self._ended: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def key(self) -> ProcessKey:
        return (self.identity.pid, self.identity.start_time)

    def ended(self) -> bool:
        """Whether the pidfd says that the process, with all its threads, has ended. Does not block.

        A pidfd that was closed says what it said then.
        """
        return self._had_ended if self._pidfd < 0 else _readable(self._pidfd)

    def exit_status(self, proc: Path = Path("/proc")) -> int | None:
        """The wait status of the process that has ended, when the kernel still tells; None when not.

        Before its parent has reaped it /proc shows it, afterwards PIDFD_GET_INFO does (Linux 6.15 and later).
        """
        try:
            fields = (
                (proc / str(self.identity.pid) / "stat")
                .read_text("utf-8", "replace")
                .rpartition(")")[2]
                .split()
            )
            if fields[0] == "Z" and int(fields[19]) == self.identity.start_time:
                return int(fields[49])  # proc(5): field 52, exit_code
        except (OSError, ValueError, IndexError):
            pass
        return _exit_status_of_pidfd(self._pidfd)

    async def wait_ended(self) -> None:
        """Wait until the process has ended. Any number of tasks may wait."""
        if self._ended is None:
            self._ended = asyncio.Event()
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._pidfd, self._on_end, self._loop, self._ended)
        await self._ended.wait()

    def kill(self) -> None:
        """Send SIGKILL through the pidfd: it cannot reach another process. One that has ended is no error.

        Raises:
            HypervisorError: the kernel refuses it (no permission).
        """
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM through the pidfd: QEMU then drains its I/O and leaves, also with `-no-shutdown`.

        Raises:
            HypervisorError: the kernel refuses it (no permission).
        """
        self._signal(signal.SIGTERM)

    def close(self) -> None:
        """Give the pidfd back. Safe to call twice."""
        if self._pidfd < 0:
            return
        if self._loop is not None and self._ended is not None and not self._ended.is_set():
            self._loop.remove_reader(self._pidfd)
        self._had_ended = _readable(self._pidfd)
        if self._had_ended and self._ended is not None:
            self._ended.set()  # its reader is gone: whoever waits would not hear of it any more
        os.close(self._pidfd)
        self._pidfd = -1

    def _signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return
        except OSError as error:
            raise HypervisorError(f"cannot end {self.identity}: {error.strerror}") from error

    def _on_end(self, loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
        # A pidfd stays readable for ever: a reader left in place would spin.
        loop.remove_reader(self._pidfd)
        ended.set()


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A process that may run a VM and has not been identified yet: what is known of it without its memory."""

    pid: int
    start_time: int
    executable: str  # "" when it cannot be read

    @property
    def key(self) -> ProcessKey:
        return (self.pid, self.start_time)


def _no_candidates() -> list[Candidate]:
    return []


def _no_keys() -> set[ProcessKey]:
    return set()


def _no_problems() -> list[Unidentified]:
    return []


@dataclass(slots=True)
class Sieve:
    """One listing of /proc, and what may be a QEMU among those that an earlier listing did not show."""

    pids: frozenset[int]
    candidates: list[Candidate] = field(default_factory=_no_candidates)
    seen: set[ProcessKey] = field(default_factory=_no_keys)  # of those given as known
    unreadable: list[Unidentified] = field(default_factory=_no_problems)
    vanished: bool = False  # one that was listed was gone at its turn


class ProcessTable:
    """The processes of this host, as /proc shows them. All methods block for a short time; no state."""

    def __init__(
        self,
        *,
        boot_id: BootId,
        pid_namespace: PidNamespace,
        proc: Path = Path("/proc"),
        executables: tuple[str, ...] = EXECUTABLES,
        pidfd_open: Callable[[int], int] = os.pidfd_open,
    ) -> None:
        self.boot_id = boot_id
        self.pid_namespace = pid_namespace
        self.proc = proc
        self._executables = executables
        self._pidfd_open = pidfd_open

    def sieve(self, known: frozenset[ProcessKey], earlier: frozenset[int] = frozenset()) -> Sieve:
        """List /proc and sort out what is certainly no QEMU, or known already.

        Only executable and start time are read: unlike the command line, which can block for as long as a
        hung process holds its memory map, they need no lock of the process's memory.

        Args:
            known: processes whose pidfd is held, so they were identified.
            earlier: pids of an earlier listing, not to be looked at again.

        Raises:
            HypervisorError: /proc does not show all processes.
        """
        sieve = Sieve(self._pids())
        if 1 not in sieve.pids:
            raise HypervisorError(f"{self.proc} hides processes (hidepid?): a scan proves nothing")
        for pid in sorted(sieve.pids - earlier):
            self._sieve_one(pid, known, sieve)
        return sieve

    def key_of(self, pid: int) -> ProcessKey:
        """Which process has that pid now. Does not block.

        Raises:
            ProcessGone: none.
            Unidentified: it cannot be read.
        """
        if pid <= 0:  # SO_PEERCRED of a process that has no number here
            raise Unidentified(f"its process is {_OUTSIDE}")
        try:
            return (pid, self._stat(pid).start_time)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise ProcessGone(f"pid {pid} does not exist") from error
        except (OSError, ValueError) as error:
            raise Unidentified(f"pid {pid} cannot be read: {error}", pid=pid, anyones=True) from error

    def may_be_vm(self, pid: int) -> bool:
        """Whether the process is no other program than a QEMU, as far as can be seen. Does not block."""
        try:
            return self._executable_or_denied(pid) is not None
        except (ProcessGone, OSError, ValueError):
            return False

    def user_of(self, pid: int) -> int | None:
        """The user for whom the process opens files; None when that cannot be said. Does not block."""
        try:
            text = (self.proc / str(pid) / "status").read_text("utf-8", "replace")
            words = next(line.split() for line in text.splitlines() if line.startswith("Uid:"))
            return int(words[4])  # proc(5): real, effective, saved set and filesystem UIDs
        except (OSError, ValueError, IndexError, StopIteration):
            return None

    def open(self, pid: int) -> VerifiedProcess:
        """Open a pidfd, then identify the process.

        Raises:
            ProcessGone: it does not exist, or ended meanwhile.
            NotAVm: its executable is another one.
            Unidentified: it is a QEMU without an unambiguous UUID, or cannot be read.
        """
        return self._opened(pid, self._identify, end_s=END_S)

    def reopen(self, identity: ProcessIdentity) -> VerifiedProcess:
        """Open a pidfd, then see that the process is still the one that was identified before.

        Reads nothing that can block: pid, start time and boot make it that process, whose UUID was read then.
        What else its command line says is taken for the worst.

        Raises:
            ProcessGone: it has ended, or never was in this boot.
            HypervisorError: it is another program now, or neither can be said.
        """
        if identity.boot_id != self.boot_id:
            raise ProcessGone(f"{identity} ended with an earlier boot")
        if identity.pid_namespace != self.pid_namespace:
            raise HypervisorError(_elsewhere(identity, self.pid_namespace))
        return self._opened(identity.pid, lambda _pid: self._recognise(identity))

    def _opened(
        self, pid: int, identify: Callable[[int], tuple[ProcessIdentity, CommandLine]], *, end_s: float = 0.0
    ) -> VerifiedProcess:
        try:
            pidfd = self._pidfd_open(pid)
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):  # the last two: a thread's number
                raise ProcessGone(f"pid {pid} does not exist") from error
            raise Unidentified(f"pid {pid}: pidfd_open: {error.strerror}", pid=pid, anyones=True) from error
        try:
            identity, command = identify(pid)
            if _readable(pidfd):
                raise ProcessGone(f"pid {pid} ended while it was identified")
        except BaseException as error:
            ended = _readable(pidfd, wait_s=end_s if isinstance(error, _Exiting) else 0.0)
            os.close(pidfd)
            if ended and isinstance(error, HypervisorError):
                raise ProcessGone(f"pid {pid} has ended") from error
            raise
        return VerifiedProcess(identity, command, pidfd)

    def absence(self, identity: ProcessIdentity) -> EndProof | None:
        """Whether a recorded process is proven not to exist any more; None when it, or its like, exists.

        In another pid namespace than the one it was recorded in its pid says nothing.

        Raises:
            HypervisorError: neither can be said.
        """
        if identity.boot_id != self.boot_id:
            return EndProof.OTHER_BOOT
        if identity.pid_namespace != self.pid_namespace:
            raise HypervisorError(_elsewhere(identity, self.pid_namespace))
        if identity.pid <= 0:
            raise HypervisorError(f"{identity} is no process")
        try:
            # Asked first: unlike /proc it does not hide other users' processes.
            pidfd = self._pidfd_open(identity.pid)
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
                return EndProof.ABSENT
            raise HypervisorError(f"{identity}: pidfd_open: {error.strerror}") from error
        try:
            if self._stat(identity.pid).start_time != identity.start_time:
                return EndProof.ABSENT
            return EndProof.ABSENT if _readable(pidfd) else None
        except (OSError, ValueError) as error:
            if _readable(pidfd):  # who held the pid just now has ended; if not ours, ours had before
                return EndProof.ABSENT
            raise HypervisorError(f"{identity}: cannot read its start time") from error
        finally:
            os.close(pidfd)

    def listens_at(self, pid: int) -> frozenset[str] | None:
        """Paths of the unix sockets at which a process listens; None when that cannot be said.

        Needs no lock of the process's memory and touches no file system but /proc.
        """
        base = self.proc / str(pid)
        try:
            names = os.listdir(base / "fd")
            if len(names) > MAX_SOCKETS_SEEN:
                return None
            targets = [_link(base / "fd" / name) for name in names]
            inodes = {target[len("socket:[") : -1] for target in targets if target.startswith("socket:[")}
            rows = (base / "net/unix").read_text("utf-8", "surrogateescape").splitlines()[1:]
            directory = os.readlink(base / "cwd")
        except OSError:
            return None
        fields = [row.split(maxsplit=7) for row in rows]
        return frozenset(
            os.path.normpath(os.path.join(directory, row[7]))
            for row in fields
            if len(row) == 8 and row[6] in inodes and int(row[3], 16) & _LISTENING and row[7][0] != "@"
        )

    def _sieve_one(self, pid: int, known: frozenset[ProcessKey], sieve: Sieve) -> None:
        try:
            executable = self._executable_or_denied(pid, known)
            if executable is None:
                return
            candidate = Candidate(pid, self._stat(pid).start_time, executable)
        except (ProcessGone, FileNotFoundError, ProcessLookupError):
            sieve.vanished = True
            return
        except (OSError, ValueError) as error:
            problem = Unidentified(f"pid {pid} cannot be read: {error}", pid=pid, anyones=True)
            sieve.unreadable.append(problem)
            return
        if candidate.key in known:
            sieve.seen.add(candidate.key)
        else:
            sieve.candidates.append(candidate)

    def _executable_or_denied(self, pid: int, known: frozenset[ProcessKey] = frozenset()) -> str | None:
        """A QEMU's program, "" when it cannot be read, None for another program.

        What exits and shows no program is another one unless it is `known` or its command is called like a
        QEMU: else whoever lets large processes exit, on purpose or not, could keep VMs from being called off.

        Raises:
            ProcessGone: it has ended.
        """
        try:
            executable = self._program(f"{self.proc}/{pid}")  # of most processes the only thing that is read
        except PermissionError:
            return ""
        except FileNotFoundError:
            stat = self._stat(pid)
            if stat.kernel_thread or not stat.exiting:
                return None
            executable = self._executable(pid)
            if executable == "":
                if stat.zombie:
                    raise ProcessGone(f"pid {pid} has ended") from None
                return "" if (pid, stat.start_time) in known or self._calls_itself(stat.command) else None
        return executable if self._matches(executable) else None

    def _pids(self) -> frozenset[int]:
        try:
            return frozenset(int(name) for name in os.listdir(self.proc) if name.isdecimal())
        except OSError as error:
            raise HypervisorError(f"cannot list {self.proc}: {error.strerror}") from error

    def _identify(self, pid: int) -> tuple[ProcessIdentity, CommandLine]:
        try:
            start_time = self._stat(pid).start_time
            executable = self._program_of(pid)
            if not self._matches(executable):
                raise NotAVm(f"pid {pid} is {executable or 'a kernel thread'}, not a QEMU")
            command = parse_command_line(self._command_line(pid))
        except PermissionError as error:
            raise self._unreadable(pid, error) from error
        except (FileNotFoundError, ProcessLookupError) as error:
            raise ProcessGone(f"pid {pid} has ended") from error
        except (OSError, ValueError) as error:
            raise Unidentified(f"pid {pid} cannot be read: {error}", pid=pid, anyones=True) from error
        vm_uuid = command.vm_uuid
        if vm_uuid is None:
            raise _without_identity(pid, executable, command)
        identity = ProcessIdentity(pid, start_time, executable, vm_uuid, self.boot_id, self.pid_namespace)
        return identity, command

    def _recognise(self, identity: ProcessIdentity) -> tuple[ProcessIdentity, CommandLine]:
        pid = identity.pid
        try:
            if self._stat(pid).start_time != identity.start_time:
                raise ProcessGone(f"{identity} has ended; its pid belongs to another process now")
            executable = self._program_of(pid)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise ProcessGone(f"{identity} has ended") from error
        except (OSError, ValueError) as error:
            raise Unidentified(f"pid {pid} cannot be read: {error}", pid=pid, anyones=True) from error
        if executable != identity.executable:
            raise NotAVm(f"{identity} runs {executable} now")
        unread = CommandLine((identity.vm_uuid,), "", no_reboot=True, passthrough=True, network_storage=True)
        return identity, unread

    def _program_of(self, pid: int) -> str:
        """The program's path; "" for a kernel thread.

        Raises:
            Unidentified: it exits.
        """
        executable = self._executable(pid)
        if not executable and self._stat(pid).exiting:
            raise _Exiting(pid)
        return executable

    def _executable(self, pid: int) -> str:
        """The program's path, without the mark of a replaced file; "" of a kernel thread, and at an exit."""
        for directory in self._sources(pid):
            try:
                return self._program(f"{directory}")
            except FileNotFoundError:
                continue
        return ""

    def _program(self, directory: str) -> str:
        return os.readlink(f"{directory}/exe").removesuffix(_DELETED)

    def _command_line(self, pid: int) -> bytes:
        for attempt in range(4):
            for directory in self._sources(pid):
                text = (directory / "cmdline").read_bytes()
                if text:
                    return text
            time.sleep(0.005 * attempt)  # in the middle of exec: the executable is set before its arguments
        raise Unidentified(f"pid {pid} is a QEMU without a readable command line", pid=pid, anyones=True)

    def _sources(self, pid: int) -> Iterator[Path]:
        """Where to read of a process: itself; if its leader has exited while threads live, one of these."""
        yield self.proc / str(pid)
        if not self._stat(pid).exiting:
            return
        tasks = self.proc / str(pid) / "task"
        for task in os.listdir(tasks):
            if int(task) != pid:
                yield tasks / task

    def _stat(self, pid: int) -> Stat:
        descriptor = os.open(f"{self.proc}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, STAT_BYTES)
        finally:
            os.close(descriptor)
        return parse_stat(text.decode("utf-8", "replace"))

    def _matches(self, executable: str) -> bool:
        name = os.path.basename(executable)
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._executables)

    def _calls_itself(self, command: str) -> bool:
        patterns = (*self._executables, *(one[:COMMAND_LENGTH] for one in self._executables))
        return any(fnmatch.fnmatchcase(command, pattern) for pattern in patterns)

    def _unreadable(self, pid: int, error: OSError) -> HypervisorError:
        """Of a process whose executable may not be read: is it worth a complaint?"""
        reason = f"pid {pid} may be a QEMU but cannot be read: {error.strerror}"
        try:
            raw = (self.proc / str(pid) / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return ProcessGone(f"pid {pid} has ended")
        except OSError:
            return Unidentified(reason, pid=pid, anyones=True)
        command = parse_command_line(raw)
        if not command.uuids and not self._matches(raw.split(b"\0")[0].decode("utf-8", "replace")):
            return NotAVm(f"pid {pid} does not look like a QEMU")
        return Unidentified(reason, command.uuids, pid=pid)


def read_boot_id(proc: Path = Path("/proc")) -> BootId:
    """The id of this boot of the kernel.

    Raises:
        OSError: it cannot be read; without it no process can be recognised again.
    """
    return BootId((proc / "sys/kernel/random/boot_id").read_text("ascii").strip())


def read_pid_namespace(proc: Path = Path("/proc")) -> PidNamespace:
    """The pid namespace of this process.

    Raises:
        OSError: it cannot be read; without it no record of a process can be relied on.
    """
    try:
        return PidNamespace(os.stat(proc / "self/ns/pid").st_ino)
    except FileNotFoundError:
        return HOST_PID_NAMESPACE  # a kernel without pid namespaces


def _elsewhere(identity: ProcessIdentity, here: PidNamespace) -> str:
    if identity.pid_namespace == NO_NAMESPACE:
        return (
            f"pid {identity.pid}: its record does not say in which pid namespace it was seen, so only a "
            "reboot of the host tells that it has ended"
        )
    return (
        f"pid {identity.pid} was recorded in pid namespace {identity.pid_namespace}, but this daemon runs in "
        f"{here}: run it in the host's pid namespace"
    )


def _without_identity(pid: int, executable: str, command: CommandLine) -> HypervisorError:
    if command.no_guest and not command.uuids:
        return NotAVm(f"pid {pid} is a QEMU without a machine")
    what = f"pid {pid} ({executable}, name {command.name[:100]!r})"
    if len(command.uuids) > 1:
        reason = f"{what} has several -uuid: {', '.join(command.uuids)}"
        return Unidentified(reason, command.uuids, pid=pid, sockets=command.sockets)
    reason = f"{what} has no -uuid, or a nil one: it cannot be told apart from others (S9)"
    return Unidentified(reason, pid=pid, sockets=command.sockets)


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""  # closed since it was listed


def _exit_status_of_pidfd(pidfd: int) -> int | None:
    """PIDFD_GET_INFO with PIDFD_INFO_EXIT (linux/pidfd.h): mask, cgroup id, eleven ids, exit code."""
    info = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, 0, *[0] * 11, 0))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except (OSError, ValueError):
        return None  # an older kernel
    fields = _PIDFD_INFO.unpack(info)
    return int(fields[-1]) if fields[0] & _PIDFD_INFO_EXIT else None


def _readable(pidfd: int, *, wait_s: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))
