# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a schema cannot say of the configuration: words that come with a later release, keys that contradict.

Pure. Each check is safe on any tree, also one that breaks its schema, so that all problems are told at once.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fence_vmchannel.messages import FENCE_SERVICE
from vmchannel_host.config.model import FencingConfig, LibvirtConfig, PortsConfig
from vmchannel_host.config.scalars import parse_duration, parse_vm
from vmchannel_host.config.schema import Violation, show
from vmchannel_host.config.yaml_text import Document, Path, Position, Value

LATER = "comes with a later release"

NO_QMP = (
    "qmp needs Python's module qemu.qmp, which is not installed: `apt install python3-qemu-qmp`, "
    "or where there is no such package (Debian 12 and 13) as vmchanneld(8) says under BARE QEMU"
)


@dataclass(frozen=True, slots=True)
class ReadFile:
    """One file, parsed."""

    name: str  # as it is shown
    document: Document
    is_policy: bool  # of policy.d/

    @property
    def groups_path(self) -> tuple[str, ...]:
        """Where groups stand in it."""
        return ("groups",) if self.is_policy else ("policy", "groups")

    def groups(self) -> Mapping[str, Value]:
        """The groups it defines, unchecked."""
        return as_mapping(at(self.document.tree, *self.groups_path))


def check_host_file(tree: Value) -> list[Violation]:
    """What is wrong with `host.yaml` beyond its schema."""
    return [*_hypervisors(tree), *_cluster(tree), *_ports(tree), *_fencing(tree), *_paths(tree)]


def check_groups(file: ReadFile) -> list[Violation]:
    """Members that stand twice in one group of a file."""
    found: list[Violation] = []
    for name, group in file.groups().items():
        path: Path = (*file.groups_path, name, "members")
        seen: dict[str, int] = {}
        for index, member in enumerate(as_list(at(group, "members"))):
            text = _vm_text(member)
            if text in seen:
                found.append(Violation((*path, index), False, f"{show(text)} is a member already"))
            seen.setdefault(text, index)
    return found


def check_duplicate_groups(files: Sequence[ReadFile]) -> Iterator[tuple[ReadFile, Violation]]:
    """Groups of one name in two files: neither may win silently."""
    first: dict[str, tuple[ReadFile, Position]] = {}
    for file in files:
        for name in file.groups():
            path: Path = (*file.groups_path, name)
            if name in first:
                other, position = first[name]
                message = f"group {show(name)} is defined already, at {other.name}:{position.line}"
                yield file, Violation(path, True, f"{message}:{position.column}")
            else:
                first[name] = (file, file.document.key_position(path))


def at(tree: Value, *path: str) -> Value:
    """The value under nested keys; None when there is none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def as_mapping(value: Value) -> Mapping[str, Value]:
    """The value as a mapping; empty when it is none."""
    return value if isinstance(value, dict) else {}


def as_list(value: Value) -> Sequence[Value]:
    """The value as a list; empty when it is none."""
    return value if isinstance(value, list) else []


def _vm_text(member: Value) -> str:
    text = member if isinstance(member, str) else show(member)
    try:
        return parse_vm(text)
    except ValueError:
        return text


def _hypervisors(tree: Value) -> Iterator[Violation]:
    if at(tree, "hypervisors") is None and not _is_installed("qemu.qmp"):
        yield Violation(("hypervisors",), False, f"the default, {NO_QMP}")
    seen: set[str] = set()
    for index, entry in enumerate(as_list(at(tree, "hypervisors"))):
        path: Path = ("hypervisors", index)
        yield from _libvirt(entry, path, seen)
        if at(entry, "type") == "qmp" and not _is_installed("qemu.qmp"):
            yield Violation((*path, "type"), False, NO_QMP)
        for vm, argv in as_mapping(at(entry, "start")).items():
            program = next(iter(as_list(argv)), None)
            if isinstance(program, str) and not program.startswith("/"):
                message = f"found {show(program)}, expected the absolute path of a program"
                yield Violation((*path, "start", vm, 0), False, message)


def _libvirt(entry: Value, path: Path, seen: set[str]) -> Iterator[Violation]:
    if at(entry, "type") != "libvirt":
        return
    given = at(entry, "uri")
    uri = given if isinstance(given, str) else LibvirtConfig().uri
    if uri in seen:
        yield Violation((*path, "uri") if given else path, False, f"{show(uri)} stands there already")
    seen.add(uri)
    if uri != LibvirtConfig().uri and at(entry, "saves") is None:
        message = "the key 'saves' is missing: where managed saves are is known of qemu:///system only"
        yield Violation(path, False, message)
    if not _is_installed("libvirt"):
        yield Violation((*path, "type"), False, "libvirt's Python module is not installed (python3-libvirt)")


def _is_installed(module: str) -> bool:
    """The one look at the machine here: without its module an entry can never work. It is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _cluster(tree: Value) -> Iterator[Violation]:
    if at(tree, "cluster", "bus") == "corosync":
        yield Violation(("cluster", "bus"), False, f"corosync {LATER}: set `bus: local`")
    for key in ("hosts", "host_fencing"):
        if key in as_mapping(at(tree, "cluster")):
            yield Violation(("cluster", key), True, f"it goes with bus corosync, which {LATER}: remove it")


def _ports(tree: Value) -> Iterator[Violation]:
    given = at(tree, "ports", "prefix")
    prefix = given if isinstance(given, str) else PortsConfig().prefix
    for name in as_mapping(at(tree, "ports", "overrides")):
        if not name.startswith(prefix):
            message = f"it overrides nothing: only ports whose name begins {prefix!r} are served"
            yield Violation(("ports", "overrides", name), True, message)
    for name in as_mapping(at(tree, "ports", "services")):
        if name == FENCE_SERVICE or name.startswith("."):
            message = "its memory is reserved and nothing of it is dropped: no limit of a service applies"
            yield Violation(("ports", "services", name), True, message)
    for index, directory in enumerate(as_list(at(tree, "ports", "listen_in"))):
        if isinstance(directory, str) and re.fullmatch(r"/[^/]*/*", directory):
            message = f"{show(directory)} is a directory that all programs share: name one below it"
            yield Violation(("ports", "listen_in", index), False, message)
    for index, raw in enumerate(as_list(at(tree, "ports", "raw"))):
        if isinstance(raw, str) and raw.startswith(prefix):
            message = f"{show(raw)} begins with the prefix {prefix!r}: it is served, and cannot be raw"
            yield Violation(("ports", "raw", index), False, message)


def _fencing(tree: Value) -> Iterator[Violation]:
    quit_s = _seconds(at(tree, "fencing", "quit_timeout"), FencingConfig().quit_timeout_s)
    timeout_s = _seconds(at(tree, "fencing", "timeout"), FencingConfig().timeout_s)
    if quit_s >= timeout_s:
        key = "quit_timeout" if "quit_timeout" in as_mapping(at(tree, "fencing")) else "timeout"
        message = f"quit_timeout ({quit_s:g}s) leaves no time for the kill within timeout ({timeout_s:g}s)"
        yield Violation(("fencing", key), False, message)


def _seconds(value: Value, default: float) -> float:
    try:
        return parse_duration(value) if isinstance(value, str) else default
    except ValueError:
        return default


def _paths(tree: Value) -> Iterator[Violation]:
    paths = as_mapping(at(tree, "paths"))
    if "state" in paths and paths.get("state") == paths.get("run"):
        yield Violation(("paths", "run"), False, "it is the same as paths.state: only one survives a boot")
