# SPDX-License-Identifier: LGPL-2.1-or-later
"""The node's name is corosync's local one, else the host name; found without a name server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fence_vmchannel.messages import Announce
from vmchannel_guest.announce import NodeSources, find_announcement, is_local_address, parse_nodelist

CONF = """\
# comment {
totem {
    version: 2
    interface {
        name: not-a-node
    }
}
nodelist {
    node {
        ring0_addr: 10.0.0.1
        ring1_addr: fd00::1
        name: alpha
        nodeid: 1
    }
    node {
        ring0_addr: 10.0.0.2
        name: beta
        nodeid: 2
    }
}
quorum {
    provider: corosync_votequorum
}
"""
CMAP = """\
nodelist.local_node_pos (u32) = 1
nodelist.node.0.name (str) = alpha
nodelist.node.0.ring0_addr (str) = 10.0.0.1
nodelist.node.1.name (str) = beta
nodelist.node.1.ring0_addr (str) = 10.0.0.2
"""


def no_corosync() -> str:
    return ""


def locally(*prefixes: str) -> Callable[[str], bool]:
    """What is local: all addresses that begin so."""
    return lambda address: address.startswith(prefixes)


@pytest.fixture
def sources(tmp_path: Path) -> NodeSources:
    (tmp_path / "etc/corosync").mkdir(parents=True)
    return NodeSources(str(tmp_path), lambda: "guest-7", locally("10.0.0.2"), no_corosync)


def configure(sources: NodeSources, text: str, hosts: str = "") -> None:
    Path(sources.root, "etc/corosync/corosync.conf").write_text(text)
    Path(sources.root, "etc/hosts").write_text(hosts)


def test_without_corosync_the_host_name_is_announced(sources: NodeSources) -> None:
    assert find_announcement(sources) == Announce("guest-7", "hostname")


def test_the_node_with_a_local_address_is_this_one(sources: NodeSources) -> None:
    configure(sources, CONF)
    assert find_announcement(sources) == Announce("beta", "corosync")


def test_any_ring_may_have_the_local_address(sources: NodeSources) -> None:
    configure(sources, CONF)
    there = replace(sources, is_local=locally("fd00::1"))
    assert find_announcement(there) == Announce("alpha", "corosync")


def test_a_node_that_is_named_like_the_host_is_this_one(sources: NodeSources) -> None:
    configure(sources, CONF.replace("beta", "guest-7"))
    nowhere = replace(sources, is_local=locally())
    assert find_announcement(nowhere) == Announce("guest-7", "corosync")


def test_a_ring_address_that_is_a_name_is_looked_up_in_etc_hosts(sources: NodeSources) -> None:
    configure(
        sources,
        CONF.replace("10.0.0.2", "Beta-Ring").replace("name: beta\n", "\n"),
        "10.0.0.2 beta-ring # ours\n10.0.0.1 alpha-ring\n",
    )
    assert find_announcement(sources) == Announce("Beta-Ring", "corosync")


def test_a_loopback_address_tells_no_node_from_another(sources: NodeSources) -> None:
    configure(sources, CONF, "127.0.1.1 10.0.0.1\n")
    loopback = replace(sources, is_local=locally("127."))
    assert find_announcement(loopback) is None


def test_nothing_is_announced_while_no_node_of_the_list_is_this_one(sources: NodeSources) -> None:
    configure(sources, CONF)
    before_the_network = replace(sources, is_local=locally())
    assert find_announcement(before_the_network) is None


def test_corosync_is_asked_where_its_file_does_not_tell(sources: NodeSources) -> None:
    configure(sources, CONF)
    asked = replace(sources, is_local=locally(""), cmap=lambda: CMAP)
    assert find_announcement(asked) == Announce("beta", "corosync")


def test_corosync_is_not_asked_where_its_file_tells(sources: NodeSources) -> None:
    def fail() -> str:
        raise AssertionError("asked")

    configure(sources, CONF)
    assert find_announcement(replace(sources, cmap=fail)) == Announce("beta", "corosync")


def test_a_node_without_a_name_has_the_host_name_as_in_pacemaker(sources: NodeSources) -> None:
    configure(sources, CONF.replace("name: beta\n", "\n"))
    assert find_announcement(sources) == Announce("guest-7", "hostname")


@pytest.mark.parametrize("name", ["", "localhost", "two\nlines", "x" * 257])
def test_a_name_that_names_nobody_is_not_announced(sources: NodeSources, name: str) -> None:
    assert find_announcement(replace(sources, hostname=lambda: name)) is None


@pytest.mark.parametrize("text", ["", "}", "nodelist {\n node {", "nodelist {\n name: x\n}", "\0: }{\n{\n"])
def test_a_malformed_file_gives_no_nodes_with_keys(text: str) -> None:
    assert not any(parse_nodelist(text))


def test_loopback_is_local_and_documentation_addresses_are_not() -> None:
    assert is_local_address("127.0.0.1")
    assert not is_local_address("192.0.2.7")
    assert not is_local_address("2001:db8::7")
    assert not is_local_address("a-name")
