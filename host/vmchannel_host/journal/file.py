# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's SQLite file: its schema, making it once, opening it, its head. Blocking."""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from vmchannel_host.journal.chain import Head, Signer, genesis
from vmchannel_host.journal.keys import (
    create_private_key,
    load_signer,
    public_key_path,
    sync_directory,
)
from vmchannel_host.journal.types import (
    JournalCorrupt,
    JournalDamaged,
    JournalDisk,
    JournalError,
    JournalFull,
)
from vmchannel_host.model import BootId

SCHEMA_VERSION: Final = 1

SqlValue: TypeAlias = "int | float | str | bytes | None"
Row: TypeAlias = tuple[SqlValue, ...]

_SCHEMA: Final = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE records (seq INTEGER PRIMARY KEY, at_us INTEGER NOT NULL, boottime_us INTEGER NOT NULL,
        boot_id TEXT NOT NULL, kind TEXT NOT NULL, operation TEXT NOT NULL, body TEXT NOT NULL,
        prev BLOB NOT NULL, hash BLOB NOT NULL, signature BLOB NOT NULL)""",
    "CREATE INDEX records_of_operation ON records (operation, seq) WHERE operation != ''",
    """CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 1), checkpoint_seq INTEGER NOT NULL,
        checkpoint_hash BLOB NOT NULL, seq INTEGER NOT NULL, hash BLOB NOT NULL, signature BLOB NOT NULL)""",
    """CREATE TABLE operations (id TEXT PRIMARY KEY, first_seq INTEGER NOT NULL, last_seq INTEGER NOT NULL,
        records INTEGER NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX operations_by_age ON operations (last_seq)",
    """CREATE TABLE instances (id INTEGER PRIMARY KEY, host TEXT NOT NULL, boot_id TEXT NOT NULL,
        pid INTEGER NOT NULL, start_time INTEGER NOT NULL, executable BLOB NOT NULL, vm_uuid TEXT NOT NULL,
        name BLOB NOT NULL, migration TEXT NOT NULL, first_seen REAL NOT NULL, ended_at REAL, proof TEXT,
        cause TEXT, io TEXT, departed INTEGER, elapsed_ms INTEGER, killed INTEGER NOT NULL DEFAULT 0,
        confirmed_by BLOB, pid_namespace INTEGER NOT NULL DEFAULT 0,
        UNIQUE (host, boot_id, pid, start_time, vm_uuid, executable))""",
    "CREATE INDEX instances_of_vm ON instances (vm_uuid)",
    """CREATE TABLE aliases (vm_uuid TEXT NOT NULL, refused INTEGER NOT NULL, node_name BLOB NOT NULL,
        source TEXT NOT NULL, claimed_at REAL NOT NULL, PRIMARY KEY (vm_uuid, refused)) WITHOUT ROWID""",
    """CREATE TABLE guest_boots (vm_uuid TEXT NOT NULL, boot_id TEXT NOT NULL, seen_seq INTEGER NOT NULL,
        PRIMARY KEY (vm_uuid, boot_id)) WITHOUT ROWID""",
    """CREATE TABLE requests (request_id BLOB PRIMARY KEY, requester TEXT NOT NULL, digest BLOB NOT NULL,
        operation TEXT NOT NULL, deadline REAL NOT NULL, boot_id TEXT NOT NULL, stored_at REAL NOT NULL,
        answer BLOB)""",
)


_LATER_COLUMNS: Final = {"pid_namespace": "INTEGER NOT NULL DEFAULT 0", "confirmed_by": "BLOB"}
"""Of the table of instances: what journals of earlier versions lack."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """What a store needs to open."""

    path: Path
    key_path: Path
    boot_id: BootId
    wall_clock: Callable[[], float]
    boottime: Callable[[], float]


@contextmanager
def translated(path: Path) -> Generator[None]:
    """Turn SQLite's errors into the journal's."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translate(path, error) from error


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open the file, never making it.

    Raises:
        JournalCorrupt: missing or no data base.
        JournalError: not readable, or others may read it.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error
    if not read_only and mode & 0o077:
        raise JournalError(f"{path}: others may read the journal (mode {mode & 0o7777:04o}): chmod 0600")
    address = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"
    with translated(path):
        connection = sqlite3.connect(address, uri=True, isolation_level=None, timeout=2.0)
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA temp_store = MEMORY")  # another full disk must not fail a call
            connection.execute("PRAGMA cache_size = -8192")  # KiB: what growing touches at once
        except BaseException:
            connection.close()
            raise
    return connection


def read_meta(connection: sqlite3.Connection, path: Path) -> dict[str, str]:
    """The journal's id, schema version and key.

    Raises:
        JournalCorrupt: it is no journal, or of another version.
    """
    tables = connection.execute(
        "SELECT count(*) FROM sqlite_master WHERE name IN ('meta', 'head')"
    ).fetchone()
    if tables[0] != 2:
        raise JournalCorrupt(f"{path}: not a journal")
    meta = {str(key): str(value) for key, value in connection.execute("SELECT key, value FROM meta")}
    if meta.get("schema") != str(SCHEMA_VERSION):
        raise JournalCorrupt(f"{path}: schema {meta.get('schema')}, this program knows {SCHEMA_VERSION}")
    if not {"journal_id", "public_key"} <= meta.keys():
        raise JournalCorrupt(f"{path}: its id or key is missing")
    return meta


def read_head(connection: sqlite3.Connection, path: Path) -> tuple[Head, bytes]:
    """The head and its signature, unchecked.

    Raises:
        JournalCorrupt: there is none, or it is malformed.
    """
    meta = read_meta(connection, path)
    row = connection.execute(
        "SELECT checkpoint_seq, checkpoint_hash, seq, hash, signature FROM head"
    ).fetchone()
    if row is None or [type(value) for value in row] != [int, bytes, int, bytes, bytes]:
        raise JournalCorrupt(f"{path}: the signed head is missing or malformed")
    return Head(meta["journal_id"], row[0], row[1], row[2], row[3]), row[4]


def add_columns(connection: sqlite3.Connection) -> None:
    """Give a journal of an earlier version what it lacks; in the caller's transaction."""
    present = {row[1] for row in connection.execute("PRAGMA table_info(instances)")}
    for column, kind in _LATER_COLUMNS.items():
        if present and column not in present:
            connection.execute(f"ALTER TABLE instances ADD COLUMN {column} {kind}")


def write_head(connection: sqlite3.Connection, head: Head, signer: Signer) -> None:
    """Replace the signed head, in the transaction of what it names."""
    connection.execute(
        "INSERT OR REPLACE INTO head VALUES (1, ?, ?, ?, ?, ?)",
        (head.checkpoint_seq, head.checkpoint_hash, head.seq, head.hash, signer.head(head)),
    )


def must_be_made(settings: StoreSettings) -> bool:
    """Whether this is a first start. A journal that vanished is not: its evidence would be lost unseen."""
    if settings.path.exists():
        return False
    remains = (public_key_path(settings.key_path), settings.path.with_name(settings.path.name + "-wal"))
    for path in remains:
        if path.exists():
            raise JournalCorrupt(
                f"{settings.path}: missing, but {path} exists: restore the journal, or move its key and "
                "public key away too to begin a new one without its evidence"
            )
    return True


def make(settings: StoreSettings) -> None:
    """Make the file under another name and rename it when it is whole; the public key is written last."""
    if not settings.key_path.exists():
        create_private_key(settings.key_path)
    signer = load_signer(settings.key_path)
    new = settings.path.with_name(settings.path.name + ".new")
    journal_id = str(uuid.uuid4())
    start = genesis(journal_id)
    try:
        new.unlink(missing_ok=True)
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with translated(new), closing(connect(new)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # kept in the file: opening never writes
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                connection.execute(statement)
            meta = {
                "schema": str(SCHEMA_VERSION),
                "journal_id": journal_id,
                "public_key": signer.verifier.fingerprint,
            }
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            write_head(connection, Head(journal_id, 0, start, 0, start), signer)
            connection.execute("COMMIT")
        new.replace(settings.path)
        sync_directory(settings.path.parent)
    except OSError as error:
        raise JournalError(f"{settings.path}: {error.strerror}") from error


def _translate(path: Path, error: sqlite3.Error) -> JournalError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    match code:
        case sqlite3.SQLITE_FULL:
            return JournalFull(f"{path}: the disk is full")
        case (
            sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_FORMAT | sqlite3.SQLITE_CONSTRAINT
        ):
            return JournalDamaged(f"{path}: damaged ({error}): restore a backup")
        case sqlite3.SQLITE_IOERR:
            return JournalDisk(f"{path}: the disk failed ({error})")
        case _:
            return JournalError(f"{path}: {error}")
