# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies of a journal: a verified backup of one that may be open, and putting one back. Blocking."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from vmchannel_host.journal.file import connect, translated
from vmchannel_host.journal.keys import load_signer, public_key_path, sync_directory, take_lock
from vmchannel_host.journal.mark import mark_path
from vmchannel_host.journal.types import JournalCorrupt, JournalError, VerifyResult
from vmchannel_host.journal.verify import verify_file

BEFORE = ".before-restore"
"""Suffix of the journal that a restored one replaced."""


def back_up(path: Path, key_path: Path, target: Path) -> VerifyResult:
    """Copy the journal to a new file, whole, also while the daemon writes; check every record of the copy.

    Raises:
        JournalError: it cannot be read or is not whole, or the copy cannot be written; there is no copy then.
    """
    if target.exists():
        raise JournalError(f"{target}: exists already")
    return _copy(path, key_path, target)


def restore(source: Path, path: Path, key_path: Path) -> VerifyResult:
    """Put a backup in the journal's place; what was there is kept beside it (`BEFORE`).

    The next daemon notices by the missing mark that the journal is older than it was.

    Raises:
        JournalLocked: the daemon runs.
        JournalCorrupt: the backup is not whole, or of another key.
        JournalError: a file cannot be read or written.
    """
    load_signer(key_path)  # without it no daemon could use the journal
    lock = take_lock(path.with_name(path.name + ".lock"))
    try:
        new = path.with_name(path.name + ".restoring")
        new.unlink(missing_ok=True)
        result = _copy(source, key_path, new)
        mark_path(path).unlink(missing_ok=True)
        for suffix in ("", "-wal"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.replace(path.with_name(path.name + BEFORE + suffix))
        path.with_name(path.name + "-shm").unlink(missing_ok=True)
        new.replace(path)
        sync_directory(path.parent)
        return result
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error
    finally:
        os.close(lock)


def _copy(source: Path, key_path: Path, target: Path) -> VerifyResult:
    new = target.with_name(target.name + ".new")
    try:
        new.unlink(missing_ok=True)
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with (
            translated(source),
            closing(connect(source, read_only=True)) as old,
            closing(connect(new)) as copy,
        ):
            old.backup(copy)
        result = verify_file(new, public_key_path(key_path))
        if not result.ok:
            raise JournalCorrupt(f"{source}: {result.problem}")
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        new.replace(target)
        sync_directory(target.parent)
    except OSError as error:
        raise JournalError(f"{target}: {error.strerror}") from error
    finally:
        for left in (new, new.with_name(new.name + "-wal"), new.with_name(new.name + "-shm")):
            left.unlink(missing_ok=True)
    return result
