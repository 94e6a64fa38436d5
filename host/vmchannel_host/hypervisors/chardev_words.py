# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which of QEMU's chardevs connect to a unix socket, by its command line (pure).

QEMU (7.2) tells the path of such a chardev only while it is not connected (`query-chardev`): afterwards the
command line is what says it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class Connecting:
    """A chardev that connects to a unix socket, on which another program listens."""

    label: str
    path: str  # relative ones as written
    reconnects: bool = True  # QEMU tries again when nobody listens, and when the connection has ended


def parse_connecting(arguments: Iterable[str]) -> tuple[Connecting, ...]:
    """The values of `-chardev` that are such chardevs, in order. Abstract sockets are none."""
    return tuple(one for one in map(_parse, arguments) if one is not None)


def _parse(value: str) -> Connecting | None:
    return _from_json(value) if value.startswith("{") else _from_words(value)


def _from_words(value: str) -> Connecting | None:
    """`socket,id=LABEL,path=PATH,server=off,reconnect=1`: a comma in a value is doubled."""
    first, *others = value.replace(",,", "\x01").split(",")
    words = {key: value for key, _, value in (word.partition("=") for word in others)}
    backend = first.removeprefix("backend=")
    path = words.get("path", "").replace("\x01", ",")
    if backend != "socket" or not path or _is_on(words, "server") or _is_on(words, "abstract"):
        return None
    reconnects = any(_is_positive(words.get(key, "")) for key in ("reconnect", "reconnect-ms"))
    return Connecting(words.get("id", "").replace("\x01", ","), path, reconnects)


def _is_on(words: Mapping[str, str], key: str) -> bool:
    """A word without a value is one that is on."""
    return key in words and words[key] in ("", "on", "yes", "true", "y")


def _is_positive(text: str) -> bool:
    return text.isdecimal() and text.strip("0") != ""


def _from_json(value: str) -> Connecting | None:
    """As `chardev-add` has it; a server unless it says otherwise."""
    try:
        tree: Any = json.loads(value)
        backend = tree["backend"]
        data = backend["data"]
        address = data["addr"]["data"]
        path = address["path"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    client = backend.get("type") == "socket" and data.get("server", True) is False
    if not client or not isinstance(path, str) or not path or address.get("abstract"):
        return None
    reconnects = any(_is_number(data, key) for key in ("reconnect", "reconnect-ms"))
    return Connecting(str(tree.get("id", "")), path, reconnects)


def _is_number(data: Mapping[str, Any], key: str) -> bool:
    value = cast("object", data.get(key))
    return isinstance(value, int) and value > 0
