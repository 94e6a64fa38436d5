# SPDX-License-Identifier: LGPL-2.1-or-later
"""The admin API's JSON: frozen answers to text, request bodies to checked orders."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Final, NoReturn, cast

from fence_vmchannel.addresses import DEFAULT_PORT
from fence_vmchannel.messages import MAX_PLUG, REQUEST_ID_BYTES, FenceAction, FenceAnswer, FenceCode
from vmchannel_host.admin.view import ConfirmView, FenceOrder
from vmchannel_host.hot_plug import PlugOrder, PlugOutcome
from vmchannel_host.hypervisors import PlugProblem

MAX_TIMEOUT_S: Final = 3600.0
ORDERS: Final = (
    FenceAction.OFF,
    FenceAction.ON,
    FenceAction.REBOOT,
    FenceAction.STATUS,
)
"""What an operator may order for a VM."""


class AdminRefusal(Exception):
    """A request that gets an error instead of an answer.

    Attributes:
        status: of HTTP.
        code: a stable word.
        reason: one line for people.
        remedy: what to do about it.
    """

    def __init__(self, status: int, code: str, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.code = code
        self.reason = reason
        self.remedy = remedy

    @property
    def body(self) -> dict[str, str]:
        """As it is sent."""
        return {"code": self.code, "reason": self.reason, "remedy": self.remedy}


REMEDIES: Final[Mapping[FenceCode, tuple[int, str]]] = {
    FenceCode.DONE: (200, ""),
    FenceCode.ALREADY: (200, ""),
    FenceCode.FAILED: (500, "read the evidence in `vmchannelctl ops ID`; nothing may be taken as off"),
    FenceCode.UNKNOWN_PLUG: (404, "see `vmchannelctl vms` for the names that are known"),
    FenceCode.AMBIGUOUS: (409, "name the VM by its UUID, or pin the name in `aliases` of host.yaml"),
    FenceCode.REFUSED: (403, "change the group in host.yaml or policy.d, then reload the daemon"),
    FenceCode.BUSY: (409, "wait for the operation that it names"),
    FenceCode.DEADLINE: (504, "the outcome is unknown: look with `vmchannelctl ops ID`, then try again"),
    FenceCode.STALE: (409, "ask again with a new request id"),
    FenceCode.MIGRATED_AWAY: (500, "fence it on the host where it runs now"),
    FenceCode.UNAVAILABLE: (503, "see `vmchannelctl status`"),
    FenceCode.BAD_REQUEST: (400, "mend the request"),
    FenceCode.NOT_STARTED: (500, "it is off; start it by hand and see why it did not start"),
    FenceCode.VOID: (403, "the asker is itself being fenced"),
}
"""The HTTP status and the remedy for each code. A failed fence is no 2xx: `curl --fail` must fail too."""


def to_json(value: object) -> object:
    """Plain JSON values of a frozen answer: ids of bytes become hex, enums their names in lower case."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in cast("list[object] | tuple[object, ...]", value)]
    return value


def dump(value: object) -> str:
    """One line of ASCII JSON."""
    return json.dumps(to_json(value), separators=(",", ":"), ensure_ascii=True)


def answer_status(answer: FenceAnswer) -> int:
    """The HTTP status of a fence's answer; 2xx only for `ok`."""
    if answer.ok:
        return 200
    status = REMEDIES[answer.code][0]
    return 500 if status == 200 else status


def answer_json(answer: FenceAnswer) -> dict[str, object]:
    """A fence's answer, with the remedy that goes with its code."""
    body = cast("dict[str, object]", to_json(answer))
    body["remedy"] = "" if answer.ok else REMEDIES[answer.code][1]
    return body


def confirm_status(told: ConfirmView) -> int:
    """The HTTP status of what became of an operator's word; 2xx only when it counts."""
    return 200 if told.ok else _CONFIRM_STATUS.get(told.code, 500)


def confirm_json(told: ConfirmView) -> dict[str, object]:
    """What became of an operator's word, with the remedy that goes with its code."""
    body = cast("dict[str, object]", to_json(told))
    remedy = _CONFIRM_REMEDIES.get(told.code, REMEDIES[told.code][1])
    body["remedy"] = "" if told.ok else remedy
    return body


_CONFIRM_REMEDIES: Final[Mapping[FenceCode, str]] = {
    FenceCode.FAILED: "what can be proven must be: `vmchannelctl fence off VM`, then confirm what is left",
    FenceCode.BUSY: "wait for the operation that it names",
}
_CONFIRM_STATUS: Final[Mapping[FenceCode, int]] = {
    FenceCode.UNKNOWN_PLUG: 404,
    FenceCode.AMBIGUOUS: 409,
    FenceCode.BUSY: 409,
    FenceCode.FAILED: 409,
    FenceCode.UNAVAILABLE: 503,
}


def plug_status(told: PlugOutcome) -> int:
    """The HTTP status of an attach or detach; 2xx only when the VM is as it was ordered."""
    return 200 if told.ok else _PLUG_STATUS.get(told.code, 500)


def plug_json(told: PlugOutcome) -> dict[str, object]:
    """What became of an attach or detach."""
    return {"ok": told.ok, **cast("dict[str, object]", to_json(told))}


_PLUG_STATUS: Final[Mapping[str, int]] = {
    "unknown_plug": 404,
    "ambiguous": 409,
    "bad_request": 400,
    **{problem.value: 409 for problem in PlugProblem},
    PlugProblem.FAILED.value: 500,
    PlugProblem.NO_MONITOR.value: 503,
    PlugProblem.DEADLINE.value: 504,
}

PLUG_TIMEOUT_S: Final = 20.0
"""For an attach or detach that names no time."""


def parse_plug(body: bytes, operator: str, *, attach: bool) -> PlugOrder:
    """Read the body of POST /v1/attach or /v1/detach.

    Raises:
        AdminRefusal: it is no JSON object with `vm`, and perhaps the other keys.
    """
    values = _parse_object(body)
    wrong = sorted(values.keys() - {"vm", "port", "timeout_s", *(() if attach else ("force",))})
    if wrong or "vm" not in values:
        raise _bad(f"unknown key: {', '.join(map(repr, wrong[:5]))}" if wrong else "missing key: 'vm'")
    port, force = values.get("port", DEFAULT_PORT), values.get("force", False)
    if not isinstance(force, bool):
        raise _bad("force must be true or false")
    if port is not None or attach:
        port = parse_name("port", port)
    return PlugOrder(
        attach=attach,
        vm=parse_name("vm", values["vm"]),
        port=port or "",
        timeout_s=_timeout(values.get("timeout_s", PLUG_TIMEOUT_S)),
        force=force,
        operator=operator,
    )


def parse_vm(body: bytes) -> str:
    """Read the body of POST /v1/confirm-off.

    Raises:
        AdminRefusal: it is no JSON object with the one key `vm`.
    """
    values = _parse_object(body)
    if values.keys() != {"vm"}:
        raise _bad("the body must have one key, 'vm'")
    return parse_name("vm", values["vm"])


def parse_order(body: bytes, operator: str) -> FenceOrder:
    """Read the body of POST /v1/fence.

    Raises:
        AdminRefusal: it is no JSON object with exactly these keys and types.
    """
    values = _parse_object(body)
    wanted = {"request_id", "action", "vm", "timeout_s"}
    if values.keys() != wanted:
        wrong = sorted(values.keys() ^ wanted)
        raise _bad(f"missing or unknown key: {', '.join(repr(key) for key in wrong[:5])}")
    return FenceOrder(
        _request_id(values["request_id"]),
        parse_action(values["action"]),
        parse_name("vm", values["vm"]),
        _timeout(values["timeout_s"]),
        operator,
    )


def parse_action(value: object) -> FenceAction:
    """An action that an operator may name."""
    for action in ORDERS:
        if value == action.name.lower():
            return action
    raise _bad(f"action is {value!r}, not one of {', '.join(action.name.lower() for action in ORDERS)}")


def parse_name(key: str, value: object) -> str:
    """A VM's name, UUID or alias; not half a surrogate pair, which JSON can spell but no log takes."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_PLUG or _SURROGATE.search(value):
        raise _bad(f"{key} must be text of 1 to {MAX_PLUG} characters")
    return value


def _parse_object(body: bytes) -> dict[str, object]:
    try:
        value: object = json.loads(body, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdminRefusal(400, "bad_request", f"the body is no JSON: {error}", _REMEDY) from error
    if not isinstance(value, dict):
        raise _bad("the body is no JSON object")
    return cast("dict[str, object]", value)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _request_id(value: object) -> bytes:
    if isinstance(value, str) and len(value) == 2 * REQUEST_ID_BYTES and value.isascii():
        try:
            return bytes.fromhex(value)
        except ValueError:
            pass
    raise _bad(f"request_id must be {2 * REQUEST_ID_BYTES} hex digits, chosen at random")


def _timeout(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
        if 0 < seconds <= MAX_TIMEOUT_S:
            return seconds
    raise _bad(f"timeout_s must be a number of seconds, more than 0 and at most {MAX_TIMEOUT_S:.0f}")


_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_REMEDY: Final = "see vmchannelctl(8)"


def _bad(reason: str) -> AdminRefusal:
    return AdminRefusal(400, "bad_request", reason, _REMEDY)
