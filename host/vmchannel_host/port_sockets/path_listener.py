# SPDX-License-Identifier: LGPL-2.1-or-later
"""One socket to which QEMUs connect, and to which port each connection goes."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from fence_vmchannel.access import Credentials
from fence_vmchannel.logs import RateLimitedLog, quoted
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.process import ProcessKey
from vmchannel_host.port_sockets.expected import Claim, ExpectedLink
from vmchannel_host.port_sockets.places import Place, SocketProblem
from vmchannel_host.port_sockets.socket_file import PortSocket

WAIT_S: Final = 30.0
"""How long the connection of a QEMU waits that has not been identified yet, seconds: one without reconnect=
would not come again."""

MAX_WAITING: Final = 32
"""Connections of one socket that wait so, each of another process."""

_ACCEPTS_PER_TURN: Final = 16
_OUT_OF_DESCRIPTORS_PAUSE_S: Final = 0.5

_TWINS = SocketProblem(
    "two ports of this VM connect there, and which is which cannot be told", "give each chardev its own path"
)

_log = logging.getLogger(__name__)


class Processes(Protocol):
    """The processes of this host; nothing here blocks. See `ProcessTable`."""

    def key_of(self, pid: int) -> ProcessKey: ...

    def may_be_vm(self, pid: int) -> bool: ...

    def user_of(self, pid: int) -> int | None: ...


@dataclass(slots=True)
class _Waiting:
    sock: socket.socket
    key: ProcessKey
    timer: asyncio.TimerHandle


class PathListener:
    """Listens at one path. For one event loop."""

    def __init__(
        self,
        place: Place,
        processes: Processes,
        *,
        refused: Callable[[], None],
        report: Callable[[Claim, SocketProblem], None],
        wait_s: float = WAIT_S,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """
        Args:
            place: where.
            processes: of this host.
            refused: called for each connection that is refused.
            report: told of each port when the socket cannot be had, once for each reason.
            wait_s: see WAIT_S.
            max_waiting: see MAX_WAITING.
        """
        self.place = place
        self.claims: dict[Claim, None] = {}
        self.problem: SocketProblem | None = None  # why there is no socket
        self._processes = processes
        self._refused = refused
        self._report = report
        self._wait_s = wait_s
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._socket: PortSocket | None = None
        self._uid: int | None = None  # of the QEMU for which the socket is
        self._links: dict[Claim, ExpectedLink] = {}
        self._expected: dict[int, list[ExpectedLink]] = {}  # the same, by pid
        self._waiting: dict[int, _Waiting] = {}  # by pid
        self._resume: asyncio.TimerHandle | None = None
        self._noise = RateLimitedLog(_log, clock=time.monotonic)

    @property
    def waiting(self) -> int:
        """Connections of QEMUs that have not been identified yet."""
        return len(self._waiting)

    def claim(self, claim: Claim, uid: int | None) -> None:
        """Listen for that port, too; the first QEMU that runs decides whose the socket is.

        Args:
            claim: the port.
            uid: of its QEMU; None while that does not run, or is not known.

        Raises:
            SocketProblem: a QEMU of that user cannot be served here.
        """
        if self._socket is not None and uid is not None:
            self.check()
        if self._socket is not None and uid is not None:
            self._socket.check_directory(uid)
            if self._uid is None:
                self._socket.give_to(uid)
            elif uid not in (0, owner := self._socket.owner()):  # else libvirt has given it to this one
                reason = f"its QEMU runs as uid {uid}, and the socket is for one of uid {owner}"
                raise SocketProblem(reason, "let only VMs of one user share a path")
        self.claims[claim] = None
        self._uid = uid if self._uid is None else self._uid
        if self._socket is None:
            self._open((claim,))

    def expect(self, link: ExpectedLink) -> None:
        """The connection of that process is its port's; it may have come already."""
        pid = link.identity.pid
        self._links[link.claim] = link
        of_process = self._expected.setdefault(pid, [])
        of_process.append(link)
        self._tell(of_process)
        waiting = self._waiting.pop(pid, None)
        if waiting is not None:
            waiting.timer.cancel()
            self._route(waiting.sock, waiting.key)

    def problem_of(self, claim: Claim) -> SocketProblem | None:
        """Why no connection can come for that port; None while one can."""
        link = self._links.get(claim)
        twins = link is not None and len(self._expected[link.identity.pid]) > 1
        return self.problem or (_TWINS if twins else None)

    def release(self, claim: Claim) -> None:
        """That port is waited for no more."""
        self.claims.pop(claim, None)
        link = self._links.pop(claim, None)
        if link is None:
            return
        link.drop()
        of_process = self._expected[link.identity.pid]
        of_process.remove(link)
        self._tell(of_process)
        if not of_process:
            del self._expected[link.identity.pid]
        if not self._expected:
            self._uid = None

    def check(self) -> None:
        """Make the socket again if it could not be made, or was removed."""
        if self._socket is not None and not self._socket.in_place():
            self._noise.warning("%s was removed or replaced", quoted(self.place.path))
            self._close_socket()
        if self._socket is None:
            self._open(())

    def close(self) -> None:
        """Remove the socket; what was handed over goes on. May be called twice."""
        self._close_socket()
        for waiting in self._waiting.values():
            waiting.timer.cancel()
            waiting.sock.close()
        self._waiting.clear()
        for link in self._links.values():
            link.drop()
        self._links.clear()
        self._expected.clear()

    # --- the socket

    def _open(self, concerned: Iterable[Claim]) -> None:
        before = "" if self.problem is None else str(self.problem)
        try:
            self._socket = PortSocket.listen(self.place, uid=self._uid)
        except SocketProblem as problem:
            self.problem = problem
            for claim in self.claims if str(problem) != before else concerned:
                self._report(claim, problem)
        else:
            self.problem = None
            self._loop.add_reader(self._socket.fileno(), self._accept)
        self._tell(self._links.values())

    def _close_socket(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _tell(self, links: Iterable[ExpectedLink]) -> None:
        for link in links:
            problem = self.problem_of(link.claim)
            link.problem = f"{problem}; {problem.remedy}" if problem is not None else ""

    # --- connections

    def _accept(self) -> None:
        assert self._socket is not None, "its reader is removed with it"
        try:
            for _ in range(_ACCEPTS_PER_TURN):
                found = self._socket.accept()
                if found is None:
                    return
                self._admit(*found)
        except OSError as error:  # EMFILE: without a pause this would spin
            self._noise.warning("%s: cannot accept: %s", quoted(self.place.path), error.strerror)
            self._loop.remove_reader(self._socket.fileno())
            self._resume = self._loop.call_later(_OUT_OF_DESCRIPTORS_PAUSE_S, self._accept_again)

    def _accept_again(self) -> None:
        self._resume = None
        if self._socket is not None:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _admit(self, sock: socket.socket, who: Credentials) -> None:
        try:
            key = self._processes.key_of(who.pid)
            may_be = who.pid in self._expected or self._processes.may_be_vm(who.pid)
        except HypervisorError as error:
            self._refuse(sock, who.pid, str(error))
            return
        if who.pid in self._expected:
            self._route(sock, key)
        elif not may_be:
            self._refuse(sock, who.pid, "it is no QEMU")
        elif who.pid not in self._waiting and len(self._waiting) >= self._max_waiting:
            self._refuse(sock, who.pid, f"{self._max_waiting} QEMUs wait to be identified already")
        else:
            self._let_wait(sock, key)

    def _route(self, sock: socket.socket, key: ProcessKey) -> None:
        """Hand a connection to the one port whose QEMU made it."""
        pid, start_time = key
        links = self._expected[pid]
        if len(links) != 1:
            self._refuse(sock, pid, str(_TWINS))
            return
        link = links[0]
        try:
            if link.identity.start_time != start_time:
                raise HypervisorError(f"it is not {link.identity}, but a process that had its pid")
            link.verify(pid)
        except HypervisorError as error:
            self._refuse(sock, pid, str(error))
            return
        link.offer(sock)

    def _let_wait(self, sock: socket.socket, key: ProcessKey) -> None:
        older = self._waiting.pop(key[0], None)
        if older is not None:
            older.timer.cancel()
            older.sock.close()
        timer = self._loop.call_later(self._wait_s, self._give_up, key[0])
        self._waiting[key[0]] = _Waiting(sock, key, timer)

    def _give_up(self, pid: int) -> None:
        self._refuse(self._waiting.pop(pid).sock, pid, "no port of its VM names this path")

    def _refuse(self, sock: socket.socket, pid: int, reason: str) -> None:
        sock.close()
        self._refused()
        self._noise.warning(
            "%s: connection of pid %d refused: %s", quoted(self.place.path), pid, reason[:300]
        )
