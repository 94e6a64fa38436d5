# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the journal holds of a fence operation: intents, evidence and outcomes as JSON, and intents back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias, assert_never

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from vmchannel_host.fencing import evidence
from vmchannel_host.fencing.ordered import (
    EndReport,
    FailureReport,
    Intent,
    LookReport,
    Outcome,
    Phase,
    Process,
    Report,
    ResetReport,
    StartReport,
)
from vmchannel_host.journal.types import Json
from vmchannel_host.model import (
    BootId,
    HostName,
    InstanceEnded,
    OperationId,
    PidNamespace,
    ProcessIdentity,
    VmUuid,
)

INTENT = "fence.intent"
EVIDENCE = "fence.evidence"
PHASE = "fence.phase"
OUTCOME = "fence.outcome"
REFUSED = "fence.refused"
CHECK = "fence.check"

STEPS = (INTENT, PHASE, EVIDENCE, OUTCOME)
"""The kinds of the records of one operation."""


Body: TypeAlias = Mapping[str, Json]
"""The JSON of a record."""


class Unreadable(Exception):
    """A record is not what this version writes."""


def intent_body(intent: Intent) -> Body:
    """The body of a `fence.intent` record."""
    return {
        "action": intent.action.name.lower(),
        "vm": intent.vm,
        "name": evidence.cut(intent.name),
        "requester": intent.requester,
        "requested_at": intent.requested_at,
        "coordinator": intent.coordinator,
        "boot_id": intent.boot_id,
        "begun_at": intent.begun_at,
        "end": intent.end,
        "hosts": list(intent.hosts),
        "named": [_process(one) for one in intent.named],
        "recognised": intent.recognised,
        "request_id": intent.request_id.hex(),
    }


def read_intent(operation: OperationId, body: Body, resumed: Phase) -> Intent:
    """The intent of a record, to be taken up at a phase.

    Raises:
        Unreadable: something is missing or of another kind.
    """
    requester = body.get("requester")
    return Intent(
        operation=operation,
        action=_action(_text(body, "action")),
        vm=VmUuid(_text(body, "vm")),
        name=_text(body, "name"),
        requester=VmUuid(requester) if isinstance(requester, str) else None,
        requested_at=_number(body, "requested_at"),
        coordinator=HostName(_text(body, "coordinator")),
        boot_id=BootId(_text(body, "boot_id")),
        begun_at=_number(body, "begun_at"),
        end=_number(body, "end"),
        hosts=tuple(HostName(str(host)) for host in _items(body, "hosts")),
        named=tuple(_read_process(one) for one in _items(body, "named")),
        recognised=body.get("recognised") is True,
        request_id=_hex(body, "request_id"),
        resumed=resumed,
    )


def read_phase(word: str) -> Phase:
    """The phase that a `fence.phase` record names.

    Raises:
        Unreadable: no phase of this version.
    """
    try:
        return Phase(word)
    except ValueError as error:
        raise Unreadable(f"unknown phase {word!r}") from error


def outcome_body(outcome: Outcome, intent: Intent, elapsed_ms: int) -> Body:
    """The body of a `fence.outcome` record; it names the operation again, for whoever reads only this."""
    return {
        "ok": outcome.ok,
        "code": outcome.code.name.lower(),
        "state": outcome.state.name.lower(),
        "reason": outcome.reason,
        "evidence": list(outcome.evidence),
        "action": intent.action.name.lower(),
        "vm": intent.vm,
        "name": evidence.cut(intent.name),
        "requester": intent.requester,
        "elapsed_ms": elapsed_ms,
    }


def read_outcome(operation: OperationId, body: Body) -> Outcome:
    """The outcome of a record.

    Raises:
        Unreadable: something is missing or of another kind.
    """
    try:
        code = FenceCode[_text(body, "code").upper()]
        state = PowerState[_text(body, "state").upper()]
    except KeyError as error:
        raise Unreadable(f"unknown word {error}") from error
    lines = tuple(str(line) for line in _items(body, "evidence"))
    return Outcome(operation, body.get("ok") is True, code, state, _text(body, "reason"), lines)


def report_body(report: Report, vm: VmUuid) -> Body:
    """The body of a `fence.evidence` record: what a host reported."""
    match report:
        case EndReport(evidence=end):
            return {"kind": "ended", "text": evidence.end_line(end), **_end(end)}
        case ResetReport(evidence=reset):
            return {
                "kind": "reset",
                "text": evidence.reset_line(reset),
                **_process(Process(reset.host, reset.identity)),
                "elapsed_ms": reset.elapsed_ms,
            }
        case LookReport():
            return _look(report, vm)
        case StartReport(host=host, error=error):
            text = f"start on {host} {'failed: ' + evidence.cut(error) if error else 'returned'}"
            return {"kind": "start", "text": text, "host": host}
        case FailureReport(host=host, part=part, reason=reason):
            text = f"{part.value} on {host} failed: {evidence.cut(reason)}"
            return {"kind": "failure", "text": text, "host": host, "part": part.value}
        case _:
            assert_never(report)


def _end(end: InstanceEnded) -> dict[str, Json]:
    return {
        **_process(Process(end.host, end.identity)),
        "proof": end.proof.value,
        "cause": end.cause.value,
        "io": end.io.value,
        "departed": end.departed,
        "elapsed_ms": end.elapsed_ms,
    }


def _look(report: LookReport, vm: VmUuid) -> dict[str, Json]:
    found = [one for one in report.look.instances if one.vm_uuid == vm]
    return {
        "kind": "look",
        "text": evidence.look_line(report, vm),
        "host": report.look.host,
        "round": report.round,
        "at": report.look.at_boottime,
        "found": [
            {"pid": one.identity.pid, "start_time": one.identity.start_time, "state": one.run_state.value}
            for one in found
        ],
        "silent": [evidence.cut(reason) for reason in evidence.silent_reasons(report.look, vm)],
        "unproven": [_process(Process(report.look.host, one)) for one in report.unproven],
        "removed": [evidence.cut(line) for line in report.removed],
        "departed": evidence.cut(report.departed),
        "conflict": evidence.cut(report.conflict),
    }


def _process(process: Process) -> dict[str, Json]:
    identity = process.identity
    return {
        "host": process.host,
        "pid": identity.pid,
        "start_time": identity.start_time,
        "executable": identity.executable,
        "vm": identity.vm_uuid,
        "boot_id": identity.boot_id,
        "pid_namespace": identity.pid_namespace,
    }


def _read_process(value: Json) -> Process:
    if not isinstance(value, Mapping):
        raise Unreadable("a process is no object")
    identity = ProcessIdentity(
        pid=_whole(value, "pid"),
        start_time=_whole(value, "start_time"),
        executable=_text(value, "executable"),
        vm_uuid=VmUuid(_text(value, "vm")),
        boot_id=BootId(_text(value, "boot_id")),
        pid_namespace=PidNamespace(_whole(value, "pid_namespace") if "pid_namespace" in value else 0),
    )
    return Process(HostName(_text(value, "host")), identity)


def _action(word: str) -> FenceAction:
    try:
        return FenceAction[word.upper()]
    except KeyError as error:
        raise Unreadable(f"unknown action {word!r}") from error


def _text(body: Body, key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise Unreadable(f"{key} is no text")
    return value


def _hex(body: Body, key: str) -> bytes:
    try:
        return bytes.fromhex(_text(body, key))
    except ValueError as error:
        raise Unreadable(f"{key} is not hexadecimal") from error


def _whole(body: Body, key: str) -> int:
    value = body.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unreadable(f"{key} is no whole number")
    return value


def _number(body: Body, key: str) -> float:
    value = body.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unreadable(f"{key} is no number")
    try:
        number = float(value)
    except OverflowError as error:
        raise Unreadable(f"{key} is too large") from error
    if not math.isfinite(number):  # JSON's reader lets these pass
        raise Unreadable(f"{key} is {number}")
    return number


def _items(body: Body, key: str) -> Sequence[Json]:
    value = body.get(key)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise Unreadable(f"{key} is no list")
    return value
