# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal stores, gives back, refuses and fails closed."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.host.journal_rig import BOOT, HOST, OP1, OP2, VM1, VM2, JournalRig, ended, process
from vmchannel_host.journal.tables import MAX_BOOTS
from vmchannel_host.journal.types import (
    JournalBusy,
    JournalCorrupt,
    JournalDamaged,
    JournalError,
    JournalLocked,
    JournalMisuse,
    KnownInstance,
    StoredAlias,
    StoredRequest,
)
from vmchannel_host.model import (
    NO_NAMESPACE,
    EndCause,
    InstanceEnded,
    IoState,
    Migration,
    OperationId,
    PidNamespace,
)
from vmchannel_host.registry.registry import VmRegistry

LOOSE: list[tuple[Callable[[JournalRig], object], str]] = [
    (lambda rig: rig.key.chmod(0o640), "others may read the key"),
    (lambda rig: rig.path.chmod(0o644), "others may read the journal"),
    (lambda rig: rig.directory.chmod(0o777), "others may write"),
]

DAMAGES: list[tuple[Callable[[JournalRig], object], str]] = [
    (lambda rig: rig.path.write_bytes(b""), "not a journal"),
    (lambda rig: rig.path.write_bytes(b"garbage" * 1000), "damaged"),
    (lambda rig: os.truncate(rig.path, rig.path.stat().st_size // 2), "damaged"),
    (lambda rig: rig.path.unlink(), "missing"),
    (lambda rig: rig.key.unlink(), "key is missing"),
    (lambda rig: rig.key.write_text("-----BEGIN nothing"), "not a private key"),
    (lambda rig: rig.tamper("UPDATE meta SET value = '2' WHERE key = 'schema'"), "schema 2"),
    (lambda rig: rig.tamper("DELETE FROM meta"), "schema None"),
]


@pytest.fixture
def rig(tmp_path: Path) -> JournalRig:
    return JournalRig(tmp_path / "state")


# the chain
async def test_records_of_an_operation_come_back_in_their_order(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        assert await journal.append("fence.intent", OP1, {"action": "off", "vm": VM1}) == 1
        assert await journal.append("fence.intent", OP2, {}) == 2
        assert await journal.append("fence.outcome", OP1, {"ok": True, "evidence": ["pidfd"]}) == 3
        records = await journal.operation(OP1)
    assert [(r.seq, r.kind, r.body) for r in records] == [
        (1, "fence.intent", {"action": "off", "vm": VM1}),
        (3, "fence.outcome", {"ok": True, "evidence": ["pidfd"]}),
    ]
    assert (records[0].at, records[0].boottime, records[0].boot_id) == (rig.clock.now, 100.0, BOOT)


async def test_the_latest_operations_come_first(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.append("fence.intent", OP1, {"n": 1})
        await journal.append("fence.intent", OP2, {"n": 2})
        await journal.append("host.note", OperationId(""), {"n": 3})
        await journal.append("fence.outcome", OP1, {"n": 4})
        rows = await journal.operations(10)
        newest = await journal.operations(1)
    assert [(row.operation, row.records, row.first.seq, row.last.seq) for row in rows] == [
        (OP1, 2, 1, 4),
        (OP2, 1, 2, 2),
    ]
    assert [row.operation for row in newest] == [OP1]


async def test_an_unknown_operation_has_no_records(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.append("host.note", OperationId(""), {})
        assert await journal.operation(OP1) == []
        assert await journal.operation(OperationId("")) == []


async def test_the_chain_goes_on_after_a_restart(rig: JournalRig) -> None:
    await rig.filled(3)
    async with rig.opened() as journal:
        assert await journal.append("fence.intent", OP1, {}) == 4
        result = await journal.verify()
    assert (result.ok, result.records) == (True, 4)


async def test_many_calls_at_once_are_all_stored_in_the_order_of_their_making(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        numbers = await asyncio.gather(*(journal.append("host.note", OP1, {"n": n}) for n in range(200)))
        records = await journal.operation(OP1)
        assert (await journal.verify()).ok
    assert numbers == list(range(1, 201))
    assert [record.body["n"] for record in records] == list(range(200))


async def test_a_call_that_is_refused_takes_nothing_of_its_neighbours_with_it(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        results = await asyncio.gather(
            journal.append("host.note", OP1, {"n": 1}),
            journal.append("host.note", OP1, {"n": float("nan")}),
            journal.append("no kind!", OP1, {}),
            journal.append("host.note", OperationId("a b"), {}),
            journal.append("host.note", OP1, {"n": 2}),
            return_exceptions=True,
        )
        assert (await journal.verify()).records == 2
    assert [type(result) for result in results] == [int, JournalMisuse, JournalMisuse, JournalMisuse, int]


async def test_pruning_cuts_no_operation_in_two(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.append("host.note", OperationId(""), {})
        await journal.append("fence.intent", OP1, {})
        rig.clock.now += 100
        await journal.append("fence.outcome", OP1, {})
        assert await journal.prune(50) == 1
        assert [row.records for row in await journal.operations()] == [2]
        assert (await journal.verify()).ok
        rig.clock.now += 100
        assert await journal.prune(50) == 3  # with the first checkpoint's own record
        assert await journal.operations() == []
        assert await journal.prune(50) == 0
        result = await journal.verify()
    assert (result.ok, result.first_seq) == (True, 5)


async def test_a_large_prune_is_done_in_parts(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await asyncio.gather(*(journal.append("host.note", OP1, {}) for _ in range(10)))
        for start in range(0, 4500, 500):
            await asyncio.gather(
                *(journal.append("host.note", OperationId(f"o{start + n}"), {}) for n in range(500))
            )
        rig.clock.now += 100
        assert await journal.prune(50) >= 4509
        assert (await journal.verify()).ok


# instances
async def test_a_process_is_remembered_across_restarts_until_its_end_is_proven(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.remember_instance(process(), "vm1", HOST)
    rig.clock.now += 5
    async with rig.opened() as journal:
        assert await journal.known_instances() == [
            KnownInstance(HOST, process(), "vm1", Migration.NONE, rig.clock.now - 5, None, None)
        ]
        await journal.remember_end(ended(process()))
    async with rig.opened() as journal:
        [known] = await journal.known_instances(VM1)
        assert (known.end, known.ended_at) == (ended(process()), rig.clock.now)
        assert await journal.known_instances(VM2) == []


async def test_seeing_a_process_again_updates_it_and_does_not_bring_it_back_to_life(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.remember_instance(process(), "old", HOST)
        await journal.remember_end(ended(process()))
        await journal.remember_instance(process(), "new", HOST, migration=Migration.OUTGOING)
        [known] = await journal.known_instances()
        assert (known.name, known.migration, known.end) == ("new", Migration.OUTGOING, ended(process()))


async def test_the_namespace_of_a_pid_is_remembered_with_it(rig: JournalRig) -> None:
    seen = replace(process(), pid_namespace=PidNamespace(4026532178))
    async with rig.opened() as journal:
        await journal.remember_instance(seen, "vm1", HOST)
    async with rig.opened() as journal:
        [known] = await journal.known_instances()
    assert known.identity.pid_namespace == 4026532178


async def test_a_journal_without_namespaces_opens_and_learns_them(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.remember_instance(process(), "vm1", HOST)
    for column in ("pid_namespace", "confirmed_by"):
        rig.tamper(f"ALTER TABLE instances DROP COLUMN {column}")
    async with rig.opened() as journal:
        [known] = await journal.known_instances()
        assert known.identity.pid_namespace == NO_NAMESPACE
        seen = replace(process(), pid_namespace=PidNamespace(4026531836))
        await journal.remember_instance(seen, "vm1", HOST)
        [known] = await journal.known_instances()
        assert known.identity.pid_namespace == 4026531836
        assert (await journal.verify()).ok


async def test_the_same_news_again_writes_nothing(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        for _ in range(3):
            await journal.remember_instance(process(), "vm1", HOST)
            await journal.remember_end(ended(process()))
            await journal.remember_alias(VM1, "node1", "corosync", 1.0, False)
        assert (await journal.verify()).records == 3


async def test_a_second_proof_settles_the_io_and_never_takes_a_departure_back(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.remember_end(ended(process(), io=IoState.UNPROVEN, departed=True))
        await journal.remember_end(ended(process(), io=IoState.SETTLED, departed=False))
        await journal.remember_end(ended(process(), io=IoState.UNPROVEN, departed=False))
        [known] = await journal.known_instances()
    assert known.end is not None
    assert (known.end.io, known.end.departed) == (IoState.SETTLED, True)


async def test_a_kill_is_remembered_once_whatever_else_is_learnt(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.remember_instance(process(), "vm1", HOST)
        await journal.remember_instance(process(4712, VM2), "vm2", HOST)
        for _ in range(2):
            await journal.remember_kill(process(), HOST)
        await journal.remember_instance(process(), "new", HOST)
    async with rig.opened() as journal:
        await journal.remember_end(ended(process()))
        assert [(one.killed, one.name) for one in await journal.known_instances()] == [
            (True, "new"),
            (False, "vm2"),
        ]
        result = await journal.verify()
        assert (result.ok, result.records) == (True, 4)


async def test_a_kill_of_a_process_never_seen_is_remembered_too(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.remember_kill(process(), HOST)
        [known] = await journal.known_instances()
        assert (known.identity, known.killed, known.end) == (process(), True, None)


async def test_an_operators_word_covers_the_ends_that_are_stored_and_is_signed(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        for pid, vm in ((1, VM1), (2, VM1), (3, VM2)):
            await journal.remember_instance(process(pid, vm), "", HOST)
        await journal.remember_end(ended(process(1, VM1)))
        await journal.remember_end(ended(process(3, VM2)))
        await journal.remember_confirmed(VM1, "ali\udce9")
        await journal.remember_end(ended(process(2, VM1)))
    async with rig.opened() as journal:
        known = await journal.known_instances()
        assert [one.confirmed_by for one in known] == ["ali\udce9", "", ""]
        await journal.remember_confirmed(VM1, "bob")
        assert [one.confirmed_by for one in await journal.known_instances()] == ["ali\udce9", "bob", ""]
        result = await journal.verify()
        assert (result.ok, result.records) == (True, 8)


async def test_a_process_with_another_start_time_is_another_instance(rig: JournalRig) -> None:
    later = type(process())(4711, 999, "/usr/bin/qemu-system-x86_64", VM1, BOOT)
    async with rig.opened() as journal:
        await journal.remember_instance(process(), "vm1", HOST)
        await journal.remember_end(ended(process()))
        await journal.remember_instance(later, "vm1", HOST)
        assert [known.end is None for known in await journal.known_instances()] == [False, True]


@pytest.mark.parametrize("text", ["caf\udce9", "a\x00b", "x" * 3000, "\U0001f600\n,/"])
async def test_any_path_or_name_comes_back_the_same(rig: JournalRig, text: str) -> None:
    async with rig.opened() as journal:
        await journal.remember_instance(process(executable="/" + text), text, HOST)
        await journal.remember_instance(process(executable="/" + text), text, HOST)
        [known] = await journal.known_instances()
        assert (await journal.verify()).records == 1
    assert (known.identity.executable, known.name) == ("/" + text, text)


async def test_pruning_removes_old_ends_of_a_vm_that_was_seen_to_live_since_and_nothing_else(
    rig: JournalRig,
) -> None:
    async with rig.opened() as journal:
        for pid, vm in ((1, VM1), (2, VM1), (3, VM2)):
            await journal.remember_instance(process(pid, vm), "", HOST)
        for pid, vm in ((2, VM1), (3, VM2)):
            await journal.remember_end(ended(process(pid, vm)))
        rig.clock.now += 1000
        await journal.prune(1)
        assert [known.identity.pid for known in await journal.known_instances()] == [1, 2, 3]
        await journal.remember_instance(process(4, VM1), "", HOST)
        await journal.prune(1)
        assert [known.identity.pid for known in await journal.known_instances()] == [1, 3, 4]
        await journal.remember_end(ended(process(1, VM1)))
        rig.clock.now += 1000
        await journal.prune(1)
        assert [known.identity.pid for known in await journal.known_instances()] == [1, 3, 4]


UNRESOLVED = [
    pytest.param(ended(process(), departed=True), id="departed"),
    pytest.param(
        replace(ended(process(), io=IoState.UNPROVEN), cause=EndCause.KILL), id="killed with writes under way"
    ),
]


@pytest.mark.parametrize("end", UNRESOLVED)
@pytest.mark.parametrize("started", [Migration.UNKNOWN, Migration.INCOMING, Migration.COMPLETED])
async def test_s1_what_speaks_against_off_is_never_too_old_while_starts_fail(
    rig: JournalRig, end: InstanceEnded, started: Migration
) -> None:
    async with rig.opened() as journal:
        await journal.remember_instance(process(), "vm1", HOST)
        await journal.remember_end(end)
        rig.clock.now += 1
        await journal.remember_instance(process(4712), "vm1", HOST, migration=started)
        await journal.remember_end(ended(process(4712)))
        rig.clock.now += 1000
        await journal.prune(1)
    async with rig.opened() as journal:
        registry = VmRegistry(HOST, standalone=True)
        registry.restore(await journal.known_instances())
        assert end in registry.ended(VM1)
        assert bool(registry.departed(VM1)) == end.departed


async def test_a_clock_that_was_set_ahead_prunes_nothing_that_may_be_under_way(rig: JournalRig) -> None:
    journal = await rig.open(boottime=lambda: 100.0)
    try:
        await journal.remember_request(b"\1" * 16, "vm", b"", OP1, deadline=160.0)
        await journal.remember_request(b"\2" * 16, "vm", b"", OP2, deadline=99.0)
        await journal.append("fence.intent", OP1, {})
        await journal.append("fence.phase", OP1, {"phase": "starting"})
        await journal.append("host.note", OperationId(""), {})
        rig.clock.now += 1000 * 86400
        await journal.prune(86400)
        assert await journal.request(b"\1" * 16) is not None  # it could be carried out twice (S5)
        assert await journal.request(b"\2" * 16) is None
        assert len(await journal.operation(OP1)) == 2  # its start would be forgotten (S12)
    finally:
        await journal.close()


# aliases
async def test_an_accepted_name_replaces_what_the_vm_announced_before(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.remember_alias(VM1, "node1", "hostname", 1.0, False)
        await journal.remember_alias(VM1, "node2", "corosync", 2.0, True)
        assert await journal.aliases() == [
            StoredAlias(VM1, "node1", "hostname", 1.0, False),
            StoredAlias(VM1, "node2", "corosync", 2.0, True),
        ]
        await journal.remember_alias(VM1, "node3", "corosync", 3.0, False)
        await journal.remember_alias(VM2, "node1", "corosync", 4.0, False)
    async with rig.opened() as journal:
        assert await journal.aliases() == [
            StoredAlias(VM1, "node3", "corosync", 3.0, False),
            StoredAlias(VM2, "node1", "corosync", 4.0, False),
        ]


# requests
async def test_a_request_and_its_answer_survive_a_restart(rig: JournalRig) -> None:
    key = bytes(range(16))
    async with rig.opened() as journal:
        assert await journal.request(key) is None
        await journal.remember_request(key, "vm1/4711", b"digest", OP1, 123.5)
    async with rig.opened() as journal:
        assert await journal.request(key) == StoredRequest(key, "vm1/4711", b"digest", OP1, 123.5, BOOT, None)
        await journal.remember_answer(key, b"\x00answer")
    async with rig.opened() as journal:
        stored = await journal.request(key)
    assert stored is not None
    assert stored.answer == b"\x00answer"


async def test_an_interruption_takes_from_its_vm_alone_the_requests_that_are_in_time(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        for key, vm, deadline in ((b"late", VM1, 10.0), (b"mine", VM1, 30.0), (b"other", VM2, 30.0)):
            await journal.remember_request(key, f"{vm} who", b"d", OP1, deadline)
        await journal.interrupt_requests(VM1, 20.0)
    async with rig.opened() as journal:
        kept = {key: await journal.request(key) for key in (b"late", b"mine", b"other")}
    assert {key: one.requester for key, one in kept.items() if one is not None} == {
        b"late": f"{VM1} who",
        b"mine": f"{VM1} who interrupted",
        b"other": f"{VM2} who",
    }


async def test_a_request_id_is_taken_once_and_its_answer_never_changes(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.remember_request(b"k", "vm1", b"d", OP1, 1.0)
        with pytest.raises(JournalMisuse, match="stored already"):
            await journal.remember_request(b"k", "vm2", b"d", OP2, 1.0)
        await journal.remember_answer(b"k", b"first")
        await journal.remember_answer(b"k", b"first")
        with pytest.raises(JournalMisuse, match="another answer"):
            await journal.remember_answer(b"k", b"second")
        with pytest.raises(JournalMisuse, match="not stored"):
            await journal.remember_answer(b"unknown", b"x")
        with pytest.raises(JournalMisuse, match="at most"):
            await journal.remember_answer(b"k", b"x" * 70_000)


# files
async def test_files_and_directory_are_private_and_the_public_key_is_public(rig: JournalRig) -> None:
    await rig.filled(1)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in rig.directory.iterdir()}
    assert modes == {
        "journal.db": 0o600,
        "journal.db.spare": 0o600,
        "journal.db.mark": 0o600,
        "journal.db-shm": 0o600,
        "journal.db-wal": 0o600,
        "journal.db.lock": 0o600,
        "journal.key": 0o600,
        "journal.key.pub": 0o644,
    }
    assert stat.S_IMODE(rig.directory.stat().st_mode) == 0o700


async def test_the_write_ahead_log_is_private_too(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.append("host.note", OP1, {})
        modes = {stat.S_IMODE(path.stat().st_mode) for path in rig.directory.glob("journal.db-*")}
    assert modes == {0o600}


@pytest.mark.parametrize(("loosen", "words"), LOOSE)
async def test_loose_modes_are_refused(
    rig: JournalRig, loosen: Callable[[JournalRig], object], words: str
) -> None:
    await rig.filled(1)
    loosen(rig)
    with pytest.raises(JournalError, match=words):
        await rig.open()


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
async def test_a_damaged_journal_is_refused_and_left_as_it_is(
    rig: JournalRig, damage: Callable[[JournalRig], object], words: str
) -> None:
    await rig.filled(50)
    damage(rig)
    before = {path.name: path.read_bytes() for path in rig.directory.glob("journal.db")}
    for _ in range(2):
        with pytest.raises(JournalCorrupt, match=words):
            await rig.open()
    assert {path.name: path.read_bytes() for path in rig.directory.glob("journal.db")} == before


async def test_a_first_start_that_was_cut_short_is_finished_by_the_next(rig: JournalRig) -> None:
    await rig.filled(0)
    rig.path.rename(rig.directory / "journal.db.new")  # before the rename
    rig.wal.unlink()
    rig.public_key.unlink()
    async with rig.opened() as journal:
        await journal.append("host.note", OP1, {})
    rig.public_key.unlink()  # after it
    async with rig.opened() as journal:
        assert (await journal.verify()).records == 1
    assert rig.verified().ok


async def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="Not a directory"):
        await JournalRig(tmp_path / "file" / "state").open()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_journal_that_cannot_be_written_is_refused_at_the_start(rig: JournalRig) -> None:
    asyncio.run(rig.filled(1))
    script = (
        "import asyncio, os, sys; from pathlib import Path\n"
        "from vmchannel_host.journal.journal import Journal\n"
        "from vmchannel_host.journal.types import JournalError\n"
        "path = Path(sys.argv[1]); fd = os.open(path, os.O_PATH | os.O_DIRECTORY)\n"
        "os.setegid(65534); os.seteuid(65534)\n"
        "path = Path(f'/proc/self/fd/{fd}')\n"
        "try: asyncio.run(Journal.open(path / 'journal.db', path / 'journal.key', boot_id='b'))\n"
        "except JournalError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(rig.directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "Permission denied" in done.stdout, done


# one owner
async def test_a_second_daemon_on_the_same_journal_is_refused_and_told_the_pid(rig: JournalRig) -> None:
    async with rig.opened():
        with pytest.raises(JournalLocked, match=f"pid {os.getpid()}"):
            await rig.open()
    async with rig.opened() as journal:  # and the lock goes with the first
        await journal.append("host.note", OP1, {})


async def test_a_file_that_is_replaced_while_open_takes_no_more_records(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.append("host.note", OP1, {})
        rig.path.rename(rig.directory / "stolen.db")
        assert (journal.last_seq, journal.problem) == (1, "")
        with pytest.raises(JournalDamaged, match="No such file"):
            await journal.append("host.note", OP1, {})
        assert (journal.last_seq, "No such file" in journal.problem) == (1, True)
        (rig.directory / "stolen.db").rename(rig.path)
        with pytest.raises(JournalDamaged):  # what happened meanwhile is unknown: it must be opened anew
            await journal.append("host.note", OP1, {})


# time-outs, cancelling, full queues
class Brake:
    """Holds the journal's thread: the clock that it asks for the time waits."""

    def __init__(self) -> None:
        self.held = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> float:
        self.held.set()
        assert self.go.wait(30)
        return 100.0


async def test_a_disk_that_does_not_answer_in_time_is_an_error_of_unknown_outcome(rig: JournalRig) -> None:
    brake = Brake()
    journal = await rig.open(boottime=brake)
    try:
        with pytest.raises(JournalBusy, match="no answer"):
            await journal.append("host.note", OP1, {}, timeout_s=0.05)
        assert brake.held.is_set()
    finally:
        brake.go.set()
        await journal.close()
    assert rig.verified().records == 1  # it was under way, and was stored


async def test_a_cancelled_call_that_had_not_begun_is_never_made(rig: JournalRig) -> None:
    brake = Brake()
    journal = await rig.open(boottime=brake)
    first = asyncio.create_task(journal.append("host.note", OP1, {"n": 1}))
    await asyncio.to_thread(brake.held.wait, 30)
    second = asyncio.create_task(journal.append("host.note", OP1, {"n": 2}))
    third = asyncio.create_task(journal.append("host.note", OP1, {"n": 3}))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second])
    brake.go.set()
    assert (await first, await third) == (1, 2)
    assert [record.body for record in await journal.operation(OP1)] == [{"n": 1}, {"n": 3}]
    await journal.close()


async def test_more_calls_than_may_wait_are_refused_at_once(rig: JournalRig) -> None:
    brake = Brake()
    journal = await rig.open(boottime=brake, max_pending=2)
    held = asyncio.create_task(journal.append("host.note", OP1, {}))
    await asyncio.to_thread(brake.held.wait, 30)
    waiting = [asyncio.create_task(journal.append("host.note", OP1, {})) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(JournalBusy, match="2 calls wait"):
        await journal.append("host.note", OP1, {})
    brake.go.set()
    assert await asyncio.gather(held, *waiting) == [1, 2, 3]
    await journal.close()


async def test_closing_finishes_what_waits_and_refuses_what_comes_later(rig: JournalRig) -> None:
    journal = await rig.open()
    waiting = [asyncio.create_task(journal.append("host.note", OP1, {})) for _ in range(5)]
    await asyncio.sleep(0)
    await journal.close()
    await journal.close()
    assert await asyncio.gather(*waiting) == [1, 2, 3, 4, 5]
    with pytest.raises(JournalError, match="closed"):
        await journal.append("host.note", OP1, {})


async def test_a_malformed_row_is_an_error_of_that_call_only(rig: JournalRig) -> None:
    await rig.filled(3)
    rig.tamper("UPDATE records SET body = '[1]' WHERE seq = 2")
    async with rig.opened() as journal:
        with pytest.raises(JournalCorrupt, match="record 2"):
            await journal.operation(OP2)
        assert await journal.append("host.note", OperationId("later"), {}) == 4


async def test_every_commit_waits_for_the_disk(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        thread = journal._thread  # pyright: ignore[reportPrivateUsage]  # no power cut in a test: ask SQLite
        mode = thread.submit(lambda store: store.connection.execute("PRAGMA synchronous").fetchone()[0])
        assert await asyncio.wrap_future(mode) == 2  # FULL


async def test_the_journal_can_be_read_by_others_while_it_is_open(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        await journal.append("host.note", OP1, {})
        assert rig.verified().records == 1
        with closing(sqlite3.connect(rig.path)) as connection:
            assert connection.execute("SELECT count(*) FROM records").fetchone() == (1,)
        await journal.append("host.note", OP1, {})


# guests
async def test_a_kernel_boot_is_remembered_where_it_was_first_seen(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        first = await journal.remember_boot(VM1, "boot-1")
        await journal.append("fence.intent", OP1, {"action": "off", "vm": VM1})
        assert await journal.remember_boot(VM1, "boot-1") == first
        assert await journal.remember_boot(VM1, "boot-2") == first + 1
    async with rig.opened() as journal:
        assert await journal.remember_boot(VM1, "boot-1") == first


async def test_a_guest_cannot_fill_the_journal_with_boots(rig: JournalRig) -> None:
    async with rig.opened() as journal:
        for number in range(MAX_BOOTS + 20):
            await journal.append("fence.check", OP1, {})
            await journal.remember_boot(VM1, f"boot-{number}")
        before = journal.last_seq
        assert (
            await journal.remember_boot(VM1, f"boot-{MAX_BOOTS + 19}") == before
        )  # the newest is still there
        assert await journal.remember_boot(VM1, "boot-0") == before  # forgotten, so it is new
        await journal.append("fence.check", OP1, {})
        assert await journal.remember_boot(VM1, f"boot-{MAX_BOOTS + 19}") == before
