# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's working tables: instances, aliases, requests. Blocking; called inside a store's transaction.

What a later claim may rest on (a process seen, an end, an alias) goes into the signed chain as well.
Free text is stored as bytes: a path or a name may hold what is no valid UTF-8, and must come back the same.
"""

from __future__ import annotations

from vmchannel_host.journal.file import Row
from vmchannel_host.journal.store import JournalStore
from vmchannel_host.journal.types import (
    LIVED,
    JournalCorrupt,
    JournalMisuse,
    Json,
    KnownInstance,
    StoredAlias,
    StoredRequest,
)
from vmchannel_host.model import (
    BootId,
    EndCause,
    EndProof,
    HostName,
    InstanceEnded,
    IoState,
    Migration,
    OperationId,
    PidNamespace,
    ProcessIdentity,
    VmUuid,
)

MAX_ANSWER = 65_536
"""Largest stored answer, in bytes."""

MAX_BOOTS = 64
"""Kernel boots that are remembered of one VM: its guest chooses the ids, so their number is bounded."""

_NONE = OperationId("")
_TOLD = 64  # processes that one record names


def remember_instance(
    store: JournalStore, identity: ProcessIdentity, name: str, host: HostName, migration: Migration
) -> None:
    """Insert a process, or give a known one its new name and migration."""
    known = _find(store, host, identity)
    if known is None:
        body: dict[str, Json] = {**_identity_body(host, identity), "name": name, "migration": migration.value}
        store.append("instance.seen", _NONE, body)
        _insert(store, identity, name, host, migration)
        return
    # Compared first: the same news again costs no write to the disk.
    store.connection.execute(
        """UPDATE instances SET name = ?2, migration = ?3, pid_namespace = ?4
            WHERE id = ?1 AND (name != ?2 OR migration != ?3 OR pid_namespace != ?4)""",
        (known, _bytes(name), migration.value, identity.pid_namespace),
    )


def remember_kill(store: JournalStore, identity: ProcessIdentity, host: HostName) -> None:
    """Mark a process that is about to be killed with writes perhaps under way; once."""
    row_id = _find(store, host, identity)
    if row_id is None:
        row_id = _insert(store, identity, "", host, Migration.UNKNOWN)
    row = store.connection.execute("SELECT killed FROM instances WHERE id = ?", (row_id,)).fetchone()
    if row is not None and row[0]:
        return
    store.append("instance.killed", _NONE, _identity_body(host, identity))
    store.connection.execute("UPDATE instances SET killed = 1 WHERE id = ?", (row_id,))


def remember_end(store: JournalStore, evidence: InstanceEnded) -> None:
    """Store how a process ended; a second proof may settle the I/O or add a departure, no more."""
    row_id = _find(store, evidence.host, evidence.identity)
    if row_id is None:
        row_id = _insert(store, evidence.identity, "", evidence.host, Migration.UNKNOWN)
    row = store.connection.execute(
        "SELECT proof, cause, io, departed, elapsed_ms FROM instances WHERE id = ?", (row_id,)
    ).fetchone()
    new = (
        evidence.proof.value,
        evidence.cause.value,
        evidence.io.value,
        evidence.departed,
        evidence.elapsed_ms,
    )
    if row is not None and row[0] is not None:
        io = evidence.io.value if row[2] == IoState.UNPROVEN.value else str(row[2])
        new = (str(row[0]), str(row[1]), io, bool(row[3]) or evidence.departed, int(row[4]))
        if new == (row[0], row[1], row[2], bool(row[3]), row[4]):
            return
    body: dict[str, Json] = dict(zip(("proof", "cause", "io", "departed", "elapsed_ms"), new, strict=True))
    store.append("instance.ended", _NONE, {**_identity_body(evidence.host, evidence.identity), **body})
    store.connection.execute(
        """UPDATE instances SET ended_at = coalesce(ended_at, ?), proof = ?, cause = ?, io = ?, departed = ?,
            elapsed_ms = ? WHERE id = ?""",
        (store.settings.wall_clock(), *new, row_id),
    )


def remember_confirmed(store: JournalStore, vm_uuid: VmUuid, by: str) -> None:
    """Store an operator's word that the VM is off: it covers the processes whose ends are stored by now."""
    rows = store.connection.execute(
        """SELECT pid, start_time, boot_id FROM instances
            WHERE vm_uuid = ? AND proof IS NOT NULL AND confirmed_by IS NULL ORDER BY id""",
        (vm_uuid,),
    ).fetchall()
    processes = [f"pid {pid} (start {start_time}, boot {boot_id})" for pid, start_time, boot_id in rows]
    body: dict[str, Json] = {
        "vm_uuid": vm_uuid,
        "by": by,
        "count": len(rows),
        "processes": processes[-_TOLD:],
    }
    store.append("vm.confirmed-off", _NONE, body)
    store.connection.execute(
        """UPDATE instances SET confirmed_by = ?
            WHERE vm_uuid = ? AND proof IS NOT NULL AND confirmed_by IS NULL""",
        (_bytes(by), vm_uuid),
    )


def known_instances(store: JournalStore, vm_uuid: VmUuid | None) -> list[KnownInstance]:
    """Every process ever seen (of one VM), oldest first."""
    rows = store.connection.execute(
        """SELECT host, pid, start_time, executable, vm_uuid, boot_id, pid_namespace, name, migration,
            first_seen, killed, confirmed_by, ended_at, proof, cause, io, departed, elapsed_ms FROM instances
            WHERE ?1 IS NULL OR vm_uuid = ?1 ORDER BY id""",
        (vm_uuid,),
    )
    return [_to_instance(row) for row in rows]


def remember_alias(store: JournalStore, alias: StoredAlias) -> None:
    """Store a claim. An accepted one replaces all claims of the VM, a refused one only its refused one."""
    text = (alias.vm_uuid, alias.refused, _bytes(alias.node_name), alias.source)
    if alias.refused:
        gone = store.connection.execute(
            "SELECT vm_uuid, refused, node_name, source FROM aliases WHERE vm_uuid = ? AND refused",
            (alias.vm_uuid,),
        ).fetchall()
    else:
        gone = store.connection.execute(
            "SELECT vm_uuid, refused, node_name, source FROM aliases WHERE vm_uuid = ?", (alias.vm_uuid,)
        ).fetchall()
    if gone == [text]:
        return  # the same announcement again, as after each reconnect
    store.append(
        "alias.claimed",
        _NONE,
        {
            "vm_uuid": alias.vm_uuid,
            "node_name": alias.node_name,
            "source": alias.source,
            "refused": alias.refused,
        },
    )
    if not alias.refused:
        store.connection.execute("DELETE FROM aliases WHERE vm_uuid = ?", (alias.vm_uuid,))
    store.connection.execute(
        "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?, ?)", (*text, alias.claimed_at)
    )


def aliases(store: JournalStore) -> list[StoredAlias]:
    """All claims that stand, oldest first."""
    rows = store.connection.execute(
        """SELECT vm_uuid, node_name, source, claimed_at, refused FROM aliases
            ORDER BY claimed_at, vm_uuid, refused"""
    )
    return [
        StoredAlias(VmUuid(vm), _text(name), source, claimed_at, bool(refused))
        for vm, name, source, claimed_at, refused in rows
    ]


def remember_boot(store: JournalStore, vm_uuid: VmUuid, boot_id: str) -> int:
    """Where in the chain a guest's kernel boot was first seen; the oldest beyond MAX_BOOTS are forgotten."""
    row = store.connection.execute(
        "SELECT seen_seq FROM guest_boots WHERE vm_uuid = ? AND boot_id = ?", (vm_uuid, boot_id)
    ).fetchone()
    if row is not None:
        return int(row[0])
    seen = store.last_seq
    store.connection.execute("INSERT INTO guest_boots VALUES (?, ?, ?)", (vm_uuid, boot_id, seen))
    store.connection.execute(
        """DELETE FROM guest_boots WHERE vm_uuid = ?1 AND boot_id != ?2 AND boot_id NOT IN (
            SELECT boot_id FROM guest_boots WHERE vm_uuid = ?1 ORDER BY seen_seq DESC LIMIT ?3)""",
        (vm_uuid, boot_id, MAX_BOOTS),
    )
    return seen


def remember_request(store: JournalStore, request: StoredRequest) -> None:
    """Store a request once."""
    if find_request(store, request.request_id) is not None:
        raise JournalMisuse(f"request {request.request_id.hex()} is stored already")
    store.connection.execute(
        "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
        (
            request.request_id,
            request.requester,
            request.digest,
            request.operation,
            request.deadline,
            request.boot_id,
            store.settings.wall_clock(),
        ),
    )


def remember_answer(store: JournalStore, request_id: bytes, answer: bytes) -> None:
    """Store the answer of a stored request, once."""
    if len(answer) > MAX_ANSWER:
        raise JournalMisuse(f"the answer has {len(answer)} bytes, at most {MAX_ANSWER} are allowed")
    request = find_request(store, request_id)
    if request is None:
        raise JournalMisuse(f"request {request_id.hex()} is not stored")
    if request.answer is not None:
        if request.answer != answer:
            raise JournalMisuse(f"request {request_id.hex()} has another answer already")
        return
    store.connection.execute("UPDATE requests SET answer = ? WHERE request_id = ?", (answer, request_id))


def interrupt_requests(store: JournalStore, vm_uuid: VmUuid, now: float) -> None:
    """Let the requests of that VM whose deadline is to come be nobody's: their requester was interrupted.

    `now`: CLOCK_BOOTTIME, seconds.
    """
    store.connection.execute(
        """UPDATE requests SET requester = requester || ' interrupted'
            WHERE boot_id = ? AND deadline > ? AND substr(requester, 1, length(?)) = ?""",
        (store.settings.boot_id, now, f"{vm_uuid} ", f"{vm_uuid} "),
    )


def find_request(store: JournalStore, request_id: bytes) -> StoredRequest | None:
    """The stored request of that id."""
    row = store.connection.execute(
        """SELECT request_id, requester, digest, operation, deadline, boot_id, answer FROM requests
            WHERE request_id = ?""",
        (request_id,),
    ).fetchone()
    if row is None:
        return None
    key, requester, digest, operation, deadline, boot_id, answer = row
    return StoredRequest(key, requester, digest, OperationId(operation), deadline, BootId(boot_id), answer)


def prune_tables(store: JournalStore, before: float) -> None:
    """Remove old requests, and old ended processes of VMs that were seen to live again since.

    Until then an end is evidence, however old it is: that the VM left, that its last writes are unproven, or
    that it is off, which "already off" rests on (S1). A wall clock that was set ahead takes away no request
    that may still be repeated (S5).
    """
    settings = store.settings
    store.connection.execute(
        "DELETE FROM requests WHERE stored_at < ? AND NOT (boot_id = ? AND deadline > ?)",
        (before, settings.boot_id, settings.boottime()),
    )
    store.connection.execute(
        """DELETE FROM instances WHERE id IN (
            SELECT old.id FROM instances AS old WHERE old.ended_at < ? AND EXISTS (
                SELECT 1 FROM instances AS living WHERE living.vm_uuid = old.vm_uuid
                    AND living.first_seen > old.ended_at AND living.migration IN (?, ?)))""",
        (before, *(migration.value for migration in LIVED)),
    )


def _find(store: JournalStore, host: HostName, identity: ProcessIdentity) -> int | None:
    row = store.connection.execute(
        """SELECT id FROM instances WHERE host = ? AND boot_id = ? AND pid = ? AND start_time = ?
            AND vm_uuid = ? AND executable = ?""",
        (
            host,
            identity.boot_id,
            identity.pid,
            identity.start_time,
            identity.vm_uuid,
            _bytes(identity.executable),
        ),
    ).fetchone()
    return None if row is None else int(row[0])


def _insert(
    store: JournalStore, identity: ProcessIdentity, name: str, host: HostName, migration: Migration
) -> int:
    cursor = store.connection.execute(
        """INSERT INTO instances (host, boot_id, pid_namespace, pid, start_time, executable, vm_uuid, name,
            migration, first_seen) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        (
            host,
            identity.boot_id,
            identity.pid_namespace,
            identity.pid,
            identity.start_time,
            _bytes(identity.executable),
            identity.vm_uuid,
            _bytes(name),
            migration.value,
            store.settings.wall_clock(),
        ),
    )
    if cursor.lastrowid is None:
        raise JournalCorrupt("a row was inserted without an id")
    return cursor.lastrowid


def _to_instance(row: Row) -> KnownInstance:
    try:
        return _parse_instance(row)
    except ValueError as error:
        raise JournalCorrupt(f"a stored instance is malformed: {error}") from error


def _parse_instance(row: Row) -> KnownInstance:
    match row:
        case (
            str(host),
            int(pid),
            int(start_time),
            bytes(executable),
            str(vm_uuid),
            str(boot_id),
            int(pid_namespace),
            bytes(name),
            str(migration),
            float(first_seen),
            int(killed),
            bytes() | None as confirmed_by,
            *rest,
        ):
            vm, boot, namespace = VmUuid(vm_uuid), BootId(boot_id), PidNamespace(pid_namespace)
            identity = ProcessIdentity(pid, start_time, _text(executable), vm, boot, namespace)
        case _:
            raise ValueError("a column has another type")
    match rest:
        case [None, None, None, None, None, None]:
            end, ended_at = None, None
        case [float(ended_at), str(proof), str(cause), str(io), int(departed), int(elapsed_ms)]:
            end = InstanceEnded(
                HostName(host),
                identity,
                EndProof(proof),
                EndCause(cause),
                IoState(io),
                bool(departed),
                elapsed_ms,
            )
        case _:
            raise ValueError("its end has a column of another type")
    return KnownInstance(
        HostName(host),
        identity,
        _text(name),
        Migration(migration),
        first_seen,
        end,
        ended_at,
        killed=bool(killed),
        confirmed_by=_text(confirmed_by or b""),
    )


def _identity_body(host: HostName, identity: ProcessIdentity) -> dict[str, Json]:
    return {
        "host": host,
        "pid": identity.pid,
        "start_time": identity.start_time,
        "executable": identity.executable,
        "vm_uuid": identity.vm_uuid,
        "boot_id": identity.boot_id,
        "pid_namespace": identity.pid_namespace,
    }


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
