# SPDX-License-Identifier: LGPL-2.1-or-later
"""Typed messages as tag-length-value bytes: parse once at the edge, into records.

A message class is a `Record` whose fields carry a tag (`tagged`). On the wire a field is a 16-bit
tag, a 32-bit length (both big-endian) and the value; unknown tags are skipped, so that fields can be added; a
field without a default must be there. Nothing recurses deeper than the classes do, and no length is believed
before it is checked against what is there. `docs/protocol.md`, section "Messages", is the specification.
"""

from __future__ import annotations

import struct
import types
import typing
from enum import IntEnum
from functools import cache
from typing import Any, TypeVar

from fence_vmchannel.errors import RemoteProtocolError
from fence_vmchannel.records import Field, record_fields

_HEAD = struct.Struct(">HI")
_INTEGER = struct.Struct(">q")
_T = TypeVar("_T")


def encode(message: object) -> bytes:
    """The bytes of a message whose fields are `tagged`. `None` is left out; a tuple repeats its tag."""
    out = bytearray()
    for tag, name, _kind, many, _spec in _layout(type(message)):
        value: Any = getattr(message, name)
        items: tuple[Any, ...] = value if many else (value,)
        for item in items:
            if item is None:
                continue
            raw = _encode_value(item)
            out += _HEAD.pack(tag, len(raw))
            out += raw
    return bytes(out)


def decode(cls: type[_T], data: bytes) -> _T:
    """Parse `data` as one `cls`.

    Raises:
        RemoteProtocolError: a length is false, a value is not of its type, or a field is missing.
    """
    layout = {tag: (name, kind, many) for tag, name, kind, many, _ in _layout(cls)}
    values: dict[str, Any] = {}
    for tag, raw in _split(data, cls.__name__):
        if tag not in layout:
            continue
        name, kind, many = layout[tag]
        value = _decode_value(kind, raw, f"{cls.__name__}.{name}")
        if many:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise RemoteProtocolError(f"{cls.__name__}.{name} stands twice")
        else:
            values[name] = value
    for _tag, name, _kind, many, spec in _layout(cls):
        if many:
            values[name] = tuple(values.get(name, ()))
        elif name not in values and spec.required:
            raise RemoteProtocolError(f"{cls.__name__}.{name} is missing")
    try:
        return cls(**values)
    except ValueError as error:  # the checks of a class's __post_init__
        raise RemoteProtocolError(f"{cls.__name__}: {error}") from error


def _layout(cls: type) -> tuple[tuple[int, str, Any, bool, Field], ...]:
    return _read_layout(cls)


@cache
def _read_layout(cls: type) -> tuple[tuple[int, str, Any, bool, Field], ...]:
    hints = typing.get_type_hints(cls)
    rows: list[tuple[int, str, Any, bool, Field]] = []
    for name, spec in record_fields(cls).items():
        kind = hints[name]
        many = typing.get_origin(kind) is tuple
        if many:
            kind = typing.get_args(kind)[0]
        if isinstance(kind, types.UnionType):  # `X | None`
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
        rows.append((spec.tag, name, kind, many, spec))
    return tuple(rows)


def _split(data: bytes, what: str) -> typing.Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        if len(data) - at < _HEAD.size:
            raise RemoteProtocolError(f"{what}: half a field header at byte {at}")
        tag, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if length > len(data) - at:
            raise RemoteProtocolError(
                f"{what}: field {tag} announces {length} bytes, {len(data) - at} are there"
            )
        yield tag, data[at : at + length]
        at += length


def _encode_value(value: Any) -> bytes:
    match value:
        case bool() | int():
            return _INTEGER.pack(int(value))
        case str():
            return value.encode("utf-8", "replace")
        case bytes():
            return value
        case _:
            return encode(value)


def _decode_value(kind: Any, raw: bytes, where: str) -> Any:
    if kind is bytes:
        return raw
    if kind is str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RemoteProtocolError(f"{where} is not UTF-8") from error
    if isinstance(kind, type) and issubclass(kind, int):
        if len(raw) != _INTEGER.size:
            raise RemoteProtocolError(f"{where} has {len(raw)} bytes, an integer has {_INTEGER.size}")
        number = _INTEGER.unpack(raw)[0]
        try:
            return kind(number) if issubclass(kind, (IntEnum, bool)) else number
        except ValueError as error:
            raise RemoteProtocolError(f"{where} has the unknown value {number}") from error
    return decode(typing.cast("type[object]", kind), raw)
