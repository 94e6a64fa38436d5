# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is read from a QEMU command line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.hypervisors.cmdline import CommandLine, parse_command_line
from vmchannel_host.model import NIL_UUID

UUID = "6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11"
OTHER = "11111111-2222-4333-8444-555555555555"


def parse(*arguments: str) -> CommandLine:
    return parse_command_line(b"\0".join(argument.encode() for argument in ("qemu", *arguments)) + b"\0")


@pytest.mark.parametrize("option", ["-uuid", "--uuid"])
def test_the_uuid_is_found_after_one_dash_or_two(option: str) -> None:
    assert parse("-S", option, UUID.upper(), "-m", "64").vm_uuid == UUID


def test_an_equals_sign_is_no_uuid_option_because_qemu_refuses_it() -> None:
    assert parse(f"-uuid={UUID}").vm_uuid is None


def test_two_different_uuids_are_no_identity_and_both_are_named() -> None:
    command = parse("-uuid", UUID, "-uuid", OTHER)
    assert command.vm_uuid is None
    assert command.uuids == (UUID, OTHER)


def test_the_same_uuid_twice_is_one() -> None:
    assert parse("-uuid", UUID, "-uuid", UUID.upper()).vm_uuid == UUID


def test_no_uuid_and_a_nil_uuid_are_no_identity() -> None:
    assert parse("-name", "x").vm_uuid is None
    assert parse("-uuid", NIL_UUID).vm_uuid is None


def test_a_uuid_inside_another_argument_does_not_count() -> None:
    assert parse("-append", f"root=UUID={UUID}", "-drive", f"file=/{UUID}.img").uuids == ()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("vm1", "vm1"),
        ("guest=vm1,debug-threads=on", "vm1"),
        ("process=x,guest=vm1", "vm1"),
        ("vm1,process=x", "vm1"),
        ("guest=a,,b", "a,b"),
        ("a,,b,process=x", "a,b"),
        ("guest=line\nbreak/../x", "line\nbreak/../x"),
        ("process=x", ""),
    ],
)
def test_the_name_is_read_as_qemu_reads_it(value: str, name: str) -> None:
    assert parse("-name", value).name == name


def test_the_last_name_holds() -> None:
    assert parse("-name", "a", "-name", "guest=b").name == "b"
    assert parse("-name", "a", "-name", "process=b").name == "a"


def test_a_name_that_is_no_utf_8_can_still_be_written_down() -> None:
    command = parse_command_line(b"qemu\0-name\0vm\xff\0")
    assert command.name.encode() == rb"vm\xff"


@pytest.mark.parametrize("arguments", [("-no-reboot",), ("-action", "reboot=shutdown"), ("--no-reboot",)])
def test_no_reboot_is_seen(arguments: tuple[str, ...]) -> None:
    assert parse(*arguments).no_reboot
    assert not parse("-S").no_reboot


@pytest.mark.parametrize(
    "argument",
    [
        "file=rbd:pool/image,if=none",
        "nbd://host/export",
        "nbd+unix:///x?socket=/run/nbd",
        "file=iscsi://h/iqn/0",
        "driver=nbd,server.type=unix",
        '{"driver":"rbd","pool":"p"}',
        '{"driver": "gluster"}',
        "file=https://host/a.iso",
        "vhost-user-blk-pci,chardev=c",
        "driver=io_uring,filename=/dev/x",
        "file=nvme://0000:01:00.0/1",
        "scsi-generic,drive=d",
        "fat:,nfs://host/x",
    ],
)
def test_storage_behind_a_network_or_another_process_is_seen(argument: str) -> None:
    assert parse("-drive", argument).network_storage


@pytest.mark.parametrize(
    "argument",
    [
        "file=/srv/nbd.img,aio=io_uring",
        "file=/srv/rbd/x.qcow2",
        "unix:/run/ssh.sock,server=on",
        "virtio-blk,drive=d",
    ],
)
def test_a_local_file_with_a_telling_name_is_no_network_storage(argument: str) -> None:
    assert not parse("-drive", argument).network_storage


@pytest.mark.parametrize("argument", ["vfio-pci,host=01:00.0", "vhost-user,chardev=c", "type=vhost-vdpa"])
def test_passthrough_devices_are_seen(argument: str) -> None:
    assert parse("-device", argument).passthrough


def test_a_machine_without_cpu_is_told_apart() -> None:
    assert parse("-machine", "none,accel=kvm:tcg").no_guest
    assert parse("-M", "none").no_guest
    assert not parse("-machine", "nonesuch").no_guest


@given(st.binary(max_size=300))
def test_any_bytes_give_a_command_line(raw: bytes) -> None:
    command = parse_command_line(raw)
    command.name.encode()
    assert command.vm_uuid is None or len(command.vm_uuid) == 36


KEY = "/var/lib/libvirt/qemu/domain-{}-vm1/master-key.aes"


@pytest.mark.parametrize(
    ("arguments", "domain_id"),
    [
        (
            (
                "-object",
                '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"' + KEY.format(7) + '"}',
            ),
            7,
        ),
        (("-object", "secret,id=masterKey0,format=raw,file=" + KEY.format(12)), 12),
        (
            (
                "-object",
                '{"qom-type":"secret","id":"masterKey0","file":"/l/domain-3-a\\"b,c/master-key.aes"}',
            ),
            3,
        ),
        ((), None),
        (("-drive", "file=" + KEY.format(1)), None),
        (("-object", "secret,id=masterKey0,file=/l/domain-x-vm1/master-key.aes"), None),
        (
            (
                *("-object", "secret,id=masterKey0,file=" + KEY.format(1)),
                *("-object", "secret,id=masterKey0,file=" + KEY.format(2)),
            ),
            None,
        ),
    ],
)
def test_libvirts_number_of_the_execution_stands_in_the_path_of_its_key(
    arguments: tuple[str, ...], domain_id: int | None
) -> None:
    words = ("qemu-system-x86_64", "-name", "guest=vm1", *arguments)
    command = parse_command_line("\0".join(words).encode() + b"\0")
    assert command.domain_id == domain_id
    homes = ("/var/lib/libvirt/qemu", "/l", "")
    assert command.libvirt_home in (homes[2:] if domain_id is None else homes[:2])


def test_a_qemu_that_begins_by_receiving_memory_says_so() -> None:
    assert parse_command_line(b"qemu-system-x86_64\0-incoming\0defer\0").incoming
    assert not parse_command_line(b"qemu-system-x86_64\0-name\0incoming\0").incoming
