# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may fence whom, and which VM a plug means (S9, S12; DESIGN section 4, Policy and Aliases).

Pure. Default deny: a VM may act on another only if one group holds both and allows the action. Any doubt
about which VM is meant is a refusal that names the candidates. Text is compared case-sensitively, as data.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fence_vmchannel.messages import FenceAction, FenceCode
from vmchannel_host.config.model import GROUP_ACTIONS, EvidenceRule, Group, HostConfig
from vmchannel_host.config.scalars import as_vm_uuid
from vmchannel_host.model import NIL_UUID, VmUuid
from vmchannel_host.policy.aliases import AliasTable
from vmchannel_host.policy.vm_directory import VmDirectory

__all__ = ["Policy", "Refused", "Resolved", "Target", "VmDirectory"]


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
    plug: str  # its name where that resolves to it, else its UUID
    aliases: tuple[str, ...]  # other plugs that resolve to it: configured aliases and its node name; sorted


class Policy:
    """The groups and `aliases` of the configuration, ready to answer. Immutable; a reload makes a new one."""

    def __init__(self, groups: Iterable[Group], aliases: Mapping[str, str]) -> None:
        self._groups = tuple(groups)
        self._aliases = dict(aliases)
        # Members are keys: a UUID in lower case, or a name.
        self._members = {
            group.name: frozenset(as_vm_uuid(member) or member for member in group.members)
            for group in self._groups
        }
        self._by_member: dict[str, list[Group]] = {}
        for group in self._groups:
            for member in self._members[group.name]:
                self._by_member.setdefault(member, []).append(group)

    @classmethod
    def from_config(cls, config: HostConfig) -> Policy:
        """The policy of a configuration."""
        return cls(config.policy.groups.values(), config.aliases)

    def resolve(
        self, requester: VmUuid | None, action: FenceAction, plug: str, *, vms: VmDirectory, names: AliasTable
    ) -> Resolved | Refused:
        """Find the VM that a plug means and the rule that lets the requester act on it.

        Args:
            requester: the VM that asks; None is the operator, who may act on any VM, but on no ambiguous one.
            action: OFF, ON, REBOOT or STATUS; for LIST and MONITOR see `targets`.
            plug: as the user wrote it.
            vms: what is known of VMs now.
            names: what guests announced.

        Raises:
            ValueError: the action takes no plug.
        """
        if action not in _WITH_PLUG:
            raise ValueError(f"{action.name} takes no plug")
        return _Question(self, requester, vms, names).resolve(action, plug)

    def targets(
        self, requester: VmUuid | None, action: FenceAction, *, vms: VmDirectory, names: AliasTable
    ) -> tuple[Target, ...]:
        """The VMs on which the requester may do `action`, sorted by plug.

        LIST gives what a `list` shows; MONITOR gives all on which any action is allowed. The requester itself
        is among them only by `self: true` (but for STATUS, which it may always ask of itself).
        """
        return _Question(self, requester, vms, names).targets(action)

    def can(
        self, requester_plug: str, action: FenceAction, plug: str, *, vms: VmDirectory, names: AliasTable
    ) -> Resolved | Refused:
        """What `vmchannelctl can VM ACTION PLUG` asks: find VM as the operator does, then ask as that VM."""
        requester = self.resolve(None, FenceAction.STATUS, requester_plug, vms=vms, names=names)
        if isinstance(requester, Refused):
            return requester
        return self.resolve(requester.vm_uuid, action, plug, vms=vms, names=names)

    def rivals(self, vm: VmUuid, vms: VmDirectory) -> frozenset[VmUuid]:
        """The other VMs that share a group with `vm`: among these node names must be unique."""
        return self.members(self.groups_of(vm, vms), vms) - {vm}

    def members(self, groups: Iterable[Group], vms: VmDirectory) -> frozenset[VmUuid]:
        """All VMs that some groups hold, also by a name that several VMs bear."""
        found: set[VmUuid] = set()
        for group in groups:
            for member in self._members[group.name]:
                uuid = as_vm_uuid(member)
                found |= {uuid} if uuid else vms.bearers(member)
        return frozenset(found - {NIL_UUID})

    def surely_holds(self, group: Group, vm: VmUuid, vms: VmDirectory) -> bool:
        """Whether a group holds the VM by its UUID, or by a name that no other VM bears."""
        members = self._members[group.name]
        return vm in members or any(name in members and len(vms.bearers(name)) == 1 for name in vms.names(vm))

    def doubtful_members(self, group: Group, vms: VmDirectory) -> frozenset[str]:
        """Names in the group that several VMs bear: they give nobody a right."""
        return frozenset(name for name in self._members[group.name] if len(vms.bearers(name)) > 1)

    def groups_of(self, vm: VmUuid, vms: VmDirectory) -> tuple[Group, ...]:
        """The groups that hold the VM, by UUID or by a name, also one that another VM bears too."""
        found = {group.name: group for key in (vm, *vms.names(vm)) for group in self._by_member.get(key, ())}
        return tuple(found.values())

    def names_uuid(self, vm: VmUuid) -> bool:
        """Whether a group or alias names this UUID: a VM never seen may then be proven off by looks (S1)."""
        return vm in self.named_uuids()

    def named_uuids(self) -> frozenset[VmUuid]:
        """All VMs that a group or alias names by UUID."""
        words = (*self._by_member, *self._aliases.values())
        return frozenset(uuid for uuid in map(as_vm_uuid, words) if uuid) - {NIL_UUID}

    def evidence_rule(self, vm: VmUuid, vms: VmDirectory) -> EvidenceRule:
        """The strictest rule of all groups that hold the VM (S3)."""
        rules = {group.evidence for group in self.groups_of(vm, vms)}
        return EvidenceRule.STRICT if EvidenceRule.STRICT in rules else EvidenceRule.SOLE

    @property
    def aliases(self) -> Mapping[str, str]:
        """The entries of `aliases`: plug to VM name or UUID."""
        return self._aliases

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups."""
        return self._groups

    @property
    def allows_nobody(self) -> bool:
        """No group has an action and two members, or one and `self`: every fence of a guest is refused."""
        return not any(
            group.actions and len(group.members) >= (1 if group.self_fence else 2) for group in self._groups
        )


_WITH_PLUG = (FenceAction.OFF, FenceAction.ON, FenceAction.REBOOT, FenceAction.STATUS)
_SEARCHED = 512  # names that are compared with a wrong plug
_SHOWN = 5  # candidates or suggestions named in one reason: it is one line of an agent's output


class _Question:
    """One question to the policy: who asks, and what is known now."""

    def __init__(self, policy: Policy, requester: VmUuid | None, vms: VmDirectory, names: AliasTable) -> None:
        self._policy = policy
        self._requester = requester
        self._vms = vms
        self._names = names
        self._groups = () if requester is None else policy.groups_of(requester, vms)

    # --- what is asked

    def resolve(self, action: FenceAction, plug: str) -> Resolved | Refused:
        refused = self._check_requester()
        if refused is not None:
            return refused
        found = self._find(plug)
        if found is None:
            return self._unknown(action, plug)
        if isinstance(found, Refused):
            return found
        return self._permit(action, found)

    def targets(self, action: FenceAction) -> tuple[Target, ...]:
        if self._check_requester() is not None:
            return ()
        pinned = {alias: self._find(alias) for alias in self._policy.aliases}
        allowed = (vm for vm in self._candidates() if self._group_for(action, vm) is not None)
        found = [self._target(vm, pinned) for vm in allowed]
        return tuple(sorted(found, key=lambda target: (target.plug, target.vm_uuid)))

    # --- which VM a plug means

    def _find(self, plug: str) -> VmUuid | Refused | None:
        """The one VM that is meant; None when no VM is."""
        uuid = as_vm_uuid(plug)
        if uuid is not None:
            return uuid if uuid in self._vms or self._policy.names_uuid(uuid) else None
        if plug in self._policy.aliases:
            return self._find_pinned(plug, self._policy.aliases[plug])
        named = self._in_scope(self._vms.bearers(plug))
        held = self._in_scope(self._names.holders(plug))
        claimed = self._in_scope(self._names.claimants(plug))
        if len(named | held | claimed) > 1 or claimed:
            return self._ambiguous(plug, named, held, claimed)
        for vm in held:
            other = self._names.claim_of(vm)
            if other is not None and other != plug:
                said = f"the node of {self._who(vm)} was {plug!r}, now claims {other!r} and was refused that"
                return Refused(FenceCode.AMBIGUOUS, f"{said}: {_pin(plug)}")
        return next(iter(named | held), None)

    def _find_pinned(self, plug: str, value: str) -> VmUuid | Refused:
        uuid = as_vm_uuid(value)
        if uuid is not None:
            return uuid
        bearers = self._vms.bearers(value)
        if len(bearers) == 1:
            return next(iter(bearers))
        entry = f"the entry {plug!r} of `aliases` names the VM {value!r}"
        if not bearers:
            reason = f"{entry}, which was never seen: mend the entry, or write the VM's UUID"
            return Refused(FenceCode.UNKNOWN_PLUG, reason)
        reason = f"{entry}, and {self._several(bearers)} are called so: write the UUID there"
        return Refused(FenceCode.AMBIGUOUS, reason)

    def _in_scope(self, vms: Iterable[VmUuid]) -> frozenset[VmUuid]:
        """Of several VMs those that share a group with the requester; names of others mean nothing to it."""
        if self._requester is None:
            return frozenset(vms)
        groups = set(self._groups)
        return frozenset(vm for vm in vms if groups.intersection(self._policy.groups_of(vm, self._vms)))

    def _ambiguous(
        self, plug: str, named: frozenset[VmUuid], held: frozenset[VmUuid], claimed: frozenset[VmUuid]
    ) -> Refused:
        parts = [f"VM {self._who(vm)} is called so" for vm in sorted(named)]
        parts += [f"the node of {self._who(vm)} is called so" for vm in sorted(held - named)]
        parts += [
            f"the node of {self._who(vm)} claims the name, which was refused to it" for vm in sorted(claimed)
        ]
        return Refused(FenceCode.AMBIGUOUS, f"{plug!r} is ambiguous: {_join(parts, '; ')}. {_pin(plug)}")

    def _unknown(self, action: FenceAction, plug: str) -> Refused:
        outside = self._vms.bearers(plug)
        if self._requester is not None and outside:
            return self._not_together(f"VM {plug!r}")
        plugs = self._permitted_names(action)
        folded = {known.casefold(): known for known in plugs}
        near = difflib.get_close_matches(plug.casefold(), list(folded), n=3, cutoff=0.6)
        if near:
            hint = f"did you mean {_join([repr(folded[word]) for word in near], ' or ')}?"
        elif plugs:
            hint = f"permitted are {_join(sorted(map(repr, plugs)), ', ')}"
        else:
            hint = "no plug is permitted: see `policy` in host.yaml"
        return Refused(FenceCode.UNKNOWN_PLUG, f"no VM, alias or node is called {plug!r}: {hint}")

    def _permitted_names(self, action: FenceAction) -> set[str]:
        """Names to suggest, about `_SEARCHED`. Unlike in a list they are not tried: a wrong plug is cheap."""
        names: set[str] = set()
        for vm in self._candidates():
            if len(names) >= _SEARCHED:
                break
            if self._group_for(action, vm) is not None:
                names |= self._vms.names(vm) or {str(vm)}
                node_name = self._names.name_of(vm)
                names |= {node_name} if node_name is not None else set()
        pinned = ((alias, self._find(alias)) for alias in self._policy.aliases)
        return names | {
            alias
            for alias, found in itertools.islice(pinned, _SEARCHED)
            if isinstance(found, str) and self._group_for(action, found) is not None
        }

    # --- whether the requester may

    def _check_requester(self) -> Refused | None:
        if self._requester is None:
            return None
        if self._requester == NIL_UUID:
            reason = "the requester's VM has no UUID (S9): start its QEMU with -uuid"
            return Refused(FenceCode.REFUSED, reason)
        if not self._groups:
            reason = f"VM {self._who(self._requester)} is in no group: add it to one under policy.groups"
            return Refused(FenceCode.REFUSED, reason)
        if not any(self._surely_in(self._requester, group) for group in self._groups):
            return self._doubtful_member(self._requester, self._groups[0])
        return None

    def _permit(self, action: FenceAction, vm: VmUuid) -> Resolved | Refused:
        evidence = self._policy.evidence_rule(vm, self._vms)
        if self._requester is None:
            return Resolved(vm, self._vms.name(vm), "", "the operator may act on every VM", evidence)
        group = self._group_for(action, vm)
        if group is None:
            return self._forbidden(action, vm)
        rule = (
            f"group {group.name!r} allows {_word(action)} to {self._who(self._requester)} on {self._who(vm)}"
        )
        return Resolved(vm, self._vms.name(vm), group.name, rule, evidence)

    def _group_for(self, action: FenceAction, vm: VmUuid) -> Group | None:
        """The first group that allows the action on the VM. For the operator any group will do."""
        if self._requester is None:
            return _OPERATOR
        return next((group for group in self._shared(vm) if self._allows(group, action, vm)), None)

    def _shared(self, vm: VmUuid) -> Iterator[Group]:
        """Groups that hold both without doubt."""
        assert self._requester is not None, "the operator is in no group"
        for group in self._groups:
            if self._surely_in(self._requester, group) and self._surely_in(vm, group):
                yield group

    def _allows(self, group: Group, action: FenceAction, vm: VmUuid) -> bool:
        if vm == self._requester and action is not FenceAction.STATUS and not group.self_fence:
            return False  # S12
        return bool(group.actions) if action is FenceAction.MONITOR else action in group.actions

    def _surely_in(self, vm: VmUuid, group: Group) -> bool:
        return self._policy.surely_holds(group, vm, self._vms)

    def _forbidden(self, action: FenceAction, vm: VmUuid) -> Refused:
        assert self._requester is not None, "nothing is forbidden to the operator"
        shared = list(self._shared(vm))
        word = _word(action)
        for group in shared:
            if action in group.actions:  # then only `self` can stand against it
                reason = f"a VM may {word} itself only with `self: true` in group {group.name!r}"
                return Refused(FenceCode.REFUSED, reason)
        if shared:
            allowed = [name for name, value in GROUP_ACTIONS.items() if value in shared[0].actions]
            reason = f"group {shared[0].name!r} allows {', '.join(allowed) or 'nothing'}, not {word}"
            return Refused(FenceCode.REFUSED, f"{reason}: add it to the group's `actions`")
        both = set(self._groups).intersection(self._policy.groups_of(vm, self._vms))
        for group in sorted(both, key=lambda group: group.name):
            doubtful = vm if self._surely_in(self._requester, group) else self._requester
            return self._doubtful_member(doubtful, group)
        return self._not_together(f"VM {self._who(vm)}")

    def _not_together(self, target: str) -> Refused:
        assert self._requester is not None, "the operator needs no group"
        groups = _join([repr(group.name) for group in self._groups], ", ")
        reason = f"no group holds {self._who(self._requester)} (in {groups}) together with {target}"
        return Refused(FenceCode.REFUSED, f"{reason}: add it under policy.groups if it may be fenced")

    def _doubtful_member(self, vm: VmUuid, group: Group) -> Refused:
        name = min(self._policy.doubtful_members(group, self._vms) & self._vms.names(vm))
        several = self._several(self._vms.bearers(name))
        reason = f"the member {name!r} of group {group.name!r} is ambiguous: {several} are called so"
        return Refused(FenceCode.AMBIGUOUS, f"{reason}: write the UUID in the group")

    # --- lists

    def _candidates(self) -> frozenset[VmUuid]:
        if self._requester is None:
            return self._vms.vms() | self._policy.members(self._policy.groups, self._vms)
        return self._policy.members(self._groups, self._vms)

    def _target(self, vm: VmUuid, pinned: Mapping[str, VmUuid | Refused | None]) -> Target:
        name = self._vms.name(vm)
        plug = name if name and self._find(name) == vm else vm
        others = {alias for alias, found in pinned.items() if found == vm}
        node_name = self._names.name_of(vm)
        if node_name is not None and self._find(node_name) == vm:
            others.add(node_name)
        return Target(vm, name, plug, tuple(sorted(others - {plug})))

    # --- words

    def _who(self, vm: VmUuid) -> str:
        name = self._vms.name(vm)
        return f"{name!r} ({vm})" if name else vm

    def _several(self, vms: Iterable[VmUuid]) -> str:
        return _join(sorted(vms), " and ")


_OPERATOR = Group("", actions=frozenset(GROUP_ACTIONS.values()))


def _word(action: FenceAction) -> str:
    return action.name.lower()


def _pin(plug: str) -> str:
    return f"Use the UUID, or pin {plug!r} in `aliases` of host.yaml"


def _join(parts: list[str], separator: str) -> str:
    shown = separator.join(parts[:_SHOWN])
    return shown if len(parts) <= _SHOWN else f"{shown} and {len(parts) - _SHOWN} more"
