# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collects what the machine tells. Blocking: run it in a thread, with the time that it may take."""

from __future__ import annotations

import glob
import os
import stat
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from vmchannel_host.config.model import HostConfig
from vmchannel_host.doctor.facts import (
    DirectoryFact,
    DirectoryPurpose,
    MachineFacts,
    Program,
    SocketFact,
    SocketPurpose,
)
from vmchannel_host.doctor.unix_sockets import SocketTable, command_of, list_sockets, owners
from vmchannel_host.hypervisors.process import HOST_PID_NAMESPACE, read_pid_namespace
from vmchannel_host.model import PidNamespace

MAX_SOCKETS: Final = 4096

_Wanted = tuple[SocketPurpose, str]  # what for, and the socket's path


def collect(
    config: HostConfig,
    *,
    ports: Iterable[str] = (),
    daemon: int | None,
    problems: Sequence[str] = (),
    timeout_s: float,
    pid_namespace: PidNamespace | None = None,
) -> MachineFacts:
    """Look at directories, sockets and namespaces. Blocks about `timeout_s` seconds at most.

    Args:
        config: of the daemon.
        ports: chardev sockets of the ports that are served.
        daemon: pid of the daemon, whose own connections are no finding; None when it does not run.
        problems: of the configuration's files.
        timeout_s: what is not looked at by then is left out, and `late` says so.
        pid_namespace: in which the daemon runs; None: this process's.
    """
    deadline = time.monotonic() + timeout_s
    globs = (pattern for one in config.qmp for pattern in one.sockets)
    paths = sorted({path for pattern in globs for path in islice(glob.iglob(pattern), MAX_SOCKETS)})
    monitors: list[_Wanted] = [("monitor", path) for path in paths]
    chardevs: list[_Wanted] = [("port", path) for path in ports]
    wanted = monitors + chardevs
    sockets = _sockets(wanted[:MAX_SOCKETS], daemon, deadline)
    return MachineFacts(
        config=tuple(problems),
        directories=(_directory(config.paths.state, "state"), _directory(config.paths.run, "run")),
        sockets=tuple(sockets),
        first_pid_namespace=_is_first(pid_namespace),
        root=os.geteuid() == 0,
        journal_holder=lock_holder(config.paths.state / "journal.db.lock"),
        late=len(wanted) > MAX_SOCKETS or time.monotonic() >= deadline,
    )


def _is_first(namespace: PidNamespace | None) -> bool | None:
    try:
        return (namespace or read_pid_namespace()) == HOST_PID_NAMESPACE
    except OSError:
        return None


def lock_holder(path: Path, *, locks: Path = Path("/proc/locks")) -> Program | None:
    """Who holds the lock of a journal; None when nobody does, or it cannot be told. Takes no lock itself."""
    try:
        status = path.stat()
        lines = locks.read_text("ascii").splitlines()
    except OSError:
        return None
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        words = line.split()  # "1: FLOCK ADVISORY WRITE 4711 fd:00:1234 0 EOF", see proc(5)
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == place and words[4].isdigit():
            return Program(int(words[4]), command_of(words[4]))
    return None


def _directory(path: Path, purpose: DirectoryPurpose) -> DirectoryFact:
    try:
        mode = path.stat().st_mode
        room = os.statvfs(path)
    except OSError as error:
        return DirectoryFact(str(path), purpose, problem=error.strerror or str(error))
    problem = ""
    if not stat.S_ISDIR(mode):
        problem = "not a directory"
    elif mode & 0o022:
        problem = f"others may write in it (mode {stat.S_IMODE(mode):04o})"
    elif not os.access(path, os.W_OK | os.X_OK):
        problem = "it cannot be written"
    return DirectoryFact(
        str(path),
        purpose,
        problem,
        room.f_bavail * room.f_frsize,
        room.f_favail if room.f_files else None,
    )


def _sockets(wanted: Sequence[_Wanted], daemon: int | None, deadline: float) -> list[SocketFact]:
    known = list_sockets(timeout_s=max(0.1, deadline - time.monotonic()))
    table = SocketTable(known or ())
    ends = {path: table.ends_at(path) for _, path in wanted}
    inodes = {inode for listeners, clients in ends.values() for inode in (*listeners, *clients)}
    holders = owners(inodes, expired=lambda: time.monotonic() >= deadline)
    told = known is not None
    return [_socket(purpose, path, told, ends[path], holders, daemon) for purpose, path in wanted]


def _socket(
    purpose: SocketPurpose,
    path: str,
    told: bool,
    ends: tuple[list[int], list[int]],
    holders: dict[int, list[Program]],
    daemon: int | None,
) -> SocketFact:
    try:
        status = os.stat(path)
    except OSError as error:
        return SocketFact(path, purpose, problem=error.strerror or str(error), told=told)
    problem = ""
    if not stat.S_ISSOCK(status.st_mode):
        problem = "it is no socket"
    elif not os.access(path, os.W_OK):
        owner = f"mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}"
        problem = f"not permitted ({owner})"
    listeners, clients = ends
    return SocketFact(
        path,
        purpose,
        problem,
        stat.S_IMODE(status.st_mode),
        status.st_uid,
        tuple(program for inode in listeners for program in holders.get(inode, ())),
        tuple(_foreign(clients, holders, daemon)),
        told=told,
    )


def _foreign(clients: list[int], holders: dict[int, list[Program]], daemon: int | None) -> list[Program]:
    """Who is served, but for the daemon. A socket that a process shares with its children is one client."""
    found: list[Program] = []
    for inode in clients:
        programs = holders.get(inode, [])
        if programs and all(program.pid != daemon for program in programs):
            found.append(programs[0])
    return found
