# SPDX-License-Identifier: LGPL-2.1-or-later
"""Groups as `vmchannelctl setup` proposes, reads and writes them."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.config.checks import as_list, at
from vmchannel_host.config.schema import POLICY_SCHEMA, violations
from vmchannel_host.config.yaml_text import parse_yaml
from vmchannel_host.policy.proposal import KnownVm, Proposal, WrongGroup, propose, read_group, render


def vm(name: str, *, groups: tuple[str, ...] = (), number: int = 0) -> KnownVm:
    """A VM whose UUID follows from its name."""
    return KnownVm(str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name!a} {number}")), name, groups)


def proposed(*names: str) -> dict[str, list[str]]:
    return {one.name: [member.name for member in one.members] for one in propose(map(vm, names))}


def test_vms_with_numbered_names_of_one_kind_are_proposed_together() -> None:
    assert proposed("web2", "db-1", "web1", "db-2", "mail") == {
        "db": ["db-1", "db-2"],
        "web": ["web1", "web2"],
    }


@pytest.mark.parametrize("names", [(), ("web1",), ("alpha", "beta"), ("1", "2"), ("", ""), ("web1", "db1")])
def test_names_without_a_common_kind_make_no_proposal(names: tuple[str, ...]) -> None:
    assert proposed(*names) == {}


def test_a_vm_that_is_in_a_group_already_is_not_proposed() -> None:
    assert propose([vm("web1"), vm("web2", groups=("old",)), vm("web3")])[0].members == (
        vm("web1"),
        vm("web3"),
    )
    assert propose([vm("web1"), vm("web2", groups=("old",))]) == ()


def test_a_group_is_read_by_names_and_uuids_also_of_vms_not_seen_yet() -> None:
    known, other = [vm("web1"), vm("mail")], vm("later")
    group = read_group(f" pair = web1, {vm('mail').uuid.upper()},{other.uuid}", known)
    assert group == Proposal("pair", (known[0], known[1], KnownVm(other.uuid, "")))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("web1,mail", "expected NAME=VM,VM"),
        ("=web1,mail", "expected NAME=VM,VM"),
        ("pair=", "expected NAME=VM,VM"),
        ("pair=web1,,mail", "expected NAME=VM,VM"),
        ("pair=web1,web1", "twice"),
        ("pair=web1,wed2", "no VM is called 'wed2'"),
        ("pair=web1,twin", "several VMs are called 'twin'"),
    ],
)
def test_what_is_no_group_of_known_vms_is_refused(text: str, reason: str) -> None:
    known = [vm("web1"), vm("mail"), vm("twin"), vm("twin", number=2)]
    with pytest.raises(WrongGroup, match=reason):
        read_group(text, known)


NAMES = st.text(max_size=80) | st.sampled_from(["web1", "a\nb: c", "# x", "é\u2028", "\ud800", '"', "\\"])
GROUP_NAMES = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=30)


@given(
    st.dictionaries(GROUP_NAMES, st.lists(NAMES, min_size=1, max_size=4, unique=True), min_size=1, max_size=3)
)
def test_whatever_vms_and_groups_are_called_the_file_says_exactly_their_uuids(
    groups: dict[str, list[str]],
) -> None:
    written = [Proposal(name, tuple(map(vm, members))) for name, members in groups.items()]
    document = parse_yaml(render(written).encode())
    assert document.faults == ()
    assert violations(document.tree, POLICY_SCHEMA) == []
    for group in written:
        members = as_list(at(document.tree, "groups", group.name, "members"))
        assert list(members) == [one.uuid for one in group.members]
        actions = as_list(at(document.tree, "groups", group.name, "actions"))
        assert list(actions) == ["off", "on", "reboot", "status", "list"]
