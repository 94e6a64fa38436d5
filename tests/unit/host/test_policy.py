# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may fence whom, and which VM a plug means (S9, S12)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.messages import FenceAction, FenceCode
from tests.unit.host.registry_builders import VM1, VM2, VM3
from vmchannel_host.config.model import EvidenceRule, Group, HostConfig, PolicyConfig
from vmchannel_host.journal.types import StoredAlias
from vmchannel_host.model import NIL_UUID, HostName, VmUuid
from vmchannel_host.policy.aliases import AliasTable
from vmchannel_host.policy.policy import Policy, Refused, Resolved, Target, VmDirectory

OFF, ON, REBOOT, STATUS = FenceAction.OFF, FenceAction.ON, FenceAction.REBOOT, FenceAction.STATUS
LIST, MONITOR = FenceAction.LIST, FenceAction.MONITOR
STRANGER = VmUuid("ffffffff-8a55-4c2e-9f0f-0d6e0a4c2d99")
WEB = Group("web", ("vm1", "vm2"))


@dataclass
class Site:
    """A host's policy, its VMs and what their guests announced."""

    groups: Iterable[Group] = (WEB,)
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    vms: Mapping[VmUuid, set[str]] = field(default_factory=lambda: {VM1: {"vm1"}, VM2: {"vm2"}, VM3: {"vm3"}})
    names: AliasTable = field(default_factory=AliasTable)

    def __post_init__(self) -> None:
        self.policy = Policy(self.groups, self.aliases)
        self.directory = VmDirectory(self.vms)

    def announce(self, vm: VmUuid, node_name: str) -> bool:
        rivals = self.policy.rivals(vm, self.directory)
        return self.names.announce(vm, node_name, "corosync", now=1.0, rivals=rivals).accepted

    def ask(self, requester: VmUuid | None, action: FenceAction, plug: str) -> Resolved | Refused:
        return self.policy.resolve(requester, action, plug, vms=self.directory, names=self.names)

    def targets(self, requester: VmUuid | None, action: FenceAction = LIST) -> tuple[Target, ...]:
        return self.policy.targets(requester, action, vms=self.directory, names=self.names)


def assert_resolved(answer: Resolved | Refused, vm: VmUuid) -> Resolved:
    assert isinstance(answer, Resolved), answer
    assert answer.vm_uuid == vm
    return answer


def assert_refused(answer: Resolved | Refused, code: FenceCode, *words: str) -> None:
    assert isinstance(answer, Refused), answer
    assert answer.code is code
    assert answer.reason.isprintable(), "a reason is one line"
    for word in words:
        assert word in answer.reason


# --- rights


def test_without_a_group_nothing_is_allowed_and_the_refusal_says_how_to_allow_it() -> None:
    assert_refused(Site(groups=()).ask(VM1, OFF, "vm2"), FenceCode.REFUSED, "in no group", "policy.groups")


@pytest.mark.parametrize("plug", ["vm2", VM2, VM2.upper()])
def test_members_of_a_group_may_fence_one_another_by_name_and_uuid(plug: str) -> None:
    answer = assert_resolved(Site().ask(VM1, OFF, plug), VM2)
    assert (answer.name, answer.group) == ("vm2", "web")
    assert "'web' allows off" in answer.rule


@pytest.mark.parametrize("plug", ["vm3", VM3])
def test_a_vm_outside_the_group_is_refused_and_the_rule_is_named(plug: str) -> None:
    assert_refused(Site().ask(VM1, OFF, plug), FenceCode.REFUSED, "no group holds", "'web'", "vm3")


def test_an_action_that_the_group_does_not_list_is_refused() -> None:
    site = Site(groups=[Group("web", ("vm1", "vm2"), frozenset({STATUS, LIST}))])
    assert_resolved(site.ask(VM1, STATUS, "vm2"), VM2)
    assert_refused(site.ask(VM1, OFF, "vm2"), FenceCode.REFUSED, "status, list, not off", "`actions`")


def test_any_group_that_holds_both_is_enough() -> None:
    watch = Group("watch", ("vm1", "vm2"), frozenset({STATUS}))
    assert assert_resolved(Site(groups=[watch, WEB]).ask(VM1, OFF, "vm2"), VM2).group == "web"


def test_two_groups_do_not_add_up_through_a_third_vm() -> None:
    site = Site(groups=[Group("a", ("vm1", "vm2")), Group("b", ("vm2", "vm3"))])
    assert_refused(site.ask(VM1, OFF, "vm3"), FenceCode.REFUSED)


@pytest.mark.parametrize("plug", ["vm1", VM1, "node1", "first"])
@pytest.mark.parametrize("action", [OFF, ON, REBOOT])
def test_fencing_oneself_needs_self_true_by_whatever_name(plug: str, action: FenceAction) -> None:
    for allowed in (False, True):
        site = Site(groups=[Group("web", ("vm1", "vm2"), self_fence=allowed)], aliases={"first": "vm1"})
        site.announce(VM1, "node1")
        answer = site.ask(VM1, action, plug)
        if allowed:
            assert_resolved(answer, VM1)
        else:
            assert_refused(answer, FenceCode.REFUSED, "`self: true`", "'web'")


def test_everybody_in_a_group_may_ask_its_own_status() -> None:
    assert_resolved(Site().ask(VM1, STATUS, "vm1"), VM1)


def test_a_requester_without_a_uuid_is_nobody() -> None:
    site = Site(groups=[Group("web", (NIL_UUID, "vm2"))])
    assert_refused(site.ask(NIL_UUID, OFF, "vm2"), FenceCode.REFUSED, "-uuid")


def test_a_requester_that_was_never_seen_is_in_its_group_by_uuid() -> None:
    site = Site(groups=[Group("web", (STRANGER, "vm2"))])
    assert_resolved(site.ask(STRANGER, OFF, "vm2"), VM2)


def test_the_operator_may_act_on_every_vm() -> None:
    answer = assert_resolved(Site(groups=()).ask(None, OFF, "vm3"), VM3)
    assert (answer.group, answer.rule) == ("", "the operator may act on every VM")


@pytest.mark.parametrize("action", [LIST, MONITOR])
def test_an_action_without_a_plug_is_not_resolved(action: FenceAction) -> None:
    with pytest.raises(ValueError, match="takes no plug"):
        Site().ask(VM1, action, "")


# --- names and UUIDs


def test_a_member_name_that_two_vms_bear_gives_no_right() -> None:
    site = Site(vms={VM1: {"vm1"}, VM2: {"vm2"}, VM3: {"vm2"}})
    assert_refused(site.ask(VM1, OFF, "vm2"), FenceCode.AMBIGUOUS, VM2, VM3)
    assert_refused(site.ask(VM1, OFF, VM2), FenceCode.AMBIGUOUS, "member 'vm2'", VM2, VM3, "UUID")


def test_a_requester_whose_member_name_two_vms_bear_has_no_right() -> None:
    site = Site(vms={VM1: {"vm1"}, VM2: {"vm2"}, VM3: {"vm1"}})
    assert_refused(site.ask(VM1, OFF, "vm2"), FenceCode.AMBIGUOUS, "member 'vm1'", VM1, VM3)


def test_a_member_written_as_uuid_is_not_confused_by_its_name() -> None:
    site = Site(groups=[Group("web", (VM1, VM2))], vms={VM1: {"vm1"}, VM2: {"vm2"}, VM3: {"vm2"}})
    assert_resolved(site.ask(VM1, OFF, "vm2"), VM2)  # VM3 is in no group of the requester
    assert_resolved(site.ask(VM1, OFF, VM2), VM2)


def test_the_operator_must_tell_two_vms_of_one_name_apart() -> None:
    site = Site(vms={VM1: {"web"}, VM2: {"web"}})
    assert_refused(site.ask(None, OFF, "web"), FenceCode.AMBIGUOUS, VM1, VM2, "UUID", "`aliases`")
    assert_resolved(site.ask(None, OFF, VM2), VM2)


def test_a_vm_that_was_never_seen_is_found_by_a_uuid_that_the_policy_names() -> None:
    site = Site(groups=[Group("web", (VM1, STRANGER))], aliases={"node9": STRANGER})
    assert site.policy.names_uuid(STRANGER)
    for plug in (STRANGER, "node9"):
        assert assert_resolved(site.ask(VM1, OFF, plug), STRANGER).name == ""


def test_a_uuid_that_nobody_knows_is_unknown() -> None:
    for requester in (VM1, None):
        assert_refused(Site().ask(requester, OFF, STRANGER), FenceCode.UNKNOWN_PLUG, STRANGER)


def test_the_nil_uuid_is_no_plug() -> None:
    site = Site(groups=[Group("web", ("vm1", NIL_UUID))], vms={VM1: {"vm1"}, NIL_UUID: {"ghost"}})
    for plug in (NIL_UUID, "ghost"):
        assert_refused(site.ask(None, OFF, plug), FenceCode.UNKNOWN_PLUG)


def test_a_name_that_looks_like_a_uuid_never_stands_for_another_vm() -> None:
    site = Site(vms={VM1: {"vm1"}, VM2: {"vm2"}, VM3: {STRANGER}})
    assert_refused(site.ask(None, OFF, STRANGER), FenceCode.UNKNOWN_PLUG)


def test_names_are_case_sensitive_and_a_near_one_is_suggested() -> None:
    assert_refused(Site().ask(VM1, OFF, "VM2"), FenceCode.UNKNOWN_PLUG, "did you mean 'vm2'")


def test_only_permitted_names_are_suggested() -> None:
    answer = Site().ask(VM1, OFF, "vm33")
    assert_refused(answer, FenceCode.UNKNOWN_PLUG, "'vm2'")
    assert isinstance(answer, Refused)
    assert "'vm3'" not in answer.reason


def test_a_plug_that_resembles_nothing_lists_what_is_permitted() -> None:
    assert_refused(Site().ask(VM1, OFF, "database"), FenceCode.UNKNOWN_PLUG, "permitted are 'vm2'")


@pytest.mark.parametrize("plug", ["", "a,b", "x\ny", "../../etc/passwd", "\u202evm2", "v" * 256, "vm2 "])
def test_any_text_is_only_data(plug: str) -> None:
    assert_refused(Site().ask(VM1, OFF, plug), FenceCode.UNKNOWN_PLUG)


# --- aliases and node names


def test_an_entry_of_aliases_decides_over_a_vm_name_and_a_node_name() -> None:
    site = Site(aliases={"vm2": "vm1"}, groups=[Group("web", ("vm1", "vm2", "vm3"))])
    site.announce(VM3, "vm2")
    assert_resolved(site.ask(VM3, OFF, "vm2"), VM1)


def test_an_entry_of_aliases_for_a_vm_that_was_never_seen_says_so() -> None:
    site = Site(aliases={"node1": "gone"})
    assert_refused(site.ask(VM1, OFF, "node1"), FenceCode.UNKNOWN_PLUG, "'gone'", "never seen")


def test_an_entry_of_aliases_for_a_name_that_two_vms_bear_decides_nothing() -> None:
    site = Site(aliases={"node1": "web"}, vms={VM1: {"web"}, VM2: {"web"}})
    assert_refused(site.ask(None, OFF, "node1"), FenceCode.AMBIGUOUS, VM1, VM2)


def test_an_entry_of_aliases_gives_no_right() -> None:
    assert_refused(Site(aliases={"node3": "vm3"}).ask(VM1, OFF, "node3"), FenceCode.REFUSED, "no group holds")


def test_a_node_name_that_a_guest_announced_is_a_plug() -> None:
    site = Site()
    assert site.announce(VM2, "node2")
    assert_resolved(site.ask(VM1, OFF, "node2"), VM2)


def test_a_vm_called_node1_is_not_fenced_in_place_of_the_node_node1() -> None:
    site = Site(
        vms={VM1: {"node2"}, VM2: {"node1"}}, groups=[Group("web", ("node1", "node2"), self_fence=True)]
    )
    site.announce(VM1, "node1")
    site.announce(VM2, "node2")
    assert_refused(site.ask(VM1, OFF, "node1"), FenceCode.AMBIGUOUS, VM1, VM2)
    assert_refused(site.ask(None, OFF, "node2"), FenceCode.AMBIGUOUS, VM1, VM2)


def test_a_node_name_of_another_group_means_nothing() -> None:
    site = Site(groups=[WEB, Group("db", ("vm3",))])
    site.announce(VM3, "node3")
    assert_refused(site.ask(VM1, OFF, "node3"), FenceCode.UNKNOWN_PLUG)


def test_two_clusters_on_one_host_may_use_the_same_node_names() -> None:
    vm4 = VmUuid("cc2c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d44")
    site = Site(
        groups=[WEB, Group("db", ("vm3", "vm4"))],
        vms={VM1: {"vm1"}, VM2: {"vm2"}, VM3: {"vm3"}, vm4: {"vm4"}},
    )
    assert all(site.announce(vm, name) for vm, name in [(VM2, "node2"), (vm4, "node2")])
    assert_resolved(site.ask(VM1, OFF, "node2"), VM2)
    assert_resolved(site.ask(VM3, OFF, "node2"), vm4)
    assert_refused(site.ask(None, OFF, "node2"), FenceCode.AMBIGUOUS, VM2, vm4)


def test_a_stranger_to_the_group_cannot_block_its_names() -> None:
    site = Site()
    site.announce(VM2, "node2")
    assert site.announce(VM3, "node2")  # in no group: it collides with nobody, and names nobody
    assert_resolved(site.ask(VM1, OFF, "node2"), VM2)


def test_while_a_refused_claim_stands_the_name_fails_unless_it_is_pinned() -> None:
    groups = [Group("web", ("vm1", "vm2", "vm3"))]
    site = Site(groups=groups)
    assert site.announce(VM2, "node2")
    assert not site.announce(VM3, "node2")
    assert_refused(site.ask(VM1, OFF, "node2"), FenceCode.AMBIGUOUS, VM2, VM3, "refused", "`aliases`")
    assert_resolved(
        Site(groups=groups, aliases={"node2": "vm2"}, names=site.names).ask(VM1, OFF, "node2"), VM2
    )
    assert site.announce(VM3, "node3")
    assert_resolved(site.ask(VM1, OFF, "node2"), VM2)


def test_the_former_name_of_a_vm_that_claims_another_in_vain_fails_too() -> None:
    site = Site(groups=[Group("web", ("vm1", "vm2", "vm3"))])
    site.announce(VM2, "node2")
    site.announce(VM3, "node3")
    assert not site.announce(VM3, "node2")
    assert_refused(site.ask(VM1, OFF, "node3"), FenceCode.AMBIGUOUS, VM3, "'node2'")


def test_one_vm_called_the_same_in_every_way_is_not_ambiguous() -> None:
    site = Site(aliases={"vm2": "vm2"})
    site.announce(VM2, "vm2")
    assert_resolved(site.ask(VM1, OFF, "vm2"), VM2)


def test_groups_that_are_joined_later_make_a_shared_node_name_ambiguous() -> None:
    site = Site(groups=[WEB, Group("db", ("vm3",))])
    site.announce(VM2, "node2")
    site.announce(VM3, "node2")
    joined = Site(groups=[Group("all", ("vm1", "vm2", "vm3"))], names=site.names)
    assert_refused(joined.ask(VM1, OFF, "node2"), FenceCode.AMBIGUOUS, VM2, VM3)


def test_a_refused_claim_whose_holder_gave_the_name_up_still_fails() -> None:
    site = Site(groups=[Group("web", ("vm1", "vm2", "vm3"))])
    site.announce(VM2, "node2")
    site.announce(VM3, "node2")
    site.announce(VM2, "other")
    assert_refused(site.ask(VM1, OFF, "node2"), FenceCode.AMBIGUOUS, VM3)
    assert site.announce(VM3, "node2")
    assert_resolved(site.ask(VM1, OFF, "node2"), VM3)


# --- the alias table


def restored(table: AliasTable) -> AliasTable:
    again = AliasTable()
    again.restore(table.records())
    return again


def test_a_node_name_is_recorded_once_and_stays() -> None:
    table = AliasTable()
    first = table.announce(VM1, "node1", "corosync", now=5.0, rivals=())
    assert first.records == (StoredAlias(VM1, "node1", "corosync", 5.0, refused=False),)
    again = table.announce(VM1, "node1", "corosync", now=6.0, rivals=())
    assert again.records == first.records, "told again: the journal may have failed to keep it"
    assert restored(table).name_of(VM1) == "node1"


def test_a_vm_is_no_rival_of_itself() -> None:
    table = AliasTable()
    for source in ("hostname", "corosync"):
        assert table.announce(VM1, "node1", source, now=5.0, rivals={VM1, VM2}).accepted


def test_another_name_replaces_the_first() -> None:
    table = AliasTable()
    table.announce(VM1, "node1", "hostname", now=5.0, rivals=())
    table.announce(VM1, "node9", "corosync", now=6.0, rivals=())
    assert table.holders("node1") == frozenset()
    assert table.holders("node9") == {VM1}


def test_a_name_that_another_vm_holds_is_refused_with_holder_and_remedy() -> None:
    table = AliasTable()
    table.announce(VM1, "node1", "corosync", now=5.0, rivals={VM2})
    refused = table.announce(VM2, "node1", "corosync", now=6.0, rivals={VM1})
    assert not refused.accepted
    assert VM1 in refused.reason
    assert "`aliases`" in refused.reason
    assert refused.records == (StoredAlias(VM2, "node1", "corosync", 6.0, refused=True),)
    assert len(table.announce(VM2, "node1", "corosync", now=7.0, rivals={VM1}).records) == 1
    assert restored(table).claimants("node1") == {VM2}
    assert restored(table).holders("node1") == {VM1}


def test_a_claim_ends_when_the_vm_announces_the_name_it_holds() -> None:
    table = AliasTable()
    table.announce(VM1, "node1", "corosync", now=5.0, rivals={VM2})
    table.announce(VM2, "node2", "corosync", now=5.0, rivals={VM1})
    table.announce(VM2, "node1", "corosync", now=6.0, rivals={VM1})
    assert (table.name_of(VM2), table.claim_of(VM2)) == ("node2", "node1")
    again = table.announce(VM2, "node2", "corosync", now=7.0, rivals={VM1})
    assert again.records == (StoredAlias(VM2, "node2", "corosync", 7.0, refused=False),)
    assert table.claim_of(VM2) is None


@given(st.lists(st.tuples(st.sampled_from([VM1, VM2, VM3]), st.sampled_from(["a", "b", "c"]))))
def test_among_rivals_no_name_is_ever_held_twice_and_the_records_give_the_table_again(
    announcements: list[tuple[VmUuid, str]],
) -> None:
    table, kept = AliasTable(), dict[tuple[VmUuid, bool], StoredAlias]()
    for now, (vm, name) in enumerate(announcements):
        for record in table.announce(vm, name, "corosync", now=now, rivals={VM1, VM2, VM3}).records:
            if not record.refused:  # as the journal keeps them
                kept.pop((vm, True), None)
            kept[vm, record.refused] = record
        assert all(len(table.holders(name)) <= 1 for name in "abc")
    again = AliasTable()
    again.restore(kept.values())
    assert set(again.records()) == set(table.records())


# --- lists


def test_a_list_shows_the_others_of_the_group_with_their_node_names() -> None:
    site = Site(aliases={"second": "vm2"})
    site.announce(VM2, "node2")
    assert site.targets(VM1) == (Target(VM2, "vm2", "vm2", ("node2", "second")),)


def test_a_list_shows_the_requester_itself_only_with_self_true() -> None:
    site = Site(groups=[Group("web", ("vm1", "vm2"), self_fence=True)])
    assert [target.vm_uuid for target in site.targets(VM1)] == [VM1, VM2]


def test_every_plug_of_a_list_resolves_to_its_vm() -> None:
    site = Site(
        groups=[Group("web", ("vm1", VM2, "vm3", STRANGER))],
        vms={VM1: {"vm1"}, VM2: {"vm3"}, VM3: {"vm3"}},
        aliases={"node3": VM2},
    )
    site.announce(VM2, "vm1")
    site.announce(VM3, "x")
    targets = site.targets(VM1)
    assert {target.vm_uuid for target in targets} == {VM2, STRANGER}  # "vm3" is no sure member
    for target in targets:
        for plug in (target.plug, *target.aliases):
            assert_resolved(site.ask(VM1, OFF, plug), target.vm_uuid)


def test_a_list_needs_the_right_to_list_and_monitor_needs_any() -> None:
    site = Site(groups=[Group("web", ("vm1", "vm2"), frozenset({OFF}))])
    assert site.targets(VM1) == ()
    assert [target.plug for target in site.targets(VM1, MONITOR)] == ["vm2"]
    assert Site(groups=[Group("web", ("vm1", "vm2"), frozenset())]).targets(VM1, MONITOR) == ()


def test_who_is_in_no_group_sees_nothing() -> None:
    assert Site().targets(VM3) == ()


def test_the_operator_sees_all_vms_and_those_that_the_policy_names() -> None:
    site = Site(groups=[Group("web", (STRANGER, "vm2"))])
    assert [target.plug for target in site.targets(None)] == [STRANGER, "vm1", "vm2", "vm3"]


# --- the rest


def test_can_answers_for_another_vm_and_by_any_of_its_names() -> None:
    site = Site()
    site.announce(VM1, "node1")
    for requester in ("vm1", "node1", VM1):
        answer = site.policy.can(requester, OFF, "vm2", vms=site.directory, names=site.names)
        assert_resolved(answer, VM2)
    assert_refused(
        site.policy.can("vm9", OFF, "vm2", vms=site.directory, names=site.names), FenceCode.UNKNOWN_PLUG
    )


def test_the_strictest_group_of_a_vm_decides_what_evidence_it_needs() -> None:
    strict = Group("strict", ("vm2", "vm3"), evidence=EvidenceRule.STRICT)
    answer = assert_resolved(Site(groups=[WEB, strict]).ask(VM1, OFF, "vm2"), VM2)
    assert answer.evidence is EvidenceRule.STRICT


def test_a_policy_that_allows_nobody_says_so() -> None:
    config = HostConfig(host=HostName("hv1"))
    assert Policy.from_config(config).allows_nobody
    assert Policy([Group("alone", ("vm1",))], {}).allows_nobody
    assert not Policy([Group("alone", ("vm1",), self_fence=True)], {}).allows_nobody
    allowed = HostConfig(host=HostName("hv1"), policy=PolicyConfig({"web": WEB}))
    assert not Policy.from_config(allowed).allows_nobody


names = st.sampled_from(["vm1", "vm2", "vm3", "node1", "node2"])
vms = st.sampled_from([VM1, VM2, VM3])


@given(
    st.dictionaries(vms, st.sets(names, max_size=2)),
    st.lists(st.lists(st.one_of(names, vms), max_size=4), max_size=3),
    st.dictionaries(names, st.one_of(names, vms), max_size=2),
    st.lists(st.tuples(vms, names), max_size=6),
    vms,
    names,
)
def test_whatever_resolves_is_meant_by_nothing_else_and_shares_a_group(
    bears: dict[VmUuid, set[str]],
    groups: list[list[str]],
    aliases: dict[str, str],
    announced: list[tuple[VmUuid, str]],
    requester: VmUuid,
    plug: str,
) -> None:
    site = Site(
        [Group(f"g{number}", tuple(members)) for number, members in enumerate(groups)], aliases, bears
    )
    for vm, name in announced:
        site.announce(vm, name)
    answer = site.ask(requester, OFF, plug)
    if isinstance(answer, Refused):
        assert answer.reason.isprintable()
        return
    assert answer.vm_uuid != requester
    group = next(group for group in site.groups if group.name == answer.group)
    for vm in (requester, answer.vm_uuid):
        sure = [name for name in bears.get(vm, ()) if site.directory.bearers(name) == frozenset({vm})]
        assert set(group.members) & {vm, *sure}
    if plug not in aliases:
        assert answer.vm_uuid in site.directory.bearers(plug) | site.names.holders(plug)
        for other in set(bears) - {answer.vm_uuid}:
            shares = {one.name for one in site.policy.groups_of(other, site.directory)} & {
                one.name for one in site.policy.groups_of(requester, site.directory)
            }
            means_it = plug in bears[other] or plug in (site.names.name_of(other), site.names.claim_of(other))
            assert not (shares and means_it)
