# SPDX-License-Identifier: LGPL-2.1-or-later
"""Channels as a domain's XML has them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.libvirt.plug_words import (
    ALIAS,
    VirtioChannel,
    channel_directory,
    channel_xml,
    name_problem,
    read_devices,
)
from vmchannel_host.model import PortName

PORT = PortName("org.vmchannel.0")
DIRECTORY = str(channel_directory(Path("/var/lib/libvirt/qemu/save")))


def of(*devices: str) -> tuple[VirtioChannel, ...]:
    return read_devices(f"<domain><devices>{''.join(devices)}</devices></domain>").channels


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1))
def test_a_name_of_any_kind_is_the_same_when_it_is_read_again(name: str) -> None:
    [one] = of(channel_xml(PortName(name)))
    assert (one.name, one.ours, one.usable) == (name, True, True)
    assert set(one.alias.removeprefix(ALIAS)) <= set("0123456789abcdef"), "no part of the name"


def test_a_name_is_never_markup() -> None:
    root = ElementTree.fromstring(channel_xml(PortName("x'/><source mode='bind' path='/etc/passwd'/>")))
    assert [one.tag for one in root] == ["target", "alias"]


def test_a_channel_is_found_again_by_its_own_xml_without_what_its_guest_does() -> None:
    text = (
        "<channel type='unix'><source mode='bind' path='/run/x'/>"
        f"<target type='virtio' name='{PORT}' state='connected'/><alias name='channel0'/></channel>"
    )
    [one] = of(text)
    assert (one.alias, one.ours, one.usable) == ("channel0", False, True)
    assert "state=" not in one.xml
    assert of(one.xml) == (one,)


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("<channel type='unix'><target type='virtio' name='p'/></channel>", True),
        ("<channel type='unix'><source mode='bind'/><target type='virtio' name='p'/></channel>", True),
        ("<channel type='unix'><source mode='connect'/><target type='virtio' name='p'/></channel>", False),
        (
            "<channel type='unix'><source mode='connect' path='/p'/>"
            "<target type='virtio' name='p'/></channel>",
            True,
        ),
        ("<channel type='pty'><target type='virtio' name='p'/></channel>", False),
        ("<channel type='spicevmc'><target type='virtio' name='p'/></channel>", False),
    ],
)
def test_what_can_be_served_is_a_unix_socket(text: str, usable: bool) -> None:
    assert [one.usable for one in of(text)] == [usable]


def test_other_channels_and_devices_are_no_ports() -> None:
    assert (
        of("<channel type='unix'><target type='guestfwd' port='1'/></channel>", "<channel type='x'/>") == ()
    )
    assert not read_devices("<domain><devices/></domain>").has_controller
    assert read_devices(
        "<domain><devices><controller type='virtio-serial'/></devices></domain>"
    ).has_controller


@pytest.mark.parametrize("text", ["", "<domain", "<x/>", "<!DOCTYPE x><domain/>"])
def test_what_libvirt_does_not_write_is_refused(text: str) -> None:
    with pytest.raises(HypervisorError):
        read_devices(text)


@pytest.mark.parametrize("name", ["org.vmchannel.../../x", "a/b", "a\nb", "a\0b", "a\x7fb", "\ud800"])
def test_a_name_that_would_be_more_than_a_file_is_refused(name: str) -> None:
    assert "no `/`" in name_problem(PortName(name), "vm1", DIRECTORY)


@pytest.mark.parametrize("name", ["org.vmchannel.0", "org.vmchannel.a b,c=d<&>'\"\u00fc"])
def test_a_name_that_is_a_file_is_taken(name: str) -> None:
    assert name_problem(PortName(name), "a domain of a long, long name", DIRECTORY) == ""


def test_a_name_that_leaves_no_room_in_the_sockets_path_is_refused() -> None:
    """libvirt would write it into the definition, and the domain would not start any more."""
    longest = next(n for n in range(200, 0, -1) if not name_problem(PortName("x" * n), "v" * 99, DIRECTORY))
    path = f"{DIRECTORY}/domain-9999999-{'v' * 20}/{'x' * longest}"
    assert len(path) == 107
    assert "1 bytes too long" in name_problem(PortName("x" * (longest + 1)), "v" * 99, DIRECTORY)
    assert name_problem(PortName("x" * longest), "\u4e2d" * 20, DIRECTORY), "bytes, not characters"
