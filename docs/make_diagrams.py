# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write what the docs take from the code: the state diagrams, and the tables of protocol.md.

`python docs/make_diagrams.py` writes; `--check` only says whether what is committed is up to date (exit 1:
no). A diagram is made from a table `(state, input) -> state`; the comment of each state is read from its
enum's source.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, TypeVar

from fence_vmchannel import messages
from fence_vmchannel.core.channel_state import CHANNEL_TRANSITIONS, ChannelState
from fence_vmchannel.core.events import Priority, Role
from fence_vmchannel.core.frames import Flags, FrameType
from fence_vmchannel.core.greeting import EndCode
from fence_vmchannel.core.session_state import SESSION_TRANSITIONS, SessionState
from fence_vmchannel.errors import CloseCode
from fence_vmchannel.hub import local_protocol
from fence_vmchannel.records import record_fields
from vmchannel_host.fencing.states import TRANSITIONS as OPERATION_TRANSITIONS
from vmchannel_host.fencing.states import OperationState
from vmchannel_host.registry.instance_state import TRANSITIONS as INSTANCE_TRANSITIONS
from vmchannel_host.registry.instance_state import InstanceState

DOCS = Path(__file__).parent
_State = TypeVar("_State", bound=Enum)
_Input = TypeVar("_Input", bound=Enum)


def comments(kind: type[Enum]) -> dict[str, str]:
    """What the source says behind each member of an enum."""
    found = re.findall(r"^\s+([A-Z][A-Z0-9_]*) = .*?#\s*(.*)$", inspect.getsource(kind), re.MULTILINE)
    return dict(found)


def diagram(title: str, states: type[_State], table: Mapping[tuple[_State, _Input], _State]) -> str:
    """A Markdown section with one state machine: its states in words, and a mermaid diagram."""
    used = {state for state, _ in table} | set(table.values())
    words = comments(states)
    lines = [f"## {title}", "", "| state | meaning |", "|---|---|"]
    lines += [f"| `{state.name}` | {words.get(state.name, '')} |" for state in states if state in used]
    lines += ["", "```mermaid", "stateDiagram-v2"]
    joined: dict[tuple[_State, _State], list[str]] = {}
    for (state, what), to in table.items():
        joined.setdefault((state, to), []).append(what.name)
    for (state, to), inputs in joined.items():
        lines.append(f"    {state.name} --> {to.name}: {' / '.join(inputs)}")
    inputs_kind = type(next(iter(table))[1])
    lines += ["```", "", "| input | what it is |", "|---|---|"]
    known = {what for _, what in table}
    lines += [f"| `{what.name}` | {what.value} |" for what in inputs_kind if what in known]
    return "\n".join(lines)


def state_machines() -> str:
    """The whole of state-machines.md."""
    sections = [
        diagram("Session, role HOST", SessionState, SESSION_TRANSITIONS[Role.HOST]),
        diagram("Session, role GUEST", SessionState, SESSION_TRANSITIONS[Role.GUEST]),
        diagram("Channel", ChannelState, CHANNEL_TRANSITIONS),
        diagram("Instance of a VM, in the registry", InstanceState, INSTANCE_TRANSITIONS),
        diagram("Fence operation", OperationState, OPERATION_TRANSITIONS),
    ]
    head = ["# State machines", "Made by `docs/make_diagrams.py` from the tables in the code."]
    return "\n\n".join([*head, *sections]) + "\n"


def code_table(kind: type[IntEnum]) -> str:
    """The members of an enum that goes over the wire."""
    words = comments(kind)
    lines = ["| value | name | meaning |", "|---|---|---|"]
    lines += [f"| {member.value} | {member.name} | {words.get(member.name, '')} |" for member in kind]
    return "\n".join(lines)


def type_name(kind: Any) -> str:
    """How the wire sees a field's type."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        return f"{type_name(typing.get_args(kind)[0])}, any number of times"
    if origin is not None:  # X | None
        return type_name(typing.get_args(kind)[0])
    names = {int: "integer", str: "text", bytes: "bytes", bool: "integer, 0 or 1"}
    if kind in names:
        return names[kind]
    return f"integer, {kind.__name__}" if issubclass(kind, IntEnum) else kind.__name__


def message_table(cls: type[Any], number: int | None) -> str:
    """The fields of one message class."""
    doc = (inspect.getdoc(cls) or "").split("\n")[0]
    hints = typing.get_type_hints(cls)
    source = inspect.getsource(cls)
    lines = [f"**{cls.__name__}**{f' (kind {number})' if number else ''}: {doc}", ""]
    if record_fields(cls):
        lines += ["| tag | field | type | | |", "|---|---|---|---|---|"]
    for name, spec in record_fields(cls).items():
        needed = "required" if spec.required else ""
        words = re.search(rf"^\s+{name}: .*?#\s*(.*)$", source, re.MULTILINE)
        row = (
            spec.tag,
            f"`{name}`",
            type_name(hints[name]),
            needed,
            words[1] if words else "",
        )
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines).rstrip()


def message_tables() -> str:
    """All messages of the fence service."""
    kinds = {cls: kind for kind, cls in messages._KINDS.items()}  # pyright: ignore[reportPrivateUsage]
    classes: list[tuple[type[Any], int | None]] = [(messages.FenceGreeting, None)]
    classes += [(cls, kinds[cls]) for cls in typing.get_args(messages.FenceMessage)]
    classes.append((messages.FenceTarget, None))
    return "\n\n".join(message_table(cls, kind) for cls, kind in classes)


def local_tables() -> str:
    """All messages between a hub and its local applications."""
    kinds = local_protocol._CLASSES  # pyright: ignore[reportPrivateUsage]
    return "\n\n".join(message_table(cls, kind) for kind, cls in kinds.items())


def generated() -> Mapping[str, str]:
    """What stands between the marks of protocol.md, by the mark's name."""
    return {
        "frame types": code_table(FrameType),
        "flags": "\n".join(
            ["| bit | name | meaning |", "|---|---|---|"]
            + [f"| {flag.value} | {flag.name} | {comments(Flags)[flag.name]} |" for flag in Flags]
        ),
        "end codes": code_table(EndCode),
        "close codes": code_table(CloseCode),
        "priorities": code_table(Priority),
        "messages": message_tables(),
        "fence actions": code_table(messages.FenceAction),
        "fence codes": code_table(messages.FenceCode),
        "power states": code_table(messages.PowerState),
        "local messages": local_tables(),
    }


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Put each part between its marks; a mark without a part, or a part without a mark, is an error."""
    for name, part in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"protocol.md has not exactly one pair of marks {name!r}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    return text


def outputs() -> Mapping[Path, str]:
    """Every file that this program writes, and what belongs into it."""
    protocol = DOCS / "protocol.md"
    return {
        DOCS / "state-machines.md": state_machines(),
        protocol: fill(protocol.read_text("utf-8"), generated()),
    }


def stale() -> list[Path]:
    """The files that are not up to date."""
    return [path for path, text in outputs().items() if not path.exists() or path.read_text("utf-8") != text]


def main(arguments: Iterable[str] | None = None) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only say whether the files are up to date")
    options = parser.parse_args(None if arguments is None else list(arguments))
    old = stale()
    for path in old:
        print(f"{'stale' if options.check else 'written'}: {path.name}")
        if not options.check:
            path.write_text(outputs()[path], "utf-8")
    return 1 if options.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
