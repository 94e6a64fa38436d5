# SPDX-License-Identifier: LGPL-2.1-or-later
"""Groups that `vmchannelctl setup` proposes, takes from the operator, and writes down. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vmchannel_host.config.model import GROUP_ACTIONS
from vmchannel_host.config.scalars import as_vm_uuid
from vmchannel_host.printable import printable

_NUMBERED: Final = re.compile(r"(.*?[^\W\d_])[-_.]?\d+", re.ASCII)


class WrongGroup(Exception):
    """What the operator wrote is no group of known VMs; the text says why."""


@dataclass(frozen=True, slots=True)
class KnownVm:
    """A VM that may be put into a group."""

    uuid: str
    name: str  # "" when unknown; untrusted text
    groups: tuple[str, ...] = ()  # that hold it already

    def __str__(self) -> str:
        return printable(self.name, 60) or self.uuid


@dataclass(frozen=True, slots=True)
class Proposal:
    """A group to be written."""

    name: str
    members: tuple[KnownVm, ...]

    def __str__(self) -> str:
        return f"{printable(self.name, 60)}: {', '.join(map(str, self.members))}"


def propose(vms: Iterable[KnownVm]) -> tuple[Proposal, ...]:
    """One group for each prefix of numbered names, as web1 and web2, of VMs that are in no group yet."""
    found: dict[str, list[KnownVm]] = {}
    for vm in sorted(vms, key=lambda one: (one.name, one.uuid)):
        match = _NUMBERED.fullmatch(vm.name)
        if match is not None and not vm.groups:
            found.setdefault(match[1], []).append(vm)
    return tuple(Proposal(name, tuple(members)) for name, members in found.items() if len(members) > 1)


def read_group(text: str, vms: Sequence[KnownVm]) -> Proposal:
    """A group as it is typed: `NAME=VM,VM`, each VM by name or UUID.

    Raises:
        WrongGroup: it has another form, or a VM is unknown or ambiguous.
    """
    name, separator, rest = text.partition("=")
    words = [word.strip() for word in rest.split(",")]
    if not separator or not name.strip() or not all(words):
        raise WrongGroup(f"{text!r}: expected NAME=VM,VM")
    members = [_find(word, vms) for word in words]
    if len({one.uuid for one in members}) != len(members):
        raise WrongGroup(f"{text!r}: a VM stands there twice")
    return Proposal(name.strip(), tuple(members))


def render(groups: Sequence[Proposal]) -> str:
    """A file of policy.d/. Members are UUIDs, which no other VM can take; their names are comments."""
    lines = [
        "# Written by `vmchannelctl setup`: the members of a group may fence one another.",
        "# See vmchannel-host.yaml(5). SIGHUP lets the daemon read it again.",
        "groups:",
    ]
    for group in groups:
        lines += [f"  {json.dumps(group.name, ensure_ascii=False)}:", "    members:"]
        lines += [f"      - {one.uuid}  # {printable(one.name, 60)}".rstrip(" #") for one in group.members]
        lines.append(f"    actions: [{', '.join(GROUP_ACTIONS)}]")
    return "\n".join(lines) + "\n"


def _find(word: str, vms: Sequence[KnownVm]) -> KnownVm:
    uuid = as_vm_uuid(word)
    found = [vm for vm in vms if uuid == vm.uuid or (uuid is None and vm.name == word)]
    if len(found) > 1:
        uuids = ", ".join(vm.uuid for vm in found)
        raise WrongGroup(f"several VMs are called {word!r}: write one of {uuids}")
    if found:
        return found[0]
    if uuid is not None:
        return KnownVm(uuid, "")  # not seen yet: its UUID is all that a group needs
    raise WrongGroup(f"no VM is called {word!r}: see `vmchannelctl vms`; of one not seen yet write the UUID")
