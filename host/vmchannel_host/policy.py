# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may fence whom, and which VM a plug means (S9, S12; DESIGN section 4, Policy and Aliases).

Pure. Default deny: a VM may act on another only if one group holds both and allows the action. Any doubt about
which VM is meant is a refusal that names the candidates. Text is compared case-sensitively and is data only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fence_vmchannel.messages import FenceAction, FenceCode
from vmchannel_host.aliases import AliasTable
from vmchannel_host.config_model import EvidenceRule, Group, HostConfig
from vmchannel_host.model import VmUuid


class VmDirectory:
    """The VMs that are known, with the names they bear. Immutable; `VmRegistry.directory()` gives the present one."""

    def __init__(self, names: Mapping[VmUuid, Iterable[str]]) -> None:
        raise NotImplementedError

    def __contains__(self, vm: VmUuid) -> bool:
        raise NotImplementedError

    def vms(self) -> frozenset[VmUuid]:
        """All known VMs."""
        raise NotImplementedError

    def names(self, vm: VmUuid) -> frozenset[str]:
        """The names a VM bears; empty when it is not known."""
        raise NotImplementedError

    def bearers(self, name: str) -> frozenset[VmUuid]:
        """The VMs that bear a name."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Resolved:
    """One VM is meant, and the requester may do it."""

    vm_uuid: VmUuid
    name: str  # "" when the VM was never seen
    group: str  # that allows it; "" for the operator
    rule: str  # the same as a sentence for people
    evidence: EvidenceRule  # the strictest of all groups that hold the VM


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing may be done."""

    code: FenceCode  # UNKNOWN_PLUG, AMBIGUOUS or REFUSED
    reason: str  # one line: the candidates or the rule, and the remedy


@dataclass(frozen=True, slots=True)
class Target:
    """A VM on which the requester may act."""

    vm_uuid: VmUuid
    name: str  # "" when the VM was never seen
    aliases: tuple[str, ...]  # other plugs that resolve to it: configured aliases and its node name; sorted


class Policy:
    """The groups and `aliases` of the configuration, ready to answer."""

    def __init__(self, groups: Iterable[Group], aliases: Mapping[str, str]) -> None:
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: HostConfig) -> Policy:
        """The policy of a configuration."""
        return cls(config.policy.groups.values(), config.aliases)

    def resolve(
        self, requester: VmUuid | None, action: FenceAction, plug: str, *, vms: VmDirectory, names: AliasTable
    ) -> Resolved | Refused:
        """Find the VM that a plug means and the rule that lets the requester act on it.

        Args:
            requester: the VM that asks; None is the operator, who may act on any VM but not on an ambiguous one.
            action: OFF, ON, REBOOT or STATUS; for LIST and MONITOR see `targets`.
        """
        raise NotImplementedError

    def targets(
        self, requester: VmUuid | None, action: FenceAction, *, vms: VmDirectory, names: AliasTable
    ) -> tuple[Target, ...]:
        """The VMs on which the requester may do `action`, sorted by name.

        LIST gives what a `list` shows; MONITOR gives all on which any action is allowed. The requester itself is
        among them only by `self: true` (but for STATUS, which it may always ask of itself).
        """
        raise NotImplementedError

    def can(
        self, requester_plug: str, action: FenceAction, plug: str, *, vms: VmDirectory, names: AliasTable
    ) -> Resolved | Refused:
        """What `vmchannelctl can VM ACTION PLUG` asks: resolve VM as the operator does, then the plug as that VM."""
        raise NotImplementedError

    def rivals(self, vm: VmUuid, vms: VmDirectory) -> frozenset[VmUuid]:
        """The other VMs that share a group with `vm`: among these node names must be unique."""
        raise NotImplementedError

    def names_uuid(self, vm: VmUuid) -> bool:
        """Whether a group or alias names this UUID: then a VM never seen may be claimed off after fresh looks (S1)."""
        raise NotImplementedError

    def evidence_rule(self, vm: VmUuid, vms: VmDirectory) -> EvidenceRule:
        """The strictest rule of all groups that hold the VM (S3)."""
        raise NotImplementedError

    @property
    def allows_nobody(self) -> bool:
        """No group has two members, or one and `self`: every fence of a guest will be refused."""
        raise NotImplementedError
