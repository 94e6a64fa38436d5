# SPDX-License-Identifier: LGPL-2.1-or-later
"""A journal that was put back to an older state: how it shows, and what it is good for then (S11). Blocking.

It still tells which requests were carried out. It proves nothing any more: the records that were lost may say
that a VM was migrated away, that it was killed with writes under way, that its start had begun. So every VM
that it holds counts as migrated away until it is seen again or the operator says that it is off; who is which
node is asked anew; no operation in it is taken up.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from vmchannel_host.journal.chain import Head
from vmchannel_host.journal.types import Json
from vmchannel_host.model import BootId

KIND = "journal.restored"
"""The record that says so; what lies before it in the chain is no evidence."""

_KEY = "restored"


@dataclass(frozen=True, slots=True)
class Restored:
    """When the journal was found to be older than it had been."""

    seq: int  # of the record that says so
    boottime: float  # CLOCK_BOOTTIME, seconds, in `boot_id`
    boot_id: BootId
    reason: str


def set_back(connection: sqlite3.Connection, head: Head, mark: tuple[str, int, str] | None) -> str:
    """How the journal differs from its mark; "" when it holds all that the mark knows of."""
    if mark is None:
        return "the mark beside the journal is missing"
    journal_id, seq, digest = mark
    if journal_id != head.journal_id:
        return "the mark beside the journal is of another journal"
    if seq > head.seq:
        return f"records {head.seq + 1} to {seq} were lost"
    known = {head.seq: head.hash, head.checkpoint_seq: head.checkpoint_hash}
    row = connection.execute("SELECT hash FROM records WHERE seq = ?", (seq,)).fetchone()
    found = known.get(seq) if row is None else bytes(row[0])
    return "" if found is not None and found.hex() == digest else f"record {seq} is another than it was"


def distrust(connection: sqlite3.Connection) -> None:
    """Let what the tables hold prove nothing; in the transaction of the record that says why."""
    # As after an end in a migration: each process may have handed its VM over, whatever was last known of it.
    connection.execute("UPDATE instances SET departed = 1 WHERE proof IS NOT NULL")
    connection.execute("UPDATE instances SET migration = 'outgoing' WHERE proof IS NULL")
    columns = [str(row[1]) for row in connection.execute("PRAGMA table_info(instances)")]
    if "confirmed_by" in columns:
        connection.execute("UPDATE instances SET confirmed_by = NULL")
    connection.execute("DELETE FROM aliases")


def write(connection: sqlite3.Connection, restored: Restored) -> None:
    """Keep it for the next opening."""
    body: Mapping[str, Json] = {
        "seq": restored.seq,
        "boottime": restored.boottime,
        "boot_id": restored.boot_id,
        "reason": restored.reason,
    }
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_KEY, json.dumps(body)))


def read(connection: sqlite3.Connection) -> Restored | None:
    """When the journal was last restored; None: never.

    Raises:
        ValueError, KeyError: it cannot be read.
    """
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (_KEY,)).fetchone()
    if row is None:
        return None
    body = json.loads(row[0])
    return Restored(
        int(body["seq"]), float(body["boottime"]), BootId(str(body["boot_id"])), str(body["reason"])
    )
