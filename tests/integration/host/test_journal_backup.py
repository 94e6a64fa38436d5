# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backup and restore: what was put back to an older state shows, and proves nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.host.journal_rig import BOOT, HOST, OP1, VM1, JournalRig, ended, process
from vmchannel_host.journal.backup import BEFORE, back_up, restore
from vmchannel_host.journal.mark import mark_path
from vmchannel_host.journal.types import JournalCorrupt, JournalError, JournalLocked, KnownInstance
from vmchannel_host.journal.verify import verify_file
from vmchannel_host.model import Migration, OperationId
from vmchannel_host.registry.registry import VmRegistry


@pytest.fixture
def rig(tmp_path: Path) -> JournalRig:
    return JournalRig(tmp_path / "state")


def departed(known: list[KnownInstance]) -> str | None:
    """Whether the VM must be taken for departed, though no other host could run it."""
    registry = VmRegistry(HOST, standalone=True)
    registry.restore(known)
    return registry.departed(VM1)


async def backed_up(rig: JournalRig) -> Path:
    """A backup, after which the journal went on."""
    copy = rig.directory.parent / "copy.db"
    async with rig.opened() as journal:
        await journal.remember_instance(process(1), "vm1", HOST)
        await journal.remember_end(ended(process(1)))
        rig.clock.now += 1
        await journal.remember_alias(VM1, "node1", "corosync", 1.0, False)
        await journal.remember_request(b"r" * 16, "vm", b"d", OP1, 1000.0)
        assert back_up(rig.path, rig.key, copy).ok
        await journal.append("host.note", OP1, {"lost": True})
    return copy


async def test_a_backup_is_whole_private_and_taken_while_the_daemon_writes(rig: JournalRig) -> None:
    copy = await backed_up(rig)
    assert copy.stat().st_mode & 0o777 == 0o600
    assert not list(copy.parent.glob("copy.db?*"))
    assert verify_file(copy, rig.public_key).ok
    with pytest.raises(JournalError, match="exists already"):
        back_up(rig.path, rig.key, copy)


async def test_a_journal_that_goes_on_after_a_stop_or_a_kill_is_not_taken_for_a_restored_one(
    rig: JournalRig,
) -> None:
    await rig.filled(3)
    async with rig.opened() as journal:
        assert journal.restored is None
    assert rig.verified().restored_seq == 0


async def test_a_restored_journal_says_so_and_keeps_what_tells_requests_apart(rig: JournalRig) -> None:
    copy = await backed_up(rig)
    restore(copy, rig.path, rig.key)
    for _ in range(2):  # and after the next start too
        async with rig.opened() as journal:
            assert journal.restored is not None
            assert (journal.restored.boot_id, journal.restored.boottime) == (BOOT, rig.boottime())
            assert await journal.request(b"r" * 16) is not None
            assert (await journal.verify()).restored_seq == journal.restored.seq
    assert rig.verified().ok
    kept = rig.path.with_name(rig.path.name + BEFORE)
    assert verify_file(kept, rig.public_key).records == 4


async def test_s11_no_vm_of_a_restored_journal_counts_as_off_until_it_is_seen_again(rig: JournalRig) -> None:
    copy = await backed_up(rig)
    async with rig.opened() as journal:
        assert departed(await journal.known_instances()) is None
    restore(copy, rig.path, rig.key)
    async with rig.opened() as journal:
        assert departed(await journal.known_instances()) is not None
        assert await journal.aliases() == []
        rig.clock.now += 1
        await journal.remember_instance(process(2), "vm1", HOST)
        await journal.remember_end(ended(process(2)))
        assert departed(await journal.known_instances()) is None


async def test_s11_a_process_whose_end_a_restored_journal_does_not_know_may_have_departed(
    rig: JournalRig,
) -> None:
    copy = rig.directory.parent / "copy.db"
    async with rig.opened() as journal:
        await journal.remember_instance(process(1), "vm1", HOST)
        back_up(rig.path, rig.key, copy)
        await journal.remember_end(ended(process(1), departed=True))
    restore(copy, rig.path, rig.key)
    async with rig.opened() as journal:
        [known] = await journal.known_instances()
        assert (known.end, known.migration) == (None, Migration.OUTGOING)


def by_hand(rig: JournalRig, copy: Path) -> None:
    """Though an older log still lies beside it."""
    assert rig.wal.stat().st_size
    shutil.copy(copy, rig.path)


def without_its_mark(rig: JournalRig, _: Path) -> None:
    mark_path(rig.path).unlink()


def mark_of_nothing(rig: JournalRig, _: Path) -> None:
    mark_path(rig.path).write_bytes(b"\0" * 256)


@pytest.mark.parametrize("change", [by_hand, without_its_mark, mark_of_nothing])
async def test_a_journal_that_was_put_back_by_hand_is_noticed(
    rig: JournalRig, change: Callable[[JournalRig, Path], None]
) -> None:
    change(rig, await backed_up(rig))
    async with rig.opened() as journal:
        assert journal.restored is not None
        assert departed(await journal.known_instances()) is not None


async def test_a_restored_journal_that_has_grown_past_its_mark_is_noticed(rig: JournalRig) -> None:
    copy = await backed_up(rig)
    mark = mark_path(rig.path).read_bytes()
    shutil.copy(copy, rig.path)
    async with rig.opened() as journal:
        for number in range(5):
            await journal.append("host.note", OperationId(f"op-{number}"), {})
    mark_path(rig.path).write_bytes(mark)
    async with rig.opened() as journal:
        assert journal.restored is not None
        assert "is another than it was" in journal.restored.reason


async def test_the_records_that_were_lost_are_named(rig: JournalRig) -> None:
    copy = await backed_up(rig)
    shutil.copy(copy, rig.path)
    async with rig.opened() as journal:
        assert journal.restored is not None
        assert journal.restored.reason == "records 4 to 4 were lost"


async def test_a_backup_that_nothing_followed_proves_nothing_either(rig: JournalRig) -> None:
    """Whoever restores does so because something was wrong."""
    await rig.filled(3)
    copy = rig.directory.parent / "copy.db"
    back_up(rig.path, rig.key, copy)
    restore(copy, rig.path, rig.key)
    async with rig.opened() as journal:
        assert journal.restored is not None


async def test_nothing_is_restored_under_a_running_daemon(rig: JournalRig) -> None:
    copy = await backed_up(rig)
    async with rig.opened() as journal:
        with pytest.raises(JournalLocked, match=f"pid {os.getpid()}"):
            restore(copy, rig.path, rig.key)
        await journal.append("host.note", OP1, {})


async def test_a_backup_that_is_not_whole_replaces_nothing(rig: JournalRig) -> None:
    copy = await backed_up(rig)
    before = rig.path.read_bytes()
    other = JournalRig(rig.directory.parent / "other")
    await other.filled(2)
    other.tamper("UPDATE records SET body = '{}' WHERE seq = 2")
    for wrong in (other.path, rig.public_key):
        with pytest.raises(JournalError):
            restore(wrong, rig.path, rig.key)
    with pytest.raises(JournalCorrupt, match="another key"):
        restore(copy, other.path, other.key)
    assert rig.path.read_bytes() == before
    async with rig.opened() as journal:
        assert journal.restored is None


async def test_a_journal_is_restored_where_it_was_lost(rig: JournalRig) -> None:
    copy = await backed_up(rig)
    for path in rig.directory.glob("journal.db*"):
        path.unlink()
    restore(copy, rig.path, rig.key)
    async with rig.opened() as journal:
        assert journal.restored is not None
