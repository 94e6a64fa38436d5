# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shape of `host.yaml` and of `policy.d/*.yaml` as JSON schemas, and its violations in words for people.

Scalars are text here (`config_yaml`), so their kinds are a keyword of ours, `scalar`: one of
`config_scalars.KINDS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import jsonschema
import jsonschema.validators

from vmchannel_host.config.model import GROUP_ACTIONS, AfterKill, EvidenceRule, LogLevel, MinorityRule
from vmchannel_host.config.scalars import KINDS, parse_count, parse_duration, parse_size
from vmchannel_host.config.yaml_text import Path, Value

Schema = Mapping[str, Any]  # JSON schema is untyped by nature


@dataclass(frozen=True, slots=True)
class Violation:
    """One place where a tree breaks its schema."""

    path: Path
    at_key: bool  # the key itself is wrong, not its value
    message: str


def violations(tree: Value, schema: Schema) -> list[Violation]:
    """All places where the tree breaks the schema."""
    found: list[Violation] = []
    for error in _validate(schema).iter_errors(tree):
        found += _describe(error, schema)
    return found


def show(value: Value) -> str:
    """A value as it is quoted in a message: short, on one line, safe to print."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value) if len(value) <= 60 else f"{value[:57]!r}..."
        case list():
            return "a list"
        case dict():
            return "a mapping"


def suggest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


# --- the schemas ---


def _section(properties: Mapping[str, Schema], *, required: Sequence[str] = ()) -> Schema:
    # A key without a value (all its lines commented out) is a section of defaults.
    return {
        "type": ["object", "null"],
        "properties": properties,
        "additionalProperties": False,
        "required": list(required),
    }


def _mapping(keys: str, values: Schema) -> Schema:
    return {"type": ["object", "null"], "propertyNames": {"scalar": keys}, "additionalProperties": values}


def _list(items: Schema) -> Schema:
    return {"type": ["array", "null"], "items": items}


def _scalar(kind: str, least: str = "", most: str = "") -> Schema:
    return {"type": "string", "scalar": kind, "least": least, "most": most}


def _enum(words: Iterable[str]) -> Schema:
    return {"enum": list(words)}


_BOOLEAN: Schema = {"type": "boolean"}
_LIMITS: Mapping[str, Schema] = {
    "byte_limit": _scalar("size", "32KiB", "4MiB"),  # more is cut by the limits of an application
    "guest_byte_limit": _scalar("size", "32KiB", "4MiB"),
    "cache_buffers": _BOOLEAN,
}
_GROUP: Schema = _section(
    {
        "members": _list(_scalar("vm")),
        "actions": _list(_enum(GROUP_ACTIONS)),
        "self": _BOOLEAN,
        "evidence": _enum(rule.value for rule in EvidenceRule),
    }
)
_GROUPS: Schema = _mapping("group", _GROUP)
_ARGV: Schema = {
    "type": "array",
    "items": _scalar("argument"),
    "minItems": 1,
    "expects": "a command as a list",
}
_QMP: Schema = _section(
    {
        "type": {},
        "sockets": {
            "type": ["string", "array"],
            "scalar": "path",
            "items": _scalar("path"),
            "minItems": 1,
            "expects": "a glob of QMP sockets, or a list of them",
        },
        "start": _mapping("vm", _ARGV),
    }
)
_LIBVIRT: Schema = _section({"type": {}, "uri": _scalar("libvirt"), "saves": _scalar("path")})
_HYPERVISOR: Schema = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": _enum(["qmp", "libvirt"])},
    "allOf": [
        {"if": {"required": ["type"], "properties": {"type": {"const": name}}}, "then": schema}
        for name, schema in (("qmp", _QMP), ("libvirt", _LIBVIRT))
    ],
}

HOST_SCHEMA: Schema = _section(
    {
        "host": _scalar("host"),
        "ports": _section(
            {
                "prefix": _scalar("port"),
                **_LIMITS,
                "overrides": _mapping("port", _section(_LIMITS)),
                "services": _mapping("service", _section(_LIMITS)),
                "raw": _list(_scalar("port")),
                "listen_in": _list(_scalar("path")),
            }
        ),
        "hypervisors": _list(_HYPERVISOR),
        "policy": _section(
            {
                "groups": _GROUPS,
                "evidence": _enum(rule.value for rule in EvidenceRule),
                "minority": _enum(rule.value for rule in MinorityRule),
            }
        ),
        "aliases": _mapping("plug", _scalar("vm")),
        "fencing": _section(
            {
                "quit_timeout": _scalar("duration", "10ms", "5min"),
                "timeout": _scalar("duration", "1s", "1h"),
                "after_kill": _enum(choice.value for choice in AfterKill),
            }
        ),
        "limits": _section(
            {
                "channels": _scalar("count", "16", "65535"),
                "clients": _scalar("count", "4", "65535"),
                "requests": _scalar("count", "10", "1000000"),
            }
        ),
        "cluster": _section(
            {
                "bus": _enum(["local", "corosync"]),
                "standalone": _BOOLEAN,
                "hosts": _list(_scalar("host")),
                "host_fencing": {"type": ["object", "null"]},
            }
        ),
        "journal": _section({"keep": _scalar("duration", "1d", "36500d")}),
        "log": _section({"level": _enum(level.value for level in LogLevel)}),
        "paths": _section({"state": _scalar("path"), "run": _scalar("path")}),
    }
)
"""`host.yaml`."""

POLICY_SCHEMA: Schema = _section({"groups": _GROUPS})
"""A file of `policy.d/`."""


# --- the validator ---

_MEASURES: Mapping[str, Callable[[str], float]] = {
    "size": parse_size,
    "duration": parse_duration,
    "count": parse_count,
}


def _check_scalar(
    validator: object, kind: str, value: object, schema: Schema
) -> Iterator[jsonschema.ValidationError]:
    if not isinstance(value, str):
        return  # `type` says what is wrong with it
    try:
        KINDS[kind](value)
    except ValueError as error:
        yield jsonschema.ValidationError(f"expected {error}")
        return
    least, most = schema.get("least", ""), schema.get("most", "")
    if least and not (measure := _MEASURES[kind])(least) <= measure(value) <= measure(most):
        yield jsonschema.ValidationError(f"expected {least} to {most}")


class _Validator(Protocol):
    def iter_errors(self, instance: Value) -> Iterator[jsonschema.ValidationError]: ...


def _validate(schema: Schema) -> _Validator:
    extend = cast("Callable[..., Callable[[Schema], _Validator]]", jsonschema.validators.extend)  # pyright: ignore[reportUnknownMemberType]
    return extend(jsonschema.Draft202012Validator, {"scalar": _check_scalar})(schema)


def _describe(error: jsonschema.ValidationError, root: Schema) -> Iterator[Violation]:
    """The violations of one error of the validator, in words."""
    path: Path = tuple(error.absolute_path)
    found = cast("Value", error.instance)
    schema = cast("Schema", error.schema)
    if "propertyNames" in error.absolute_schema_path:
        yield Violation((*path, str(found)), True, f"found the key {show(found)}, {error.message}")
        return
    match error.validator:
        case "additionalProperties":
            yield from _unknown_keys(path, cast("dict[str, Value]", found), schema, root)
        case "required":
            missing = [key for key in schema["required"] if key not in cast("dict[str, Value]", found)]
            yield Violation(path, False, f"the key {missing[0]!r} is missing")
        case "enum":
            yield Violation(path, False, f"found {show(found)}, expected {_one_of(found, schema['enum'])}")
        case "type":
            yield Violation(path, False, f"found {show(found)}, expected {_type(found, schema)}")
        case "minItems":
            yield Violation(path, False, f"found an empty list, expected {schema['expects']}")
        case _:
            yield Violation(path, False, f"found {show(found)}, {error.message}")


def _unknown_keys(path: Path, found: dict[str, Value], schema: Schema, root: Schema) -> Iterator[Violation]:
    known = list(cast("Mapping[str, Schema]", schema["properties"]))
    for key in found:
        if key in known:
            continue
        hint = suggest(key, known)
        if not hint and (section := _home_of(key, root)):
            hint = f" (it belongs under {section!r})"
        yield Violation((*path, key), True, f"unknown key {show(key)}{hint}, expected {_or(known)}")


def _home_of(key: str, root: Schema) -> str:
    """The top-level section in which a key would be right: a line that is not indented is a common slip."""
    sections = cast("Mapping[str, Schema]", root["properties"])
    return next((name for name, section in sections.items() if key in section.get("properties", {})), "")


def _one_of(found: Value, words: Sequence[str]) -> str:
    return _or(words) + (suggest(found, words) if isinstance(found, str) else "")


def _type(found: Value, schema: Schema) -> str:
    if "expects" in schema:
        return str(schema["expects"])
    wanted = schema["type"]
    names = {"object": "a mapping", "array": "a list", "boolean": "true or false", "string": "text"}
    text = names[wanted if isinstance(wanted, str) else wanted[0]]
    if wanted == "boolean" and isinstance(found, str):
        meant = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(found.lower(), "")
        meant = meant or (found.lower() if found.lower() in ("true", "false") else "")
        return text + (f" (did you mean {meant}, without quotes?)" if meant else "")
    if wanted == "string" and isinstance(found, bool):
        return f"{text} (in quotes, if that word is meant)"
    return text


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
