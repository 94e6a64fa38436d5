# SPDX-License-Identifier: LGPL-2.1-or-later
"""Node names that guests announce: which VM holds which name, and which claims were refused.

Pure. A name belongs to the VM that announced it first and stays with it while the guest is hung, off or moving,
until that VM announces another. A VM that announces a name which another VM of its groups holds is refused; the
refused claim is remembered, and while it stands the name resolves to nobody (DESIGN section 4, Aliases).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from vmchannel_host.journal_types import StoredAlias
from vmchannel_host.model import VmUuid


@dataclass(frozen=True, slots=True)
class Announced:
    """What an announcement led to."""

    accepted: bool
    reason: str  # one line; names the holder and the remedy when refused
    records: tuple[StoredAlias, ...]  # to be remembered, in this order, before the guest is answered


class AliasTable:
    """Who holds and who claims which node name.

    For each VM at most two records stand: the name it holds and, announced later, the name it was refused. An
    accepted record replaces both, a refused one replaces a refused one.
    """

    def restore(self, records: Iterable[StoredAlias]) -> None:
        """Take the records that stand, once, before anything else."""
        raise NotImplementedError

    def announce(
        self, vm: VmUuid, node_name: str, source: str, *, now: float, rivals: Collection[VmUuid]
    ) -> Announced:
        """A VM tells its node name.

        Args:
            now: wall clock, seconds.
            rivals: the VMs that share a group with `vm` (`Policy.rivals`). Names of others never collide: two
                clusters on one host may both have a node1, and a VM cannot block a cluster it is not in.
        """
        raise NotImplementedError

    def name_of(self, vm: VmUuid) -> str | None:
        """The node name that the VM holds."""
        raise NotImplementedError

    def holders(self, node_name: str) -> frozenset[VmUuid]:
        """VMs that hold the name; in one group at most one, unless groups were changed since."""
        raise NotImplementedError

    def claimants(self, node_name: str) -> frozenset[VmUuid]:
        """VMs to which the name was refused and that claim it still."""
        raise NotImplementedError

    def records(self) -> tuple[StoredAlias, ...]:
        """All that stands now: held names and refused claims, for `doctor` and status."""
        raise NotImplementedError
