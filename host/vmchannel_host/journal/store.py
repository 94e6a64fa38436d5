# SPDX-License-Identifier: LGPL-2.1-or-later
"""One open journal: transactions and the chain. Blocking; for one thread.

Nothing is in force before its transaction is committed, and an error of the disk or a damaged file ends the
store for good: after a failed fsync, a second try that succeeds says nothing about what the first one lost.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from vmchannel_host.journal.chain import Head, Link, canonical, parse_body
from vmchannel_host.journal.file import (
    Row,
    StoreSettings,
    add_columns,
    connect,
    make,
    must_be_made,
    read_head,
    read_meta,
    translated,
    write_head,
)
from vmchannel_host.journal.keys import (
    load_signer,
    prepare_directory,
    public_key_path,
    take_lock,
    write_public_key,
)
from vmchannel_host.journal.mark import Mark
from vmchannel_host.journal.restored import KIND as RESTORED
from vmchannel_host.journal.restored import Restored, distrust, set_back
from vmchannel_host.journal.restored import read as read_restored
from vmchannel_host.journal.restored import write as write_restored
from vmchannel_host.journal.room import Descriptors, Room, checkpoint, void_log
from vmchannel_host.journal.types import (
    JournalCorrupt,
    JournalDamaged,
    JournalDisk,
    JournalError,
    JournalMisuse,
    JournalShort,
    Json,
    OperationRows,
    Record,
)
from vmchannel_host.model import BootId, OperationId

logger = logging.getLogger(__name__)

_KIND: Final = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")
_OPERATION: Final = re.compile(r"[A-Za-z0-9._:-]{0,128}")
_PRUNE_AT_ONCE: Final = 2_000  # records; bounds how long one prune holds up a fence


_COLUMNS: Final = "seq, at_us, boottime_us, boot_id, kind, operation, body"


class JournalStore:
    """One open journal. Writing methods are called inside `transaction()` only."""

    def __init__(self, settings: StoreSettings) -> None:
        """Open, or make where neither the file nor its public key exists.

        Raises:
            JournalError: as `Journal.open`.
        """
        self.settings: Final = settings
        prepare_directory(settings.path.parent)
        prepare_directory(settings.key_path.parent)
        self._lock = take_lock(settings.path.with_name(settings.path.name + ".lock"))
        try:
            made = must_be_made(settings)
            if made:
                make(settings)
            self.signer: Final = load_signer(settings.key_path)
            if not public_key_path(settings.key_path).exists():
                write_public_key(settings.key_path)
            self._descriptors, self._mark = _open(settings.path)
        except BaseException:
            os.close(self._lock)
            raise
        self._pending: Head | None = None
        self._broken: JournalError | None = None
        self.restored: Restored | None = None  # when it was last found to be older than it had been
        try:
            self.connection: Final = connect(settings.path)
            self._room: Final = Room(self.connection, settings.path, self._descriptors)
            with translated(settings.path):
                self._head = self._check()
            self.make_room()
            self._compare_with_mark(made=made)
            if self._broken is not None:
                raise self._broken
        except BaseException:
            self._close_files()
            raise

    @property
    def last_seq(self) -> int:
        """Number of the last record; safe to read from another thread."""
        return self._head.seq

    @property
    def problem(self) -> str:
        """Why nothing is served any more; "" while it is. Safe to read from another thread."""
        return str(self._broken or "")

    @property
    def short(self) -> str:
        """Why only what an `off` needs is stored, or "". Safe to read from another thread."""
        return self._room.short

    def close(self) -> None:
        """Close the file and let the lock go. The log stays, with its room, but empty."""
        try:
            if self._broken is None:
                self._close_in_order()
        except (JournalError, OSError) as error:
            logger.warning("the journal was not closed in order; its next opening recovers it: %s", error)
        finally:
            self._close_files()

    def _close_in_order(self) -> None:
        path = self.settings.path
        with translated(path), closing(connect(path, read_only=True)) as last:
            last.execute("SELECT count(*) FROM meta").fetchone()
            empty = checkpoint(self.connection)
            # The one that closes last would remove the log, if it could write.
            self.connection.close()
        if empty:
            void_log(path)
        self._mark.sync()

    def check(self) -> None:
        """Read the head; inside a transaction, which finds a file that was removed or replaced."""
        read_head(self.connection, self.settings.path)

    def make_room(self) -> None:
        """Make sure of the room that is kept for `off`, outside a transaction; `short` tells."""
        if self._broken is not None:
            return
        try:
            with translated(self.settings.path):
                self._room.make()
        except JournalError as error:
            self._broken = error

    def need_room(self) -> None:
        """For what an `off` does not need.

        Raises:
            JournalShort: there is no room for it.
        """
        if self.short:
            raise JournalShort(self.short)

    @contextmanager
    def transaction(self) -> Generator[None]:
        """All that is written inside is on the disk when this ends, or none of it.

        Raises:
            JournalFull: no room; nothing was stored, a later try may succeed.
            JournalError: nothing may be taken as stored.
        """
        if self._broken is not None:
            raise type(self._broken)(str(self._broken))
        try:
            self._check_same_file()
            with translated(self.settings.path):
                self.connection.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._write_head()
                    self.connection.execute("COMMIT")
                except BaseException:
                    if self.connection.in_transaction:
                        self.connection.execute("ROLLBACK")
                    raise
        except (JournalDamaged, JournalDisk) as error:
            self._broken = error
            raise
        else:
            self._advance(self._pending)
        finally:
            self._pending = None

    @contextmanager
    def savepoint(self) -> Generator[None]:
        """A part of a transaction that can be undone alone."""
        pending = self._pending
        self.connection.execute("SAVEPOINT part")
        try:
            yield
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK TO part")
                self.connection.execute("RELEASE part")
            self._pending = pending
            raise
        self.connection.execute("RELEASE part")

    def append(self, kind: str, operation: OperationId, body: Mapping[str, Json]) -> int:
        """Add a signed record; return its sequence number."""
        if not _KIND.fullmatch(kind) or len(kind) > 64:
            raise JournalMisuse(f"{kind!r} is no kind of record")
        if not _OPERATION.fullmatch(operation):
            raise JournalMisuse(f"{operation!r} is no operation's id")
        head = self._pending or self._head
        link = Link(
            head.journal_id,
            head.seq + 1,
            int(self.settings.wall_clock() * 1e6),
            int(self.settings.boottime() * 1e6),
            self.settings.boot_id,
            kind,
            operation,
            canonical(body),
            head.hash,
        )
        self._insert(link)
        return link.seq

    def operations(self, limit: int) -> list[OperationRows]:
        """The latest operations, newest first."""
        rows = self.connection.execute(
            "SELECT id, records, first_seq, last_seq FROM operations ORDER BY last_seq DESC LIMIT ?", (limit,)
        ).fetchall()
        return [
            OperationRows(OperationId(name), count, self._record(first), self._record(last))
            for name, count, first, last in rows
        ]

    def operation(self, operation: OperationId) -> list[Record]:
        """All records of one operation, in order."""
        rows = self.connection.execute(
            f"SELECT {_COLUMNS} FROM records WHERE operation = ? AND operation != '' ORDER BY seq",
            (operation,),
        )
        return [_to_record(row) for row in rows]

    def prune(self, before: float) -> int:
        """Remove some of the records from before a wall time (seconds); return how many went, 0 when no more.

        The newest record stays, and no operation is cut in two.
        """
        head = self._pending or self._head
        last = self._last_to_prune(head, int(before * 1e6))
        if last <= head.checkpoint_seq:
            return 0
        row = self.connection.execute("SELECT hash FROM records WHERE seq = ?", (last,)).fetchone()
        if row is None:
            raise JournalCorrupt(f"{self.settings.path}: record {last} is missing")
        self.connection.execute("DELETE FROM records WHERE seq <= ?", (last,))
        self.connection.execute("DELETE FROM operations WHERE last_seq <= ?", (last,))
        self._pending = replace(head, checkpoint_seq=last, checkpoint_hash=bytes(row[0]))
        self.append("journal.pruned", OperationId(""), {"to": last, "hash": bytes(row[0]).hex()})
        return last - head.checkpoint_seq

    def _last_to_prune(self, head: Head, before_us: int) -> int:
        """The last record of the longest prefix that is old enough and cuts no operation.

        Of this boot the clock that nobody sets tells how old: a wall clock that was set ahead must not take
        an operation that runs.
        """
        settings = self.settings
        age_us = int(settings.wall_clock() * 1e6) - before_us
        row = self.connection.execute(
            """SELECT seq FROM records WHERE at_us >= ? OR seq = ? OR (boot_id = ? AND boottime_us >= ?)
                ORDER BY seq LIMIT 1""",
            (before_us, head.seq, settings.boot_id, int(settings.boottime() * 1e6) - age_us),
        ).fetchone()
        last = min(int(row[0]) - 1 if row else 0, head.checkpoint_seq + _PRUNE_AT_ONCE)
        while True:
            spanning = self.connection.execute(
                "SELECT min(first_seq) FROM operations WHERE first_seq <= ? AND last_seq > ?", (last, last)
            ).fetchone()
            if spanning is None or spanning[0] is None:
                return last
            last = int(spanning[0]) - 1

    def _advance(self, head: Head | None) -> None:
        """What is committed is in force, and marked."""
        if head is None:
            return
        self._head = head
        try:
            self._mark.write(head)
        except OSError as error:
            self._broken = JournalDisk(f"{self.settings.path}: its mark: {error.strerror}")

    def _compare_with_mark(self, *, made: bool) -> None:
        """Notice a journal that was put back to an older state, and let it prove nothing (S11)."""
        with translated(self.settings.path):
            reason = "" if made else set_back(self.connection, self._head, self._mark.read())
        if reason:
            logger.warning("%s: restored from a backup: %s", self.settings.path, reason)
            with self.transaction():
                distrust(self.connection)
                seq = self.append(RESTORED, OperationId(""), {"text": reason})
                boottime, boot_id = self.settings.boottime(), self.settings.boot_id
                write_restored(self.connection, Restored(seq, boottime, boot_id, reason))
        try:
            self._mark.write(self._head)
            self._mark.sync()
        except OSError as error:
            raise JournalError(f"{self.settings.path}: its mark: {error.strerror}") from error
        with translated(self.settings.path):
            self.restored = read_restored(self.connection)

    def _close_files(self) -> None:
        """In this order: see `Descriptors`."""
        if hasattr(self, "connection"):
            self.connection.close()
        self._descriptors.close()
        self._mark.close()
        os.close(self._lock)

    def _insert(self, link: Link) -> None:
        digest = link.digest()
        self.connection.execute(
            "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                link.seq,
                link.at_us,
                link.boottime_us,
                link.boot_id,
                link.kind,
                link.operation,
                link.body,
                link.prev,
                digest,
                self.signer.record(digest),
            ),
        )
        if link.operation:
            self.connection.execute(
                """INSERT INTO operations VALUES (?1, ?2, ?2, 1)
                    ON CONFLICT (id) DO UPDATE SET last_seq = ?2, records = records + 1""",
                (link.operation, link.seq),
            )
        self._pending = replace(self._pending or self._head, seq=link.seq, hash=digest)

    def _write_head(self) -> None:
        if self._pending is not None:
            write_head(self.connection, self._pending, self.signer)

    def _record(self, seq: int) -> Record:
        row = self.connection.execute(f"SELECT {_COLUMNS} FROM records WHERE seq = ?", (seq,)).fetchone()
        if row is None:
            raise JournalCorrupt(f"{self.settings.path}: record {seq} is missing")
        return _to_record(row)

    def _check(self) -> Head:
        """Refuse a file that is damaged, of another key, or whose last record is not what the head says."""
        path = self.settings.path
        if self.connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            raise JournalCorrupt(f"{path}: not a journal")
        damage = self.connection.execute("PRAGMA quick_check(1)").fetchone()
        if damage is None or damage[0] != "ok":
            raise JournalCorrupt(f"{path}: damaged ({damage and damage[0]}): restore a backup")
        head, signature = read_head(self.connection, path)
        if read_meta(self.connection, path)["public_key"] != self.signer.verifier.fingerprint:
            raise JournalCorrupt(f"{path}: signed by another key than {self.settings.key_path}")
        if not self.signer.verifier.head(head, signature):
            raise JournalCorrupt(f"{path}: the signed head is forged: see vmchannelctl verify-journal --file")
        last = self.connection.execute("SELECT seq, hash FROM records ORDER BY seq DESC LIMIT 1").fetchone()
        if head.seq and (last is None or (last[0], bytes(last[1])) != (head.seq, head.hash)):
            raise JournalCorrupt(
                f"{path}: the last record is not number {head.seq}, which the signed head names: "
                "see vmchannelctl verify-journal --file"
            )
        stat = os.stat(path)
        self._file = (stat.st_dev, stat.st_ino)
        self.connection.execute(
            "BEGIN IMMEDIATE"
        )  # a file that cannot be written shows here, not at the first fence
        add_columns(self.connection)
        self.connection.execute("COMMIT")
        return head

    def _check_same_file(self) -> None:
        """A file that was unlinked or replaced takes writes without an error, and they are lost."""
        try:
            stat = os.stat(self.settings.path)
        except OSError as error:
            raise JournalDamaged(f"{self.settings.path}: {error.strerror} while it was open") from error
        if (stat.st_dev, stat.st_ino) != self._file:
            raise JournalDamaged(f"{self.settings.path}: replaced by another file while it was open")


def _open(path: Path) -> tuple[Descriptors, Mark]:
    try:
        return Descriptors(path), Mark(path)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error


def _to_record(row: Row) -> Record:
    match row:
        case (int(seq), int(at), int(boottime), str(boot_id), str(kind), str(operation), str(body)):
            try:
                parsed = parse_body(body)
            except (ValueError, RecursionError) as error:
                raise JournalCorrupt(f"record {seq}: {error}") from error
            return Record(
                seq, at / 1e6, boottime / 1e6, BootId(boot_id), kind, OperationId(operation), parsed
            )
        case _:
            raise JournalCorrupt(f"record {row[0]!r}: a column has another type")
