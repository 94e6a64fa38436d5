# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the journal stores and gives back: frozen rows, and the tree of its errors.

::

    JournalError            nothing was stored or read: refuse what needed it (fail closed)
    ├── JournalCorrupt      what is stored is malformed, or does not belong to the key: restore a backup
    │   └── JournalDamaged  found by an open journal, which serves nothing any more: stop the daemon
    ├── JournalDisk         the disk failed under an open journal: mend it, start the daemon again
    ├── JournalFull         the disk is full: make room; what was stored before is safe
    │   └── JournalShort    the same, but what an `off` needs can still be stored
    ├── JournalLocked       another daemon has the journal open
    ├── JournalBusy         the deadline passed or too many calls wait: the outcome is unknown
    └── JournalMisuse       the caller broke a rule of the API (too large, not JSON, an id used twice)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from vmchannel_host.model import (
    BootId,
    HostName,
    InstanceEnded,
    Migration,
    OperationId,
    ProcessIdentity,
    VmUuid,
)

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


class JournalError(Exception):
    """The journal could not store or read. Whatever needed it must be refused."""


class JournalCorrupt(JournalError):
    """Damaged, missing beside its key, or signed by another key. It is never made anew silently."""


class JournalDamaged(JournalCorrupt):
    """The file of an open journal was damaged, replaced or removed; every later call raises this again."""


class JournalDisk(JournalError):
    """The disk failed under an open journal; every later call raises this again."""


class JournalFull(JournalError):
    """No room on the disk. Nothing of this call was stored."""


class JournalShort(JournalFull):
    """The disk is full, and the room that is left is kept for `off`. Nothing of this call was stored."""


class JournalLocked(JournalError):
    """Another process has the journal open."""


class JournalBusy(JournalError):
    """The call's deadline passed, or too many calls wait. It may or may not have been stored."""


class JournalMisuse(JournalError):
    """The caller's mistake: a body that is too large or no JSON, a request id stored twice."""


@dataclass(frozen=True, slots=True)
class Record:
    """One link of the chain."""

    seq: int  # from 1, without a gap
    at: float  # wall time, seconds since 1970: for people, never for deadlines
    boottime: float  # CLOCK_BOOTTIME, seconds
    boot_id: BootId  # the boot that `boottime` counts from
    kind: str  # dotted word, as "fence.intent"
    operation: OperationId  # "" when the record belongs to none
    body: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class OperationRows:
    """An operation, as its first and last record tell it; `Journal.operation` gives all of them."""

    operation: OperationId
    records: int
    first: Record
    last: Record


LIVED: Final = (Migration.NONE, Migration.OUTGOING)
"""As last watched of a process in which the VM was seen to live: it makes earlier ends of that VM history."""


@dataclass(frozen=True, slots=True)
class KnownInstance:
    """A process that ran a VM, as the journal remembers it; `end` is None until its end is proven (S1)."""

    host: HostName
    identity: ProcessIdentity
    name: str  # last name seen; "" when unknown; untrusted text
    migration: Migration  # as last watched: an end that nobody watched may be a departure
    first_seen: float  # wall time, seconds
    end: InstanceEnded | None
    ended_at: float | None  # wall time when the proof was stored, seconds
    killed: bool = False  # a SIGKILL was about to be sent while it could have writes under way
    confirmed_by: str = ""  # the operator who said after its end that the VM is off; "" when nobody did


@dataclass(frozen=True, slots=True)
class StoredAlias:
    """The node name that a VM announced last; it stays until that VM announces another."""

    vm_uuid: VmUuid
    node_name: str  # untrusted text
    source: str  # "corosync" or "hostname"
    claimed_at: float  # wall time, seconds
    refused: bool  # another VM held the name when this one claimed it


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A request that became an operation; its answer is kept so that the same id never acts twice (S5)."""

    request_id: bytes
    requester: str  # the incarnation it belongs to, as the fence service writes it
    digest: bytes  # of the request's content
    operation: OperationId
    deadline: float  # CLOCK_BOOTTIME, seconds, in `boot_id`
    boot_id: BootId
    answer: bytes | None  # None: no answer was stored (yet, or the daemon stopped before it)


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What a walk over the whole chain found."""

    ok: bool
    records: int  # links walked and found right
    first_seq: int  # 0 when the journal is empty; more than 1 when old records were pruned
    last_seq: int
    head_hash: str  # hex; keep a copy elsewhere to notice a journal that was put back to an older state
    public_key: str  # SHA-256 of the public key that was used, hex
    bad_seq: int | None = None  # first record that is wrong, or missing
    problem: str = ""  # one line, "" when ok
    restored_seq: int = 0  # the last record that says that the journal had been put back to an older state
