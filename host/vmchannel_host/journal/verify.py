# SPDX-License-Identifier: LGPL-2.1-or-later
"""Walking the whole chain, in a running daemon or offline on a copy. Blocking; reads only."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from vmchannel_host.journal.chain import Head, Link, Verifier, genesis
from vmchannel_host.journal.file import Row, connect, read_head, read_meta, translated
from vmchannel_host.journal.keys import load_verifier
from vmchannel_host.journal.restored import KIND as RESTORED
from vmchannel_host.journal.types import VerifyResult


class VerifyStopped(Exception):
    """The caller asked the walk to stop."""


@dataclass(slots=True)
class _Walk:
    """Where the walk is: the last record found right."""

    seq: int
    hash: bytes
    first: int = 0
    records: int = 0
    restored: int = 0


@dataclass(frozen=True, slots=True)
class _Fault:
    """The first thing that is wrong."""

    seq: int | None
    problem: str


def verify_file(
    path: Path, public_key: Path | Verifier, *, stopped: Callable[[], bool] = lambda: False
) -> VerifyResult:
    """Check every hash and signature and both ends of the chain.

    Args:
        path: the journal; a copy needs its `-wal` file beside it, if it has one.
        public_key: a PEM file, best from a copy kept elsewhere: whoever can replace the journal's key can
            sign a whole new chain.
        stopped: asked every few records; True ends the walk.

    Raises:
        JournalError: the file or the key cannot be read, or it is no journal.
        VerifyStopped: `stopped` said so.
    """
    verifier = public_key if isinstance(public_key, Verifier) else load_verifier(public_key)
    with translated(path), closing(connect(path, read_only=True)) as connection:
        connection.execute("BEGIN")  # one snapshot for head and records
        key = read_meta(connection, path)["public_key"]
        head, signature = read_head(connection, path)
        walk = _Walk(head.checkpoint_seq, head.checkpoint_hash)
        fault = _walk(connection, walk, head, verifier, stopped)
    if key != verifier.fingerprint:
        fault = _Fault(fault.seq if fault else None, "signed by another key than the one given")
    elif not verifier.head(head, signature):
        fault = fault or _Fault(None, "the signed head is forged")
    fault = fault or _ends(head, walk)
    return VerifyResult(
        ok=fault is None,
        records=walk.records,
        first_seq=walk.first,
        last_seq=walk.seq,
        head_hash=walk.hash.hex(),
        public_key=verifier.fingerprint,
        bad_seq=fault.seq if fault else None,
        problem=fault.problem if fault else "",
        restored_seq=walk.restored,
    )


def _walk(
    connection: sqlite3.Connection, walk: _Walk, head: Head, verifier: Verifier, stopped: Callable[[], bool]
) -> _Fault | None:
    rows = connection.execute(
        "SELECT seq, at_us, boottime_us, boot_id, kind, operation, body, prev, hash, signature "
        "FROM records ORDER BY seq"
    )
    while True:
        if walk.records % 64 == 0 and stopped():
            raise VerifyStopped
        try:
            row = rows.fetchone()
        except sqlite3.Error as error:  # text that is no UTF-8, a damaged page
            return _Fault(walk.seq + 1, f"record {walk.seq + 1} cannot be read: {error}")
        if row is None:
            return None
        problem = _problem(row, walk, head.journal_id, verifier)
        if problem:
            return _Fault(walk.seq + 1, problem)
        walk.seq, walk.hash = row[0], row[8]
        walk.first = walk.first or walk.seq
        walk.records += 1
        if row[4] == RESTORED:
            walk.restored = walk.seq


def _problem(row: Row, walk: _Walk, journal_id: str, verifier: Verifier) -> str:
    """What is wrong with the next record, or nothing."""
    match row:
        case (
            int(seq),
            int(at),
            int(boottime),
            str(boot_id),
            str(kind),
            str(operation),
            str(body),
            bytes(prev),
            bytes(digest),
            bytes(signature),
        ):
            link = Link(journal_id, seq, at, boottime, boot_id, kind, operation, body, prev)
        case _:
            return f"record {row[0]!r} has a column of another type"
    if seq != walk.seq + 1:
        return f"record {walk.seq + 1} is missing; {seq} follows {walk.seq}"
    if prev != walk.hash:
        return f"record {seq} does not follow from the one before it"
    if link.digest() != digest:
        return f"record {seq} was changed: its content does not fit its hash"
    if not verifier.record(digest, signature):
        return f"the signature of record {seq} is forged"
    return ""


def _ends(head: Head, walk: _Walk) -> _Fault | None:
    """Compare both ends of a chain that is right in itself with the signed head."""
    if not head.checkpoint_seq and head.checkpoint_hash != genesis(head.journal_id):
        return _Fault(1, "the chain does not begin with this journal's id")
    if walk.seq < head.seq:
        return _Fault(walk.seq + 1, f"records {walk.seq + 1} to {head.seq} are missing: the tail was cut")
    if walk.seq > head.seq:
        return _Fault(head.seq + 1, f"record {head.seq + 1} is not covered by the signed head")
    if walk.hash != head.hash:
        return _Fault(walk.seq, f"record {walk.seq} is not the one that the signed head names")
    return None
