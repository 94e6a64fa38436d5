# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parsers of the host daemon and of `Connection.import_state`: QMP, /proc, configuration, journal, admin
API."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from fence_vmchannel.core.connection import Connection, PeerIdentity, Priority, Role
from fence_vmchannel.core.frames import FrameType
from fence_vmchannel.core.greeting import Hello, Numbers, Offer, encode_hello
from fence_vmchannel.core.saved import SavedSession, pack
from fence_vmchannel.errors import ChannelError, RemoteProtocolError
from fence_vmchannel.tlv import decode
from tests.fakes.conversation import Conversation, seeded_bytes
from tests.fakes.raw_peer import RawPeer
from tests.fuzz.target import Target
from vmchannel_host.admin.json_text import AdminRefusal, dump, parse_order, parse_plug
from vmchannel_host.admin.view import FenceOrder
from vmchannel_host.config.yaml_text import MAX_DEPTH, Value, YamlError, parse_yaml
from vmchannel_host.fencing.codec import Unreadable, read_intent, read_outcome, read_phase
from vmchannel_host.fencing.ordered import Phase
from vmchannel_host.hot_plug import PlugOrder
from vmchannel_host.hypervisors.chardev_words import Connecting
from vmchannel_host.hypervisors.cmdline import parse_command_line
from vmchannel_host.hypervisors.proc_stat import parse_stat
from vmchannel_host.hypervisors.qmp_state import (
    BadReply,
    connecting_of,
    make_port,
    migration_after_event,
    network_has_passthrough,
    parse_chardevs,
    parse_devices,
    parse_migration,
    parse_name,
    parse_run_state,
    parse_uuid,
)
from vmchannel_host.journal.chain import MAX_BODY, canonical, parse_body
from vmchannel_host.journal.types import JournalMisuse
from vmchannel_host.model import Migration, OperationId, RunState

# --- a saved session ---


def fuzz_saved(data: bytes) -> None:
    """A saved session is taken up or refused; one that is taken up works and can be saved again. The body is
    sealed here, so that the fuzzer gets past the checksum."""
    try:
        saved = decode(SavedSession, data[1:])
    except RemoteProtocolError:
        saved = None
    role = Role.HOST if data[:1] < b"\x80" else Role.GUEST
    state = data[1:] if saved is None else pack(saved)
    try:
        connection = _import(state, role)
    except RemoteProtocolError:
        return
    assert saved is not None
    _resume(RawPeer(role, connection=connection), saved)
    connection.events()
    _import(connection.export_state(), role)


def _import(state: bytes, role: Role) -> Connection:
    return Connection.import_state(state, role, PeerIdentity("boot"), random_bytes=seeded_bytes(1))


def _resume(peer: RawPeer, saved: SavedSession) -> None:
    """Greet as the peer would that this session was saved with, take all, thank for it."""
    numbers = Numbers(
        saved.session_id,
        saved.received % 2**64,
        saved.received_check % 2**32,
        saved.acknowledged % 2**64,
        saved.acknowledged_check % 2**32,
        saved.received % 2**64,
    )
    peer.sequence, peer.check = numbers.sent, numbers.sent_check
    peer.ack, peer.ack_check = numbers.received, numbers.received_check
    connection = peer.connection
    connection.link_up(peer.now)
    if peer.role is Role.HOST:
        nonce = peer.take_challenge()
        offer = Offer(0, 100, 100_000, saved.peer_boot_id or "", "")
        hello = encode_hello(Hello(numbers, offer, (1,)))
        peer.send(FrameType.HELLO, hello, epoch=nonce, ack=0, ack_check=0)
        peer.receive()
        peer.epoch = nonce
    else:
        peer.receive()
        peer.epoch = 99
        peer.send_challenge(peer.epoch)
        peer.receive()
        peer.send_welcome(peer.epoch, numbers, resumed=True)
    for _ in range(3):
        peer.send_ack()
        peer.receive()
        peer.wait(1)
    connection.handle_time(peer.now + 100)


def saved_sessions() -> tuple[bytes, ...]:
    """What two hubs in the middle of a conversation save, without the head."""
    talk = Conversation(seed=1)
    talk.connect()
    talk.run(1)
    for number, priority in enumerate(Priority):
        talk.guest.open(f"guest-{number}", priority)
        talk.host.open(f"host-{number}", priority)
    talk.run(1)
    talk.cut()
    for side in talk.applications:
        for target in list(side.by_target):
            with suppress(ChannelError):
                side.try_send(target, 300)
        side.close(next(iter(side.by_target)))
        side.open("queued")
        side.handle_events()
    head = 14
    bodies = [side.connection.export_state()[head:] for side in talk.applications]
    return b"\x00" + bodies[0], b"\xff" + bodies[1], b"\x00"


# --- QMP ---


def fuzz_qmp(data: bytes) -> None:
    """Any JSON as the answer to any question: understood, or `BadReply`."""
    try:
        reply: object = json.loads(data)
    except (ValueError, RecursionError):
        return
    parsers: tuple[Callable[[object], object], ...] = (
        parse_name,
        parse_uuid,
        parse_run_state,
        network_has_passthrough,
        lambda value: parse_devices("/machine/peripheral", value),
    )
    for parse in parsers:
        with suppress(BadReply):
            parse(reply)
    for state in (RunState.RUNNING, RunState.INMIGRATE, RunState.POSTMIGRATE, RunState.FINISH_MIGRATE):
        with suppress(BadReply):
            assert parse_migration(reply, state) in Migration
    for before in Migration:
        assert migration_after_event(reply, before, RunState.RUNNING) in Migration
    with suppress(BadReply):
        chardevs = parse_chardevs(reply, "/run", [Connecting("c", "c.sock")])
        for label, chardev in chardevs.items():
            assert chardev.path.startswith("/")
            make_port("org.vmchannel.0", label, chardevs)
        assert all(one.path.startswith("/") for one in connecting_of(chardevs))


# --- /proc ---


def fuzz_cmdline(data: bytes) -> None:
    """Any bytes are a command line; an identity is one UUID, and what is kept can be written down."""
    command = parse_command_line(data)
    assert command.vm_uuid is None or command.vm_uuid in command.uuids
    assert all(len(uuid) == 36 for uuid in command.uuids)
    assert len(command.name.encode("utf-8")) <= 4 * len(data)
    assert all(one.path for one in command.connecting)


def fuzz_stat(data: bytes) -> None:
    """/proc/PID/stat is a line of a process or refused, whatever the command is called."""
    with suppress(ValueError):
        parse_stat(data.decode("utf-8", "replace"))
    name = data.replace(b"\n", b" ").decode("utf-8", "replace")
    line = f"7 ({name}) S 1 " + " ".join(str(field) for field in range(5, 53))
    assert parse_stat(line).start_time == 22


# --- files ---


def fuzz_yaml(data: bytes) -> None:
    """A file is a tree of bounded depth, with a place for everything in it, or a `YamlError`."""
    try:
        document = parse_yaml(data)
    except YamlError:
        return
    assert _depth(document.tree) <= MAX_DEPTH
    assert all(position.line >= 1 and position.column >= 1 for position in document.values.values())
    assert all(document.key_position(fault.path).line >= 1 for fault in document.faults)


def _depth(value: Value) -> int:
    match value:
        case dict():
            return 1 + max(map(_depth, value.values()), default=0)
        case list():
            return 1 + max(map(_depth, value), default=0)
        case _:
            return 0


def fuzz_journal(data: bytes) -> None:
    """A record's body is an object or a ValueError; it has one spelling; and what it says is understood or
    `Unreadable`."""
    try:
        body = parse_body(data.decode("utf-8", "replace"))
    except ValueError:
        return
    operation = OperationId("1")
    with suppress(Unreadable):
        read_intent(operation, body, Phase.BEGUN)
    with suppress(Unreadable):
        read_outcome(operation, body)
    with suppress(Unreadable):
        read_phase(str(body.get("phase")))
    with suppress(JournalMisuse):
        text = canonical(body)
        assert len(text) <= MAX_BODY
        assert canonical(parse_body(text)) == text


def fuzz_admin(data: bytes) -> None:
    """The body of an order is an order or an `AdminRefusal` that can be sent."""
    _plug(data)
    answer = _order_or_refusal(data)
    if isinstance(answer, AdminRefusal):
        assert 400 <= answer.status < 500
        assert dump(answer.body).isascii()
        return
    order = answer
    assert len(order.request_id) == 16
    assert 0 < order.timeout_s <= 3600
    order.vm.encode("utf-8")  # it goes into the journal and into logs


def _plug(data: bytes) -> None:
    for attach in (True, False):
        order = _plug_or_refusal(data, attach=attach)
        if isinstance(order, AdminRefusal):
            assert order.status == 400
            assert dump(order.body).isascii()
            continue
        assert 0 < order.timeout_s <= 3600
        assert order.port or not attach
        (order.vm + order.port).encode("utf-8")


def _plug_or_refusal(data: bytes, *, attach: bool) -> PlugOrder | AdminRefusal:
    try:
        return parse_plug(data, "root", attach=attach)
    except AdminRefusal as refusal:
        return refusal


def _order_or_refusal(data: bytes) -> FenceOrder | AdminRefusal:
    try:
        return parse_order(data, "root")
    except AdminRefusal as refusal:
        return refusal


_INTENT: Final = (
    b'{"action":"off","begun_at":1.5,"boot_id":"b","coordinator":"hv1","end":9.0,"hosts":["hv1"],"name":"vm1",'
    b'"named":[{"boot_id":"b","executable":"/q","host":"hv1","pid":7,"start_time":9,"vm":"u"}],'
    b'"recognised":true,"request_id":"00ff","requested_at":1,"requester":null,"vm":"u"}'
)
_INTENTS: Final = (
    _INTENT,
    _INTENT.replace(b"00ff", b"0g"),
    _INTENT.replace(b'"pid":7', b'"pid":1e999'),
    _INTENT.replace(b'"start_time":9', b'"start_time":NaN'),
    b'{"phase":"starting"}',
    b'{"phase":"dreaming"}',
)
_OUTCOME: Final = (
    b'{"code":"done","evidence":["x"],"ok":true,"reason":"r","state":"off"}',
    b'{"code":"done","evidence":3,"ok":1,"reason":"r","state":"off"}',
)
_ORDER: Final = (
    b'{"request_id":"00112233445566778899aabbccddeeff","action":"off","vm":"vm1","timeout_s":40}',
    b'{"request_id":"00112233445566778899aabbccddeeff","action":"off","vm":"\\ud800","timeout_s":40}',
    b'{"request_id":"00112233445566778899aabbccddeeff","action":"off","vm":"vm1","timeout_s":1e400}',
    b'{"vm":"vm1","port":"org.vmchannel.0","timeout_s":1e3,"force":true}',
    b'{"vm":"vm1","port":null}',
    b'{"a":1,"a":2}',
    b"[" * 100_000,
    b"9" * 5_000,
)
_YAML: Final = (
    b"host: hv1\nports: {byte_limit: 1MiB}\nhypervisors:\n  - type: qmp\n    sockets: [/a, /b]\n",
    b"a: &x [*x]\n<<: {b: off}\na: 2\n? [1]\n: 2\n",
    b"- " * 40,
    b"--- a\n--- b\n",
    b"\xff\xfe",
    b"a: !!python/object:os.system x\n",
    b"'\\x00'\x00: \x85\n",
    b"%YAML 9.9\n---\na",
)
_CMDLINE: Final = (
    b"qemu-system-x86_64\0-uuid\x006f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11\0-name\0guest=vm,,1\n/x,process=q\0",
    b"qemu\0--uuid\0a\0-qmp\0unix:/run/a,,b.sock,server=on\0-blockdev\0driver=rbd\0-machine\0none\0",
    b"-name\0" + "ü\udc80".encode("utf-8", "surrogateescape") * 150,
)
_QMP: Final = (
    b'{"name": "vm1", "UUID": "6F1C1F9E-8A55-4C2E-9F0F-0D6E0A4C2D11", "status": "running", "ram": {}}',
    b'[{"name": "p", "type": "child<virtserialport>"}, {"name": 3, "type": "x"}]',
    b'[{"label": "c", "filename": "disconnected:unix:a,b/\\n,server=on", "frontend-open": true}]',
    b'[{"label": 1, "filename": "unix:,server=on"}]',
    b'"completed"',
    b"null",
    b"[[" * 50,
)

TARGETS: Final = (
    Target("saved", fuzz_saved, saved_sessions()),
    Target("qmp", fuzz_qmp, _QMP),
    Target("cmdline", fuzz_cmdline, _CMDLINE),
    Target("stat", fuzz_stat, (b"7 (qemu) S 1", b") Z 9 (", b"\n", b"7 (q) S " + b"x " * 40)),
    Target("yaml", fuzz_yaml, _YAML),
    Target("journal", fuzz_journal, (*_INTENTS, *_OUTCOME, b"[" * 100_000, b'{"a": 1e999}', b'{"a": NaN}')),
    Target("admin", fuzz_admin, _ORDER),
)
