# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sockets to which QEMUs connect: one for each path, for all the VMs whose ports name it.

A connection belongs to the VM whose QEMU made it: the process behind it (SO_PEERCRED) must be that instance,
by the same check as where QEMU listens. Nothing that comes over it says whose it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fence_vmchannel.logs import RateLimitedLog, quoted
from vmchannel_host.model import DefinedPort, PortName, ProcessIdentity
from vmchannel_host.port_sockets.expected import Claim, ExpectedLink, Verify
from vmchannel_host.port_sockets.path_listener import PathListener, Processes
from vmchannel_host.port_sockets.places import Place, SocketProblem, find_place

CHECK_S: Final = 5.0
"""How soon a socket that could not be made is tried again, and one that was removed is made anew, seconds."""

CONNECT_DIRECTORY: Final = "connect"
"""Name of our own directory for such sockets, in the daemon's."""

MAX_SOCKETS: Final = 4096
"""Sockets at a time."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trouble:
    """A socket that is not there. For the operator."""

    claim: Claim
    reason: str
    remedy: str


class PortListeners:
    """All of them. For one event loop, in which everything happens."""

    def __init__(
        self,
        directories: Sequence[str],
        processes: Processes,
        *,
        refused: Callable[[], None] = lambda: None,
        check_s: float = CHECK_S,
    ) -> None:
        """
        Args:
            directories: patterns of directories in which sockets may be made.
            processes: of this host.
            refused: called for each connection that is refused.
            check_s: see CHECK_S.
        """
        self._directories = tuple(directories)
        self._processes = processes
        self._refused = refused
        self._check_s = check_s
        self._listeners: dict[str, PathListener] = {}
        self._claims: dict[Claim, PathListener | SocketProblem] = {}
        self._defined: dict[str, dict[DefinedPort, Claim]] = {}  # by who defines them
        self._timer: asyncio.TimerHandle | None = None
        self._noise = RateLimitedLog(_log, clock=time.monotonic)

    def expect(
        self, path: str, identity: ProcessIdentity, vm_name: str, port: PortName, verify: Verify
    ) -> ExpectedLink:
        """Listen for that process's connection, until `release`. Never raises: its `connect` says why not."""
        link = ExpectedLink(Claim(identity.vm_uuid, vm_name, port, path), identity, verify)
        found = self._claim(link.claim, self._processes.user_of(identity.pid))
        if isinstance(found, SocketProblem):
            link.problem = f"{found}; {found.remedy}"
        else:
            found.expect(link)
        return link

    def release(self, link: ExpectedLink) -> None:
        """Wait for that connection no more."""
        link.drop()
        self._release(link.claim)

    def define(self, definer: str, ports: Iterable[DefinedPort]) -> None:
        """These are all the ports that `definer` defines now. They are listened for before their VM starts:
        without `reconnect` a QEMU does not even start where nobody listens.
        """
        wanted = set(ports)
        claims = self._defined.setdefault(definer, {})
        gone = [claims.pop(one) for one in claims.keys() - wanted]
        for new in sorted(wanted - claims.keys(), key=lambda one: (one.path, one.vm_uuid, one.port)):
            claims[new] = Claim(new.vm_uuid, new.vm_name, new.port, new.path)
            self._claim(claims[new], None)
        for claim in gone:  # last: a socket that is wanted again stays
            self._release(claim)

    def troubles(self) -> tuple[Trouble, ...]:
        """The ports for which there is no socket, and why."""
        found = [
            (claim, one.problem_of(claim) if isinstance(one, PathListener) else one)
            for claim, one in self._claims.items()
        ]
        return tuple(Trouble(claim, str(one), one.remedy) for claim, one in found if one is not None)

    def close(self) -> None:
        """Remove all sockets. May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        self._claims.clear()
        self._defined.clear()

    def _claim(self, claim: Claim, uid: int | None) -> PathListener | SocketProblem:
        """The path's listener, made at need, or why there is none."""
        try:
            place = find_place(claim.path, self._directories)
            listener = self._listeners.get(place.path) or self._begin(place)
            listener.claim(claim, uid)
        except SocketProblem as problem:
            self._claims[claim] = problem
            self._report(claim, problem)
            return problem
        self._claims[claim] = listener
        return listener

    def _begin(self, place: Place) -> PathListener:
        if len(self._listeners) >= MAX_SOCKETS:
            raise SocketProblem(f"{MAX_SOCKETS} sockets are listened on already", "let VMs share a path")
        listener = PathListener(place, self._processes, refused=self._refused, report=self._report)
        self._listeners[place.path] = listener
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._check_s, self._check)
        return listener

    def _release(self, claim: Claim) -> None:
        listener = self._claims.pop(claim, None)
        if not isinstance(listener, PathListener):
            return
        listener.release(claim)
        if not listener.claims:
            listener.close()
            del self._listeners[listener.place.path]

    def _report(self, claim: Claim, problem: SocketProblem) -> None:
        """At a bounded rate: a QEMU may name another path as often as it likes. `troubles` has them all."""
        text = "vm=%s port=%s: QEMU connects to %s, where the daemon cannot listen: %s; %s"
        port, path = quoted(claim.port), quoted(claim.path)
        self._noise.error(text, claim.vm_uuid, port, path, problem, problem.remedy)

    def _check(self) -> None:
        self._timer = None
        for listener in self._listeners.values():
            listener.check()
        if self._listeners:
            self._timer = asyncio.get_running_loop().call_later(self._check_s, self._check)


def default_directories(run: str, monitors: Iterable[str], channels: Iterable[str]) -> tuple[str, ...]:
    """Where sockets may be made unless host.yaml says otherwise.

    Args:
        run: the daemon's directory.
        monitors: patterns of QMP sockets; a directory directly below / is not taken, all programs share it.
        channels: where each libvirt keeps the sockets of channels.
    """
    beside = [directory for one in monitors if (directory := one.rpartition("/")[0]).count("/") > 1]
    return tuple(dict.fromkeys((f"{run}/{CONNECT_DIRECTORY}", *beside, *channels)))
