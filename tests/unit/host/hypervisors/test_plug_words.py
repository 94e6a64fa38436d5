# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ids, sockets and slots for ports that are plugged in."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.hypervisors.plug_words import (
    MAX_PATH,
    backend_of,
    free_id,
    is_ours,
    parse_buses,
    parse_empty_slots,
    port_id,
    socket_path,
    start_arguments,
)
from vmchannel_host.hypervisors.qmp_state import NAMED, UNNAMED, BadReply, Device
from vmchannel_host.model import PortName, VmUuid

VM = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
PORT = PortName("org.vmchannel.0")


@given(st.text(min_size=1))
def test_whatever_a_port_is_called_its_id_and_its_path_are_plain_and_short(name: str) -> None:
    ident, path = port_id(PortName(name)), socket_path("/run/vmchannel/ports", VM, PortName(name))
    assert ident.replace("-", "").isalnum()
    assert path.startswith(f"/run/vmchannel/ports/{VM}.")
    assert path.count("/") == 4
    assert len(path) <= MAX_PATH
    assert is_ours(Device(f"{NAMED}/{ident}", "child<virtserialport>"))


@given(st.text(), st.text())
def test_two_names_have_two_ids(one: str, other: str) -> None:
    assert (port_id(PortName(one)) == port_id(PortName(other))) == (one == other)


@pytest.mark.parametrize("path", [f"{NAMED}/vport0", f"{NAMED}/vmchannel", f"{UNNAMED}/vmchannel-port-1"])
def test_a_port_with_another_id_or_without_one_is_not_ours(path: str) -> None:
    assert not is_ours(Device(path, "child<virtserialport>"))


def test_the_bus_of_a_controller_is_behind_its_proxy_where_it_has_one() -> None:
    pci, mmio, disk = (
        Device(f"{NAMED}/s", f"child<{kind}>")
        for kind in ("virtio-serial-pci", "virtio-serial-device", "virtio-blk-pci")
    )
    assert (backend_of(pci), backend_of(mmio), backend_of(disk)) == (
        f"{NAMED}/s/virtio-backend",
        f"{NAMED}/s",
        "",
    )


def test_buses_are_read_and_everything_else_is_passed_by() -> None:
    reply = [{"name": "s.0", "type": "child<virtio-serial-bus>"}, {"name": "max_ports", "type": "uint32"}, 7]
    assert parse_buses(reply) == ("s.0",)


def test_slots_are_the_empty_bridges_that_have_an_id_at_any_depth() -> None:
    def bridge(name: str, *devices: object) -> dict[str, object]:
        return {"qdev_id": name, "pci_bridge": {"devices": list(devices)}}

    disk: object = {"qdev_id": "disk"}
    untold: object = {"qdev_id": "root-port", "pci_bridge": {"bus": "its numbers"}}
    devices = [disk, bridge("full", disk), bridge(""), bridge("a", bridge("b")), untold]
    assert parse_empty_slots([{"bus": 0, "devices": devices}]) == ("b", "root-port")


@pytest.mark.parametrize("reply", [None, {}, "x"])
def test_a_reply_of_another_form_is_not_believed(reply: object) -> None:
    with pytest.raises(BadReply):
        parse_buses(reply)
    with pytest.raises(BadReply):
        parse_empty_slots(reply)


def test_a_further_controller_gets_an_id_that_is_free() -> None:
    devices = [Device(f"{NAMED}/{name}", "child<virtio-serial-pci>") for name in ("vmchannel-serial", "x")]
    assert (free_id(devices[1:]), free_id(devices)) == ("vmchannel-serial", "vmchannel-serial-2")


def test_the_arguments_for_the_next_start_can_be_copied_into_a_shell() -> None:
    said = start_arguments(PORT, "/run/a, b/qmp", controller=True)
    assert shlex.split(said) == [
        *("-device", "virtio-serial"),
        *("-chardev", "socket,id=vmchannel,path=/run/a,, b/qmp,server=on,wait=off"),
        *("-device", "virtserialport,chardev=vmchannel,name=org.vmchannel.0,id=vmchannel"),
    ]
    assert "virtio-serial" not in start_arguments(PORT, "/q", controller=False)


def test_a_port_that_comes_from_the_told_arguments_is_the_vms_own_and_not_ours() -> None:
    words = shlex.split(start_arguments(PortName("org.vmchannel.7"), "/q", controller=False))
    ident = words[-1].rpartition("id=")[2]
    assert not is_ours(Device(f"{NAMED}/{ident}", "child<virtserialport>"))
