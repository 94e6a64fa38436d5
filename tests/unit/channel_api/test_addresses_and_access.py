# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses of services, and who may open and offer them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.access import AccessRule, AccessRules, Credentials, guest_rules
from fence_vmchannel.addresses import MAX_ADDRESS, Address, parse_address
from fence_vmchannel.errors import LocalProtocolError
from fence_vmchannel.messages import FENCE_SERVICE

ROOT = Credentials(1, 0, 0)
USER = Credentials(2, 1000, 1000)
CLUSTER_USER = Credentials(3, 189, 189, frozenset({90}))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("org.example.echo", Address("org.example.echo")),
        ("vm1/org.example.echo", Address("org.example.echo", "vm1")),
        ("org.vmchannel.1:org.example.echo", Address("org.example.echo", "", "org.vmchannel.1")),
        ("vm1/org.vmchannel.1:echo", Address("echo", "vm1", "org.vmchannel.1")),
        ("odd/name, of a VM/echo", Address("echo", "odd/name, of a VM")),
        ("vm:1/echo", Address("echo", "vm:1")),
        (".hub", Address(".hub")),
    ],
)
def test_an_address_is_read_from_its_right_end(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text", ["", "/", ":", "/echo", ":echo", "vm1/", "vm1/:echo", "a b", "echo\n", "e..f", "ö", "x" * 2000]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(LocalProtocolError):
        parse_address(text)


@given(st.text(max_size=MAX_ADDRESS + 10))
def test_any_text_is_an_address_that_reads_back_or_is_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except LocalProtocolError:
        return
    assert parse_address(str(address)) == address


def test_fencing_is_for_root_and_the_cluster_group_only() -> None:
    rules = guest_rules(frozenset({90}))
    assert rules.may_open(FENCE_SERVICE, ROOT)
    assert rules.may_open(FENCE_SERVICE, CLUSTER_USER)
    assert not rules.may_open(FENCE_SERVICE, USER)


def test_other_services_are_for_anybody() -> None:
    assert guest_rules().may_open("org.vmchannel.clipboard", USER)


def test_only_root_offers_the_products_own_services_by_default() -> None:
    assert not AccessRules().may_offer(FENCE_SERVICE, USER)
    assert AccessRules().may_offer(FENCE_SERVICE, ROOT)
    assert AccessRules().may_offer("org.example.mine", USER)


def test_a_rule_opens_one_of_the_products_own_services_to_a_user() -> None:
    rules = AccessRules(offer={"org.vmchannel.clipboard": AccessRule(uids=frozenset({1000}))})
    assert rules.may_offer("org.vmchannel.clipboard", USER)
    assert not rules.may_offer("org.vmchannel.clipboard", CLUSTER_USER)


def test_a_rule_lets_in_by_primary_group_too() -> None:
    assert AccessRule(gids=frozenset({1000})).permits(USER)
