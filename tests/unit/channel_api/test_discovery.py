# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding ports by name, from a sysfs in a directory; reading the kernel's uevents."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.discovery import (
    FoundPort,
    PortPaths,
    Uevent,
    find_port,
    holder_of,
    open_port,
    parse_uevent,
    scan_ports,
)
from fence_vmchannel.errors import LinkError, PortBusy, PortNotFound
from tests.fakes.fake_port import PtyPort, busy_opener

ADD = (
    b"add@/devices/pci0000:00/0000:00:05.0/virtio1/virtio-ports/vport1p1\0ACTION=add\0"
    b"DEVPATH=/devices/pci0000:00/0000:00:05.0/virtio1/virtio-ports/vport1p1\0SUBSYSTEM=virtio-ports\0"
    b"MAJOR=245\0MINOR=2\0DEVNAME=vport1p1\0SEQNUM=1024\0"
)


def ports_dir(tmp_path: Path, **names: str | None) -> PortPaths:
    for entry, name in names.items():
        (tmp_path / entry).mkdir()
        if name is not None:
            (tmp_path / entry / "name").write_bytes(name.encode("utf-8", "surrogateescape") + b"\n")
    return PortPaths(sysfs=str(tmp_path), dev="/dev")


def test_ports_are_found_by_their_name(tmp_path: Path) -> None:
    paths = ports_dir(tmp_path, vport0p1="org.vmchannel.0", vport0p2="org.qemu.guest_agent.0")
    assert find_port("org.vmchannel.0", paths) == FoundPort("org.vmchannel.0", "/dev/vport0p1")


def test_a_port_without_a_name_is_left_out(tmp_path: Path) -> None:
    assert scan_ports(ports_dir(tmp_path, vport0p1=None, vport0p2="x")) == [FoundPort("x", "/dev/vport0p2")]


def test_a_name_with_slashes_is_never_part_of_a_path(tmp_path: Path) -> None:
    paths = ports_dir(tmp_path, vport0p3="../../etc/passwd")
    assert find_port("../../etc/passwd", paths).node == "/dev/vport0p3"


def test_a_name_that_is_not_utf_8_does_not_hide_the_others(tmp_path: Path) -> None:
    paths = ports_dir(tmp_path, vport0p1="\udcff\udcfe", vport0p2="good")
    assert [port.name for port in scan_ports(paths)] == ["\ufffd\ufffd", "good"]


def test_a_missing_port_is_reported_with_those_that_exist(tmp_path: Path) -> None:
    paths = ports_dir(tmp_path, vport0p1="org.other.0")
    with pytest.raises(PortNotFound, match=r"no port 'org\.vmchannel\.0'; it has 'org\.other\.0'"):
        find_port("org.vmchannel.0", paths)


def test_a_machine_without_ports_says_so(tmp_path: Path) -> None:
    with pytest.raises(PortNotFound, match="none at all"):
        find_port("org.vmchannel.0", PortPaths(sysfs=str(tmp_path / "nothing")))


def test_the_holder_of_a_device_is_found(tmp_path: Path) -> None:
    port = PtyPort(tmp_path, "org.vmchannel.0")
    try:
        holder = holder_of(port.node)
        assert holder is not None
        assert holder.pid == os.getpid()
        assert "py" in holder.command
    finally:
        port.close()


def test_a_busy_port_is_reported_with_the_process_that_holds_it(tmp_path: Path) -> None:
    port = PtyPort(tmp_path, "org.vmchannel.0")
    try:
        with pytest.raises(PortBusy, match=rf"held by pid {os.getpid()} \(.+\)"):
            open_port("org.vmchannel.0", replace(port.paths, open=busy_opener()))
    finally:
        port.close()


def test_a_busy_port_whose_holder_cannot_be_seen_is_busy_all_the_same(tmp_path: Path) -> None:
    port = PtyPort(tmp_path, "org.vmchannel.0")
    try:
        with pytest.raises(PortBusy, match="may not see"):
            open_port("org.vmchannel.0", replace(port.paths, open=busy_opener(), proc=str(tmp_path)))
    finally:
        port.close()


def test_a_node_that_cannot_be_watched_is_no_port(tmp_path: Path) -> None:
    paths = replace(ports_dir(tmp_path, plain="org.vmchannel.0"), dev=str(tmp_path))
    (tmp_path / "plain" / "name").rename(tmp_path / "name")
    (tmp_path / "plain").rmdir()
    (tmp_path / "plain").write_text("a regular file", encoding="utf-8")
    (tmp_path / "sys" / "plain").mkdir(parents=True)
    (tmp_path / "name").rename(tmp_path / "sys" / "plain" / "name")
    with pytest.raises(LinkError, match="cannot be watched"):
        open_port("org.vmchannel.0", replace(paths, sysfs=str(tmp_path / "sys")))


def test_a_uevent_of_the_kernel_is_read() -> None:
    assert parse_uevent(ADD) == Uevent("add", "virtio-ports", "vport1p1")


def test_udevs_own_messages_are_not_the_kernels() -> None:
    assert parse_uevent(b"libudev\0\xfe\xed\xca\xfe" + bytes(40)) is None


@given(st.binary(max_size=300))
def test_any_datagram_is_read_without_an_error(datagram: bytes) -> None:
    event = parse_uevent(datagram)
    assert event is None or datagram.split(b"@")[0].decode("utf-8", "replace") == event.action


@given(st.integers(0, len(ADD)))
def test_a_uevent_cut_anywhere_is_read_without_an_error(length: int) -> None:
    event = parse_uevent(ADD[:length])
    assert event is None or event.action == "add"
