# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's words, each with what it means here; hostile XML; saved memory on the disk."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.libvirt import words
from vmchannel_host.hypervisors.libvirt.saved import read_saved_memory
from vmchannel_host.hypervisors.libvirt.words import DomainRecord
from vmchannel_host.model import Migration, RunState, SocketMode, VmUuid

UUID = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")


def record(state: int, reason: int = 0) -> DomainRecord:
    return DomainRecord(UUID, "vm1", 7, state, reason)


@pytest.mark.parametrize(
    ("state", "reason", "run_state", "part"),
    [
        (0, 0, RunState.UNKNOWN, Migration.NONE),  # no state
        (1, 1, RunState.RUNNING, Migration.NONE),
        (1, 11, RunState.RUNNING, Migration.INCOMING),  # post-copy
        (1, 12, RunState.RUNNING, Migration.INCOMING),  # post-copy failed
        (1, 99, RunState.RUNNING, Migration.NONE),
        (2, 0, RunState.PAUSED, Migration.NONE),  # blocked
        (3, 1, RunState.PAUSED, Migration.NONE),
        (3, 2, RunState.FINISH_MIGRATE, Migration.OUTGOING),
        (3, 3, RunState.SAVE_VM, Migration.OUTGOING),
        (3, 4, RunState.SAVE_VM, Migration.NONE),
        (3, 5, RunState.IO_ERROR, Migration.NONE),
        (3, 6, RunState.WATCHDOG, Migration.NONE),
        (3, 7, RunState.RESTORE_VM, Migration.NONE),
        (3, 8, RunState.SHUTDOWN, Migration.NONE),
        (3, 9, RunState.SAVE_VM, Migration.NONE),
        (3, 10, RunState.GUEST_PANICKED, Migration.NONE),
        (3, 11, RunState.PRELAUNCH, Migration.NONE),
        (3, 12, RunState.FINISH_MIGRATE, Migration.OUTGOING),  # post-copy: the other end runs
        (3, 13, RunState.FINISH_MIGRATE, Migration.OUTGOING),
        (3, 99, RunState.PAUSED, Migration.NONE),
        (4, 1, RunState.SHUTDOWN, Migration.NONE),  # in shutdown
        (5, 0, RunState.UNKNOWN, Migration.NONE),  # shut off, says libvirt
        (6, 0, RunState.GUEST_PANICKED, Migration.NONE),  # crashed
        (7, 0, RunState.SUSPENDED, Migration.NONE),  # pmsuspended
        (99, 0, RunState.UNKNOWN, Migration.NONE),
    ],
)
def test_every_state_of_libvirts_is_a_run_state_and_none_is_off(
    state: int, reason: int, run_state: RunState, part: Migration
) -> None:
    assert words.run_state(record(state, reason)) is run_state
    assert words.migration(record(state, reason), None, receives=False) is part


@pytest.mark.parametrize(
    ("job", "part"),
    [
        (1, Migration.NONE),  # start
        (2, Migration.OUTGOING),  # save
        (3, Migration.INCOMING),  # restore
        (4, Migration.INCOMING),
        (5, Migration.OUTGOING),
        (6, Migration.NONE),  # snapshot
        (8, Migration.NONE),  # dump
        (9, Migration.NONE),  # backup
    ],
)
def test_a_job_tells_the_part_in_a_migration(job: int, part: Migration) -> None:
    assert words.migration(record(1, 1), job, receives=False) is part


def test_a_process_that_was_started_to_receive_does_so_until_it_runs() -> None:
    for state, reason in ((3, 2), (3, 11), (0, 0), (5, 0)):
        assert words.migration(record(state, reason), None, receives=True) is Migration.INCOMING
    assert words.migration(record(1, 2), None, receives=True) is Migration.NONE


@pytest.mark.parametrize(
    ("status", "before", "after"),
    [
        ("setup", Migration.NONE, Migration.OUTGOING),
        ("completed", Migration.OUTGOING, Migration.OUTGOING),  # a save into a file completes too
        ("active", Migration.INCOMING, Migration.INCOMING),
        ("failed", Migration.OUTGOING, Migration.OUTGOING),  # until libvirt says that it runs
        (None, Migration.NONE, Migration.NONE),
        (7, Migration.NONE, Migration.NONE),
    ],
)
def test_a_migration_event_is_taken_at_its_word_where_that_is_worse(
    status: object, before: Migration, after: Migration
) -> None:
    assert words.migration_after_event(status, before) is after


def channel(source: str, target: str) -> str:
    return f"<domain><devices><channel type='unix'>{source}{target}</channel></devices></domain>"


SOURCE = "<source mode='bind' path='/run/a.sock'/>"


def test_channels_are_ports_by_their_target_names() -> None:
    target = "<target type='virtio' name='org.vmchannel.0' state='connected'/><alias name='channel0'/>"
    (found,) = words.read_domain_xml(channel(SOURCE, target)).channels
    assert (found.alias, found.port.name, found.port.chardev_path, found.port.guest_open) == (
        "channel0",
        "org.vmchannel.0",
        "/run/a.sock",
        True,
    )


@pytest.mark.parametrize(
    ("inside", "again"),
    [("", False), ("<reconnect enabled='no'/>", False), ("<reconnect enabled='yes' timeout='1'/>", True)],
)
def test_a_channel_whose_qemu_connects_tells_whether_it_does_so_again(inside: str, again: bool) -> None:
    source = f"<source mode='connect' path='/run/a.sock'>{inside}</source>"
    (found,) = words.read_domain_xml(channel(source, "<target type='virtio' name='a'/>")).channels
    assert (found.port.chardev_path, found.port.mode) == ("/run/a.sock", SocketMode.CONNECT)
    assert found.port.reconnects == again


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("", "<target type='virtio' name='a'/>"),
        (SOURCE, ""),
        (SOURCE, "<target type='guestfwd' address='10.0.2.1' port='1'/>"),
        (SOURCE, "<target type='virtio'/>"),
        ("<source mode='bind' path='relative'/>", "<target type='virtio' name='a'/>"),
        ("<source mode='connect' path='a'/>", "<target type='virtio' name='a'/>"),
        ("<source mode='other' path='/run/a'/>", "<target type='virtio' name='a'/>"),
        ("<source path='/run/a'/>", "<target type='virtio' name='a'/>"),
        ("<source mode='bind'/>", "<target type='virtio' name='a'/>"),
    ],
)
def test_what_is_no_port_of_ours_is_left_alone(source: str, target: str) -> None:
    assert words.read_domain_xml(channel(source, target)).channels == ()


BOMB = "<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><domain>&b;</domain>"


@pytest.mark.parametrize(
    "text", ["", "<domain>", "<capabilities/>", BOMB, "\0", "<domain/>" * 2, "<domain>\ud800"]
)
def test_xml_that_is_no_domains_is_an_error_and_nothing_else(text: str) -> None:
    with pytest.raises(HypervisorError):
        words.read_domain_xml(text)


def test_xml_without_bound_is_refused() -> None:
    with pytest.raises(HypervisorError, match="longer than"):
        words.read_domain_xml("<domain>" + " " * words.MAX_XML + "</domain>")
    many = "".join(
        f"<channel type='unix'><source mode='bind' path='/{n}'/><target type='virtio' name='p{n}'/></channel>"
        for n in range(words.MAX_PORTS + 5)
    )
    found = words.read_domain_xml(f"<domain><devices>{many}</devices></domain>")
    assert len(found.channels) == words.MAX_PORTS


@pytest.mark.parametrize(
    ("device", "resettable"),
    [
        ("", True),
        ("<hostdev mode='subsystem' type='pci'/>", False),
        ("<interface type='network'/>", True),
        ("<interface type='vhostuser'/>", False),
        ("<interface type='vdpa'/>", False),
        ("<disk type='vhostuser'/>", False),
        ("<filesystem type='mount'/>", False),
    ],
)
def test_a_reset_proves_nothing_where_a_device_keeps_state(device: str, resettable: bool) -> None:
    text = f"<domain><devices>{device}</devices></domain>"
    assert words.read_domain_xml(text).resettable is resettable


def image(directory: Path, name: str, xml: str, magic: bytes = b"LibvirtQemudSave") -> None:
    text = xml.encode() + b"\0"
    (directory / name).write_bytes(struct.pack("16s19I", magic, 2, len(text), *[0] * 17) + text + b"memory")


def test_saved_memory_is_whose_xml_it_holds_whatever_its_file_is_called(tmp_path: Path) -> None:
    image(tmp_path, "other.save", f"<domain><name>vm1</name><uuid>{UUID.upper()}</uuid></domain>")
    image(tmp_path, "notes.txt", "")
    saved = read_saved_memory(tmp_path)
    assert saved.vm_uuids == {UUID}
    assert saved.problem == ""
    part = f"<domain><metadata><x xmlns='y'><uuid>z</uuid></x></metadata><uuid>{UUID}</uuid></domain>"
    image(tmp_path, "other.save", part, b"LibvirtQemudPart")
    assert read_saved_memory(tmp_path).vm_uuids == {UUID}


@pytest.mark.parametrize("bad", ["short", "magic", "xml", "uuid", "length", "link"])
def test_an_image_that_cannot_be_read_may_be_anyones(tmp_path: Path, bad: str) -> None:
    image(tmp_path, "good.save", f"<domain><uuid>{UUID}</uuid></domain>")
    match bad:
        case "short":
            (tmp_path / "a.save").write_bytes(b"Libvirt")
        case "magic":
            image(tmp_path, "a.save", "<domain/>", b"somebody else's.")
        case "xml":
            image(tmp_path, "a.save", "<domain>")
        case "uuid":
            image(tmp_path, "a.save", "<domain><uuid>x</uuid></domain>")
        case "length":
            (tmp_path / "a.save").write_bytes(struct.pack("16s19I", b"LibvirtQemudSave", 2, 2**31, *[0] * 17))
        case _:
            (tmp_path / "a.save").symlink_to("good.save")
    saved = read_saved_memory(tmp_path)
    assert saved.vm_uuids == {UUID}
    assert "a.save" in saved.problem


def test_a_directory_that_is_not_there_tells_nothing(tmp_path: Path) -> None:
    assert read_saved_memory(tmp_path / "none").problem
