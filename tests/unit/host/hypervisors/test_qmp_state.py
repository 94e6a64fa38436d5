# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is read from QMP replies. The replies are those of QEMU 7.2, shortened."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.hypervisors.chardev_words import Connecting
from vmchannel_host.hypervisors.qmp_state import (
    BadReply,
    Chardev,
    Device,
    connecting_of,
    make_port,
    migration_after_event,
    network_has_passthrough,
    parse_chardevs,
    parse_devices,
    parse_migration,
    parse_run_state,
    parse_uuid,
)
from vmchannel_host.model import Migration, Port, PortName, RunState, SocketMode

SOURCE = {"ram": {"total": 1}}


@pytest.mark.parametrize("state", [state for state in RunState if state is not RunState.UNKNOWN])
def test_every_run_state_is_read(state: RunState) -> None:
    assert parse_run_state({"status": state.value}) is state


def test_a_run_state_of_a_later_qemu_is_unknown() -> None:
    assert parse_run_state({"status": "levitating"}) is RunState.UNKNOWN


@pytest.mark.parametrize(
    ("info", "run_state", "expected"),
    [
        ({}, RunState.RUNNING, Migration.NONE),
        ({"status": "setup"}, RunState.RUNNING, Migration.OUTGOING),
        ({"status": "active", **SOURCE}, RunState.RUNNING, Migration.OUTGOING),
        ({"status": "active"}, RunState.INMIGRATE, Migration.INCOMING),
        ({}, RunState.INMIGRATE, Migration.INCOMING),
        ({"status": "postcopy-active"}, RunState.RUNNING, Migration.INCOMING),
        ({"status": "postcopy-active", **SOURCE}, RunState.FINISH_MIGRATE, Migration.OUTGOING),
        ({"status": "pre-switchover", **SOURCE}, RunState.FINISH_MIGRATE, Migration.OUTGOING),
        ({"status": "cancelling", **SOURCE}, RunState.RUNNING, Migration.OUTGOING),
        ({"status": "cancelled"}, RunState.RUNNING, Migration.NONE),
        ({"status": "cancelled"}, RunState.POSTMIGRATE, Migration.COMPLETED),
        ({"status": "failed"}, RunState.RUNNING, Migration.NONE),
        ({"status": "failed"}, RunState.FINISH_MIGRATE, Migration.OUTGOING),
        ({"status": "completed", **SOURCE}, RunState.POSTMIGRATE, Migration.COMPLETED),
        ({"status": "completed", **SOURCE}, RunState.PRELAUNCH, Migration.COMPLETED),
        ({"status": "completed", **SOURCE}, RunState.RUNNING, Migration.COMPLETED),
        ({"status": "completed"}, RunState.RUNNING, Migration.NONE),
        ({"status": "completed"}, RunState.PAUSED, Migration.NONE),
        ({"status": "invented", **SOURCE}, RunState.RUNNING, Migration.OUTGOING),
        ({"status": "invented"}, RunState.RUNNING, Migration.INCOMING),
    ],
)
def test_the_part_in_a_migration_follows_from_status_and_run_state(
    info: dict[str, object], run_state: RunState, expected: Migration
) -> None:
    assert parse_migration(info, run_state) is expected


@pytest.mark.parametrize("status", ["setup", "active", "device", "postcopy-active", "cancelling", "invented"])
def test_an_event_of_an_active_migration_makes_a_source(status: str) -> None:
    assert migration_after_event(status, Migration.NONE, RunState.RUNNING) is Migration.OUTGOING


def test_the_completed_event_counts_at_once_and_is_not_taken_back_by_events() -> None:
    assert migration_after_event("completed", Migration.OUTGOING, RunState.RUNNING) is Migration.COMPLETED
    for status in ("failed", "cancelled", "active", None, 7):
        assert migration_after_event(status, Migration.COMPLETED, RunState.RUNNING) is Migration.COMPLETED


def test_a_destination_does_not_become_a_source_by_its_own_events() -> None:
    assert migration_after_event("completed", Migration.INCOMING, RunState.INMIGRATE) is Migration.INCOMING
    assert migration_after_event("active", Migration.UNKNOWN, RunState.INMIGRATE) is Migration.UNKNOWN


def test_chardevs_are_unix_sockets_whatever_is_in_their_names() -> None:
    reply = [
        {"label": "a", "filename": "disconnected:unix:/run/p0.sock,server=on", "frontend-open": False},
        {"label": "b", "filename": "unix:/run/p,1.sock,server=on", "frontend-open": True},
        {"label": "c", "filename": "unix:relative.sock,server=on", "frontend-open": False},
        {"label": "d", "filename": "disconnected:unix:/run/dialled.sock", "frontend-open": False},
        {"label": "e", "filename": "disconnected:tcp:127.0.0.1:1,server=on", "frontend-open": False},
        {"label": "f", "filename": "disconnected:unix:name,abstract=on,server=on", "frontend-open": False},
        {"label": "g", "filename": "file", "frontend-open": True},
        {"label": "h", "filename": "disconnected:unix:name,abstract=on", "frontend-open": False},
        {"label": "i", "filename": "unix:", "frontend-open": True},
        {"label": "j", "filename": "disconnected:unix:", "frontend-open": True},
        {"label": "k", "filename": "unix:,server=on", "frontend-open": True},
    ]
    assert parse_chardevs(reply, "/srv/vm") == {
        "a": Chardev("/run/p0.sock", guest_open=False),
        "b": Chardev("/run/p,1.sock", guest_open=True),
        "c": Chardev("/srv/vm/relative.sock", guest_open=False),
        "d": Chardev("/run/dialled.sock", guest_open=False, mode=SocketMode.CONNECT),
    }


def test_a_chardev_that_has_connected_is_where_it_was_last_known_to_connect() -> None:
    known = [Connecting("a", "a.sock", reconnects=False), Connecting("b", "/run/b.sock")]
    connected = [{"label": one, "filename": "unix:", "frontend-open": True} for one in ("a", "b", "c")]
    found = parse_chardevs(connected, "/srv", known)
    assert found == {
        "a": Chardev("/srv/a.sock", guest_open=True, mode=SocketMode.CONNECT, reconnects=False),
        "b": Chardev("/run/b.sock", guest_open=True, mode=SocketMode.CONNECT),
    }
    assert parse_chardevs(connected, "/elsewhere", connecting_of(found)) == found
    away = [{"label": "b", "filename": "disconnected:unix:/run/new.sock", "frontend-open": False}]
    assert connecting_of(parse_chardevs(away, "/srv", known)) == (Connecting("b", "/run/new.sock"),)


def test_a_port_needs_a_name_and_a_chardev_we_can_use() -> None:
    chardevs = {"c": Chardev("/p", guest_open=True)}
    assert make_port("org.vmchannel.0", "c", chardevs) == Port(
        PortName("org.vmchannel.0"), "/p", guest_open=True
    )
    assert make_port("", "c", chardevs) is None
    assert make_port("org.vmchannel.0", "x", chardevs) is None
    assert make_port("org.vmchannel.0", None, chardevs) is None


def test_devices_tell_ports_and_passthrough() -> None:
    reply = [
        {"name": "type", "type": "string"},
        {"name": "port0", "type": "child<virtserialport>"},
        {"name": "device[0]", "type": "child<vfio-pci>"},
        {"name": "device[1]", "type": "child<vhost-user-blk-pci>"},
        {"name": "device[2]", "type": "child<virtio-net-pci>"},
    ]
    devices = parse_devices("/machine/peripheral", reply)
    assert [device.path for device in devices if device.is_serial_port] == ["/machine/peripheral/port0"]
    assert [device.type for device in devices if device.is_passthrough] == [
        "child<vfio-pci>",
        "child<vhost-user-blk-pci>",
    ]


def test_devices_tell_whether_events_can_name_them() -> None:
    assert Device("/machine/peripheral/port0", "child<virtserialport>").has_id
    assert not Device("/machine/peripheral-anon/device[3]", "child<virtserialport>").has_id


def test_a_vhost_user_backend_is_seen_and_an_unknown_answer_counts_as_one() -> None:
    assert network_has_passthrough("net0: index=0,type=vhost-user,chardev=c")
    assert network_has_passthrough(None)
    assert not network_has_passthrough("e: index=0,type=nic,model=e1000")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["status", "UUID", "label", "filename", "name", "type", "ram"]), inner
        )
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_reply_is_understood_or_refused(reply: object) -> None:
    parsers: tuple[Callable[[object], object], ...] = (
        parse_uuid,
        parse_run_state,
        lambda value: parse_migration(value, RunState.RUNNING),
        lambda value: parse_chardevs(value, "/"),
        lambda value: parse_devices("/machine", value),
    )
    for parse in parsers:
        try:
            parse(reply)
        except BadReply:
            continue
