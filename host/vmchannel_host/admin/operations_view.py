# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations as the operator sees them, read from the journal's records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vmchannel_host.admin.view import OperationStep, OperationView
from vmchannel_host.fencing import codec
from vmchannel_host.journal.types import Json, OperationRows, Record

_OPERATOR = "operator"


def summary(rows: OperationRows, host: str, *, running: bool, phase: str = "") -> OperationView:
    """An operation by its first and last record."""
    return _view((rows.first, rows.last), host, running=running, phase=phase)


def full(records: Sequence[Record], host: str, *, running: bool, phase: str = "") -> OperationView:
    """An operation by all its records, with its steps."""
    return _view(records, host, running=running, phase=phase, steps=tuple(map(_step, records)))


def _view(
    records: Sequence[Record],
    host: str,
    *,
    running: bool,
    phase: str,
    steps: tuple[OperationStep, ...] = (),
) -> OperationView:
    first, last = records[0], records[-1]
    ended = last.kind in (codec.OUTCOME, codec.REFUSED, codec.CHECK)
    said: Mapping[str, Json] = last.body if ended else {}
    told = {**first.body, **said}
    return OperationView(
        id=first.operation,
        action=_text(told, "action"),
        vm_uuid=_text(told, "vm"),
        vm_name=_text(told, "name"),
        requester=_text(told, "requester") or _OPERATOR,
        host=_text(first.body, "coordinator") or host,
        running=running,
        phase=phase or ("ended" if ended else "interrupted"),
        code=_text(said, "code"),
        ok=said.get("ok") is True,
        reason=_text(said, "reason"),
        begun_at=first.at,
        elapsed_ms=_number(said, "elapsed_ms"),
        evidence=_lines(said, "evidence"),
        steps=steps,
    )


def _step(record: Record) -> OperationStep:
    body = record.body
    match record.kind:
        case codec.INTENT:
            text = f"intent: {_text(body, 'action')} {_text(body, 'name') or _text(body, 'vm')}"
        case codec.PHASE:
            text = f"phase: {_text(body, 'phase')}"
        case codec.OUTCOME | codec.REFUSED | codec.CHECK:
            text = f"{_text(body, 'code')}: {_text(body, 'reason')}"
        case _:
            text = _text(body, "text") or record.kind
    return OperationStep(record.at, text)


def _text(body: Mapping[str, Json], key: str) -> str:
    value = body.get(key)
    return value if isinstance(value, str) else ""


def _number(body: Mapping[str, Json], key: str) -> int:
    value = body.get(key)
    return int(value) if isinstance(value, int | float) else 0


def _lines(body: Mapping[str, Json], key: str) -> tuple[str, ...]:
    value = body.get(key)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return ()
    return tuple(line for line in value if isinstance(line, str))
