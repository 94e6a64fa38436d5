# SPDX-License-Identifier: LGPL-2.1-or-later
"""The chain: canonical bytes, SHA-256 links and Ed25519 signatures. No I/O.

A record's hash covers the journal's id, its own fields and the hash before it; its signature covers the
hash. The signed head names the last record, and the checkpoint before the first one that is kept, so that
records missing at either end show. Each kind of signed bytes begins with its own words: none can be passed
off as another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from vmchannel_host.journal.types import JournalMisuse, Json

MAX_BODY: Final = 65_536
"""Largest canonical body of one record, in bytes."""

_GENESIS: Final = b"vmchannel journal genesis 1\0"
_RECORD: Final = b"vmchannel journal record 1\0"
_HEAD: Final = b"vmchannel journal head 1\0"


@dataclass(frozen=True, slots=True)
class Link:
    """The hashed content of a record. Times are whole microseconds: a float has no single spelling."""

    journal_id: str
    seq: int
    at_us: int
    boottime_us: int
    boot_id: str
    kind: str
    operation: str
    body: str  # canonical JSON
    prev: bytes

    def digest(self) -> bytes:
        """SHA-256 over the canonical bytes."""
        fields = (
            self.journal_id,
            self.seq,
            self.at_us,
            self.boottime_us,
            self.boot_id,
            self.kind,
            self.operation,
            self.body,
            self.prev.hex(),
        )
        return hashlib.sha256(_RECORD + _dump(fields).encode("ascii")).digest()


@dataclass(frozen=True, slots=True)
class Head:
    """What the signed head says: where the chain begins and ends."""

    journal_id: str
    checkpoint_seq: int  # last record that was pruned; 0: none
    checkpoint_hash: bytes  # its hash; the genesis hash when none
    seq: int  # last record; 0: none yet
    hash: bytes  # its hash; the genesis hash when none

    def signed_bytes(self) -> bytes:
        """What the head's signature covers, without the words in front."""
        fields = (
            self.journal_id,
            self.checkpoint_seq,
            self.checkpoint_hash.hex(),
            self.seq,
            self.hash.hex(),
        )
        return _dump(fields).encode("ascii")


def genesis(journal_id: str) -> bytes:
    """The hash before the first record; it differs between journals: none can lend another its records."""
    return hashlib.sha256(_GENESIS + journal_id.encode("utf-8")).digest()


def canonical(body: Mapping[str, Json]) -> str:
    """The one spelling of a body: ASCII JSON, sorted keys, no spaces.

    Raises:
        JournalMisuse: not JSON (NaN and infinity included), nested too deep, or over `MAX_BODY` bytes.
    """
    try:
        text = _dump(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise JournalMisuse(f"the body is no JSON: {error}") from error
    if len(text) > MAX_BODY:
        raise JournalMisuse(f"the body has {len(text)} bytes, at most {MAX_BODY} are allowed")
    return text


def parse_body(text: str) -> Mapping[str, Json]:
    """Read a stored body.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        value: object = json.loads(text)
    except RecursionError as error:
        raise ValueError("the body is nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("the body is no JSON object")
    return cast("Mapping[str, Json]", value)


class Verifier:
    """Checks signatures against one public key."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.fingerprint: Final = hashlib.sha256(raw).hexdigest()

    def record(self, digest: bytes, signature: bytes) -> bool:
        """Whether the key signed a record of that hash."""
        return self._check(_RECORD + digest, signature)

    def head(self, head: Head, signature: bytes) -> bool:
        """Whether the key signed that head."""
        return self._check(_HEAD + head.signed_bytes(), signature)

    def _check(self, data: bytes, signature: bytes) -> bool:
        try:
            self._key.verify(signature, data)
        except InvalidSignature:
            return False
        return True


class Signer:
    """Signs with the journal's private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.verifier: Final = Verifier(key.public_key())

    def record(self, digest: bytes) -> bytes:
        """The signature of a record with that hash."""
        return self._key.sign(_RECORD + digest)

    def head(self, head: Head) -> bytes:
        """The signature of a head."""
        return self._key.sign(_HEAD + head.signed_bytes())


def _dump(value: Json | Sequence[Json]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
