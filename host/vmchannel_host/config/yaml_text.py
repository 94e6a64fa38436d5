# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text of a YAML file to a plain tree that remembers where each key and value stands.

YAML 1.1 reads `off` as false, 0123 as 83, 1:30 as 90 and takes the last of two equal keys without a word.
Here only `true` and `false` are booleans, every other scalar stays text until the schema converts it, and a
duplicate key is refused. Anchors, tags and merge keys are refused too: a configuration needs none, and they
let a few bytes become gigabytes. The tree is built from parser events without recursion: depth is a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

MAX_BYTES = 1024 * 1024
"""Largest configuration file. A policy of 1,000 VMs has about 50 KiB."""

MAX_DEPTH = 16
"""Deepest nesting; `host.yaml` needs 6."""

Value = bool | str | None | list["Value"] | dict[str, "Value"]
"""None is a key without a value."""

Path = tuple[str | int, ...]
"""The keys and indexes that lead to a value."""

_LOADER: type[yaml.CSafeLoader | yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a file; both count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with the text at one place."""

    position: Position
    path: Path
    message: str


@dataclass(frozen=True, slots=True)
class Document:
    """A file's tree with the positions of its keys and values."""

    tree: Value = None
    keys: dict[Path, Position] = field(default_factory=dict[Path, Position])  # of the key that a path ends in
    values: dict[Path, Position] = field(default_factory=dict[Path, Position])
    faults: tuple[
        Fault, ...
    ] = ()  # duplicate keys and what YAML allows but we do not; the tree is without them

    def position(self, path: Path) -> Position:
        """Where a value stands, or the nearest thing around it that does stand somewhere."""
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, Position(1, 1))

    def key_position(self, path: Path) -> Position:
        """Where the key stands that ends the path, or its value where it is an index."""
        return self.keys.get(path) or self.position(path)


class YamlError(Exception):
    """The text is no YAML, too long or too deep. Nothing of it can be used.

    Attributes:
        position: where; None when the file as a whole is meant.
    """

    def __init__(self, message: str, position: Position | None = None) -> None:
        super().__init__(message)
        self.position = position


def parse_yaml(data: bytes) -> Document:
    """Parse one file. An empty file is an empty mapping.

    Raises:
        YamlError: not UTF-8, not YAML, larger than `MAX_BYTES`, deeper than `MAX_DEPTH`, or two documents.
    """
    if len(data) > MAX_BYTES:
        raise YamlError(f"the file has {len(data):,} bytes, at most {MAX_BYTES:,} are read")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise YamlError("the file is not UTF-8 text here", Position(line, column)) from error
    builder = _Builder()
    try:
        for event in _events(text):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = Position(mark.line + 1, mark.column + 1) if mark else None
        raise YamlError(f"not valid YAML: {error.problem or error.context}", position) from error
    except yaml.reader.ReaderError as error:
        raise YamlError(f"not valid YAML: {error.reason}", _offset_position(text, error.position)) from error
    return builder.document()


def _events(text: str) -> Iterator[yaml.Event]:
    # yaml.parse() yields event by event: the depth check stops a hostile file before it is read to its end.
    return iter(yaml.parse(text, Loader=_LOADER))  # pyright: ignore[reportUnknownMemberType]


def _offset_position(text: str, offset: int) -> Position:
    # The C parser counts bytes, the other one characters: they differ after non-ASCII text only.
    before = text[:offset]
    return Position(before.count("\n") + 1, offset - before.rfind("\n"))


def _mark(event: yaml.Event) -> Position:
    mark = event.start_mark
    assert mark is not None, "the parser marks every event"
    return Position(mark.line + 1, mark.column + 1)


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not come."""

    path: Path
    value: dict[str, Value] | list[Value]
    position: Position
    key: str | None = None  # a mapping's key whose value comes next
    dropped: bool = False  # that value belongs to a key that was refused


class _Builder:
    """Builds the tree from parser events; its stack is bounded by MAX_DEPTH."""

    def __init__(self) -> None:
        self._stack: list[_Open] = []
        self._document = Document()
        self._faults: list[Fault] = []
        self._root: Value = None
        self._documents = 0

    def document(self) -> Document:
        tree = {} if self._root is None else self._root
        return Document(tree, self._document.keys, self._document.values, tuple(self._faults))

    def take(self, event: yaml.Event) -> None:
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    raise YamlError("a second document begins here (`---`): one is expected", _mark(event))
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._begin(event)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._stack.pop()
            case yaml.ScalarEvent():
                self._scalar(event)
            case yaml.AliasEvent():
                if self._awaits_key():
                    raise YamlError("a YAML alias as a key: text is expected", _mark(event))
                self._fault(event, f"a YAML alias (*{event.anchor}) is not allowed: write the value itself")
                self._put(None, _mark(event))
            case _:
                pass  # stream and document marks

    def _begin(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent) -> None:
        if len(self._stack) == MAX_DEPTH:
            raise YamlError(f"nested deeper than {MAX_DEPTH} levels", _mark(event))
        self._check_properties(event)
        value: dict[str, Value] | list[Value] = {} if isinstance(event, yaml.MappingStartEvent) else []
        if self._awaits_key():
            raise YamlError("a mapping or list as a key: text is expected", _mark(event))
        path = self._put(value, _mark(event))
        self._stack.append(_Open(path, value, _mark(event)))

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        self._check_properties(event)
        if self._awaits_key():
            self._key(event)
            return
        value: Value = event.value
        if event.implicit[0] and event.value in ("true", "false"):
            value = event.value == "true"
        elif event.implicit[0] and event.value == "":
            value = None
        self._put(value, _mark(event))

    def _key(self, event: yaml.ScalarEvent) -> None:
        top = self._stack[-1]
        top.key, top.dropped = event.value, False
        path = (*top.path, event.value)
        first = self._document.keys.get(path)
        if event.value == "<<" and event.implicit[0]:
            self._fault(event, "a YAML merge key (<<) is not allowed: write the values themselves")
            top.dropped = True
        elif first is not None:
            self._fault(event, f"duplicate key, first at line {first.line}, column {first.column}", path)
            top.dropped = True
        else:
            self._document.keys[path] = _mark(event)

    def _awaits_key(self) -> bool:
        return bool(self._stack) and isinstance(self._stack[-1].value, dict) and self._stack[-1].key is None

    def _put(self, value: Value, position: Position) -> Path:
        """Hang a value into the innermost open container; return its path."""
        if not self._stack:
            self._root = value
            self._document.values[()] = position
            return ()
        top = self._stack[-1]
        if isinstance(top.value, list):
            path: Path = (*top.path, len(top.value))
            top.value.append(value)
        else:
            assert top.key is not None, "a mapping's value follows its key"
            path = (*top.path, top.key)
            if top.dropped:
                path = (*top.path, f"{top.key} (refused)")  # parsed to its end, but nowhere in the tree
            else:
                top.value[top.key] = value
            top.key = None
        self._document.values[path] = position
        return path

    def _check_properties(
        self, event: yaml.ScalarEvent | yaml.MappingStartEvent | yaml.SequenceStartEvent
    ) -> None:
        if event.anchor is not None:
            self._fault(
                event, f"a YAML anchor (&{event.anchor}) is not allowed: write the value where it is used"
            )
        if event.tag not in (None, "!"):
            self._fault(event, f"a YAML tag ({event.tag}) is not allowed")

    def _fault(self, event: yaml.Event, message: str, path: Path | None = None) -> None:
        if path is None and self._stack:
            top = self._stack[-1]
            path = top.path if top.key is None else (*top.path, top.key)
        self._faults.append(Fault(_mark(event), path or (), message))
