# SPDX-License-Identifier: LGPL-2.1-or-later
"""Of which VMs a process that cannot be identified is no instance (decision 0008).

Without its command line nothing says whose instance a QEMU is, so it may be any VM's, and every look is
silent about all of them (S1). Except about those that had an identified instance of their own while it
existed already: else one hung process would stop the fencing of every VM (S7).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vmchannel_host.hypervisors.instances import Watched
from vmchannel_host.hypervisors.process import Candidate, Unidentified
from vmchannel_host.model import Migration, UnknownProcess, VmUuid

MAX_FOLLOWED = 256
"""Unidentified processes of which it is remembered what they are not. Further ones may be any VM's."""


class UnknownProcesses:
    """The unidentified processes of this host, from one scan to the next (pure)."""

    def __init__(self) -> None:
        self._beside: dict[Candidate, set[VmUuid]] = {}
        self._homes: dict[VmUuid, set[str]] = {}

    def learn(self, found: Iterable[Candidate], alive: Mapping[Watched, frozenset[str]]) -> None:
        """A scan has found these unidentified processes; afterwards these instances live.

        Of these only those count that the configuration leads to (anybody may run a QEMU with a VM's UUID,
        decision 0006) and whose monitor says that they are in no migration: its other end may be the
        unidentified process, and of one whose monitor never answered nobody can say (S1).

        Args:
            found: all that the scan found.
            alive: the identified instances, each with the paths of the sockets that it uses.
        """
        found = sorted(set(found))
        kept = [one for one in found if one in self._beside]
        kept += [one for one in found if one not in self._beside][: max(0, MAX_FOLLOWED - len(kept))]
        self._beside = {candidate: self._beside.get(candidate, set()) for candidate in kept}
        if not kept:
            self._homes.clear()
            return
        for watched, sockets in alive.items():
            if not watched.configured:
                continue
            vm_uuid = watched.identity.vm_uuid
            settled = watched.last_migration is Migration.NONE
            self._homes.setdefault(vm_uuid, set()).update(sockets)
            for others in self._beside.values():
                if settled:
                    others.add(vm_uuid)
                else:
                    others.discard(vm_uuid)

    def judge(
        self,
        unknown: Mapping[Candidate, Unidentified],
        listening: Mapping[Candidate, frozenset[str] | None],
    ) -> tuple[UnknownProcess, ...]:
        """What the look has to say of them.

        Args:
            unknown: the processes, with what is wrong about each.
            listening: paths of the sockets at which each listens; None, or missing, when that is not known.
        """
        return tuple(
            UnknownProcess(f"{problem}", self._not_of(candidate, listening.get(candidate)))
            for candidate, problem in unknown.items()
        )

    def _not_of(self, candidate: Candidate, paths: frozenset[str] | None) -> frozenset[VmUuid]:
        if paths is None:
            return frozenset()
        paths = frozenset(map(_plain, paths))
        beside = self._beside.get(candidate, set())
        return frozenset(vm_uuid for vm_uuid in beside if paths.isdisjoint(map(_plain, self._homes[vm_uuid])))


def _plain(path: str) -> str:
    """/var/run is /run: the kernel shows a path as it was bound."""
    return path.removeprefix("/var") if path.startswith("/var/run/") else path
