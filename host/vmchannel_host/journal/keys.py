# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's key files and lock file: made with tight modes, refused with loose ones. Blocking."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from vmchannel_host.journal.chain import Signer, Verifier
from vmchannel_host.journal.types import JournalCorrupt, JournalError, JournalLocked


def public_key_path(key_path: Path) -> Path:
    """Where the public key of a private key lies: beside it, suffix `.pub` added."""
    return key_path.with_name(key_path.name + ".pub")


def prepare_directory(path: Path) -> None:
    """Make a private directory, or check that nobody else can put files into an existing one.

    Raises:
        JournalError: it cannot be made, or group or others may write in it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        raise JournalError(f"{path}: not a directory")
    if mode & 0o022:
        raise JournalError(f"{path}: others may write in it (mode {stat.S_IMODE(mode):04o}): chmod 0700")


def take_lock(path: Path) -> int:
    """Lock the journal for this process until the descriptor that is returned is closed.

    flock, because it falls with the process however that ends, and is not inherited by what the daemon starts
    (the descriptor is close-on-exec).

    Raises:
        JournalLocked: another process holds it.
        JournalError: the lock file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"%d\n" % os.getpid())
    except BlockingIOError as error:
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise JournalLocked(
            f"{path}: another daemon (pid {holder or 'unknown'}) has the journal open"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise JournalError(f"{path}: {error.strerror}") from error
    return descriptor


def load_signer(key_path: Path) -> Signer:
    """Read the private key.

    Raises:
        JournalCorrupt: it is missing or no Ed25519 key.
        JournalError: unreadable, or readable by others.
    """
    try:
        with open(key_path, "rb", opener=_open_no_follow) as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(16_384)
    except FileNotFoundError as error:
        raise JournalCorrupt(f"{key_path}: the journal's key is missing: restore it") from error
    except OSError as error:
        raise JournalError(f"{key_path}: {error.strerror}") from error
    if mode & 0o077:
        raise JournalError(f"{key_path}: others may read the key (mode {stat.S_IMODE(mode):04o}): chmod 0600")
    try:
        key = load_pem_private_key(text, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise JournalCorrupt(f"{key_path}: not a private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise JournalCorrupt(f"{key_path}: not an Ed25519 key")
    return Signer(key)


def load_verifier(path: Path) -> Verifier:
    """Read a public key (PEM).

    Raises:
        JournalError: unreadable or no Ed25519 public key.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise JournalError(f"{path}: not a public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise JournalError(f"{path}: not an Ed25519 key")
    return Verifier(key)


def create_private_key(key_path: Path) -> None:
    """Make a new private key, mode 0600, durable when this returns."""
    key = Ed25519PrivateKey.generate()
    _write_durably(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)


def write_public_key(key_path: Path) -> None:
    """Write the public key beside the private key, mode 0644."""
    with open(key_path, "rb", opener=_open_no_follow) as file:
        key = load_pem_private_key(file.read(16_384), password=None)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _write_durably(public_key_path(key_path), public, 0o644)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error


def _open_no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
