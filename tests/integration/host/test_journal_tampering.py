# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each kind of tampering with a journal shows, and the first bad record is named."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.integration.host.journal_rig import JournalRig
from vmchannel_host.journal.chain import Head, Link, Signer
from vmchannel_host.journal.file import write_head
from vmchannel_host.journal.types import JournalCorrupt, JournalError
from vmchannel_host.journal.verify import VerifyStopped, verify_file
from vmchannel_host.model import OperationId


@pytest.fixture
def rig(tmp_path: Path) -> JournalRig:
    return JournalRig(tmp_path / "state")


async def test_an_untouched_journal_is_verified(rig: JournalRig) -> None:
    await rig.filled(10)
    result = rig.verified()
    assert (result.ok, result.records, result.first_seq, result.last_seq) == (True, 10, 1, 10)
    assert (result.bad_seq, result.problem) == (None, "")


async def test_an_empty_journal_is_verified(rig: JournalRig) -> None:
    await rig.filled(0)
    result = rig.verified()
    assert (result.ok, result.records, result.last_seq) == (True, 0, 0)


@pytest.mark.parametrize(
    ("statements", "bad_seq", "words"),
    [
        (["UPDATE records SET body = '{\"number\":99}' WHERE seq = 4"], 4, "was changed"),
        (["UPDATE records SET at_us = at_us + 1 WHERE seq = 4"], 4, "was changed"),
        (["UPDATE records SET boottime_us = 0 WHERE seq = 4"], 4, "was changed"),
        (["UPDATE records SET kind = 'fence.outcome' WHERE seq = 4"], 4, "was changed"),
        (["UPDATE records SET operation = 'op-9' WHERE seq = 4"], 4, "was changed"),
        (["UPDATE records SET boot_id = 'x' WHERE seq = 4"], 4, "was changed"),
        (["UPDATE records SET hash = zeroblob(32) WHERE seq = 4"], 4, "was changed"),
        (["UPDATE records SET prev = zeroblob(32) WHERE seq = 4"], 4, "does not follow"),
        (["UPDATE records SET signature = zeroblob(64) WHERE seq = 4"], 4, "forged"),
        (
            ["UPDATE records SET signature = (SELECT signature FROM records WHERE seq = 5) WHERE seq = 4"],
            4,
            "forged",
        ),
        (["UPDATE records SET body = CAST(body AS BLOB) WHERE seq = 4"], 4, "another type"),
        (["UPDATE records SET body = CAST(x'ff' AS TEXT) WHERE seq = 4"], 4, "cannot be read"),
        (["DELETE FROM records WHERE seq = 4"], 4, "4 is missing"),
        (["DELETE FROM records WHERE seq = 1"], 1, "1 is missing"),
        (["DELETE FROM records WHERE seq > 7"], 8, "tail was cut"),
        (["DELETE FROM records"], 1, "tail was cut"),
        (
            [
                "UPDATE records SET seq = 100 WHERE seq = 4",
                "UPDATE records SET seq = 4 WHERE seq = 5",
                "UPDATE records SET seq = 5 WHERE seq = 100",
            ],
            4,
            "does not follow",
        ),
        (["DELETE FROM records WHERE seq = 10", "UPDATE head SET seq = 9"], None, "head is forged"),
        (
            [
                "DELETE FROM records WHERE seq <= 3",
                "UPDATE head SET checkpoint_seq = 3, "
                "checkpoint_hash = (SELECT prev FROM records WHERE seq = 4)",
            ],
            None,
            "head is forged",
        ),
        (["UPDATE head SET signature = zeroblob(64)"], None, "head is forged"),
        (["UPDATE meta SET value = 'other' WHERE key = 'journal_id'"], 1, "was changed"),
    ],
)
async def test_a_change_shows_and_the_first_bad_record_is_named(
    rig: JournalRig, statements: list[str], bad_seq: int | None, words: str
) -> None:
    await rig.filled(10)
    rig.tamper(*statements)
    result = rig.verified()
    assert not result.ok
    assert (result.bad_seq, words in result.problem) == (bad_seq, True), result


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM records WHERE seq > 7", "UPDATE head SET signature = zeroblob(64)", "DELETE FROM head"],
)
async def test_a_journal_whose_end_was_tampered_with_does_not_open(rig: JournalRig, statement: str) -> None:
    await rig.filled(10)
    rig.tamper(statement)
    with pytest.raises(JournalCorrupt):
        await rig.open()


async def test_a_record_added_without_the_key_shows(rig: JournalRig) -> None:
    await rig.filled(3)
    rig.tamper(
        "INSERT INTO records SELECT 4, at_us, boottime_us, boot_id, kind, operation, body, hash, hash, "
        "signature FROM records WHERE seq = 3"
    )
    assert rig.verified().bad_seq == 4


def _sign_anew(rig: JournalRig, signer: Signer) -> None:
    """What someone with a key of their own can do: a whole chain with other content."""
    with closing(sqlite3.connect(rig.path)) as connection:
        rows = connection.execute("SELECT * FROM records ORDER BY seq").fetchall()
        journal_id = connection.execute("SELECT value FROM meta WHERE key = 'journal_id'").fetchone()[0]
        start = previous = rows[0][7]
        for seq, at, boottime, boot, kind, operation, _, _, _, _ in rows:
            link = Link(journal_id, seq, at, boottime, boot, kind, operation, '{"forged":true}', previous)
            previous = link.digest()
            connection.execute(
                "UPDATE records SET body = ?, prev = ?, hash = ?, signature = ? WHERE seq = ?",
                (link.body, link.prev, previous, signer.record(previous), seq),
            )
        write_head(connection, Head(journal_id, 0, start, len(rows), previous), signer)
        connection.execute(
            "UPDATE meta SET value = ? WHERE key = 'public_key'", (signer.verifier.fingerprint,)
        )
        connection.commit()


async def test_a_chain_signed_anew_with_another_key_shows_against_the_old_public_key(rig: JournalRig) -> None:
    await rig.filled(5)
    stranger = Signer(Ed25519PrivateKey.generate())
    _sign_anew(rig, stranger)
    assert verify_file(rig.path, stranger.verifier).ok  # it is right in itself: only the key tells
    result = rig.verified()
    assert not result.ok
    assert (result.bad_seq, result.problem) == (1, "signed by another key than the one given")


async def test_a_journal_of_another_key_does_not_open(rig: JournalRig, tmp_path: Path) -> None:
    await rig.filled(5)
    other = JournalRig(tmp_path / "other")
    await other.filled(1)
    shutil.copy(other.key, rig.key)
    with pytest.raises(JournalCorrupt, match="another key"):
        await rig.open()


async def test_records_cannot_be_lent_to_another_journal_of_the_same_key(
    rig: JournalRig, tmp_path: Path
) -> None:
    other = JournalRig(tmp_path / "other")
    await rig.filled(3)
    other.directory.mkdir(mode=0o700)
    shutil.copy(rig.key, other.key)
    await other.filled(3)
    rig.tamper(
        f"ATTACH '{other.path}' AS other",
        "DELETE FROM records",
        "INSERT INTO records SELECT * FROM other.records",
        "DELETE FROM head",
        "INSERT INTO head SELECT * FROM other.head",
    )
    assert not rig.verified().ok


async def test_a_pruned_journal_stays_verifiable_and_its_front_cannot_be_cut_further(rig: JournalRig) -> None:
    await rig.filled(10)
    rig.clock.now += 1000
    async with rig.opened() as journal:
        await journal.append("fence.intent", OperationId("op-late"), {"late": True})
        assert await journal.prune(500) == 10
        result = await journal.verify()
    assert (result.ok, result.first_seq, result.last_seq) == (True, 11, 12)  # 12: journal.pruned
    rig.tamper("DELETE FROM records WHERE seq = 11")
    assert rig.verified().bad_seq == 11


async def test_a_walk_can_be_stopped(rig: JournalRig) -> None:
    await rig.filled(2)
    with pytest.raises(VerifyStopped):
        verify_file(rig.path, rig.public_key, stopped=lambda: True)


@pytest.mark.parametrize("content", [b"", b"no data base at all" * 100])
async def test_what_is_no_journal_cannot_be_verified(rig: JournalRig, content: bytes) -> None:
    await rig.filled(1)
    rig.path.write_bytes(content)
    with pytest.raises(JournalCorrupt):
        rig.verified()


async def test_a_public_key_that_is_none_is_refused(rig: JournalRig) -> None:
    await rig.filled(1)
    rig.public_key.write_text("no key")
    with pytest.raises(JournalError, match="not a public key"):
        rig.verified()
