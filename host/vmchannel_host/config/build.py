# SPDX-License-Identifier: LGPL-2.1-or-later
"""A checked tree to a `HostConfig`: conversion only, nothing is refused here any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from vmchannel_host.config.checks import ReadFile, as_list, as_mapping, at
from vmchannel_host.config.model import (
    GROUP_ACTIONS,
    WIDEST,
    AfterKill,
    BusKind,
    ClusterConfig,
    EvidenceRule,
    FencingConfig,
    Group,
    HostConfig,
    HypervisorConfig,
    JournalConfig,
    LibvirtConfig,
    LimitsConfig,
    LogConfig,
    LogLevel,
    MinorityRule,
    PathsConfig,
    PolicyConfig,
    PortLimits,
    PortsConfig,
    QmpConfig,
)
from vmchannel_host.config.scalars import parse_count, parse_duration, parse_size, parse_vm
from vmchannel_host.config.yaml_text import Value
from vmchannel_host.model import HostName, PortName

_K = TypeVar("_K")
_T = TypeVar("_T")


def build_config(files: Sequence[ReadFile], default_host: str) -> HostConfig:
    """Convert files that have no problem; the first is `host.yaml`."""
    tree = files[0].document.tree
    plain = HostConfig(host=HostName(default_host))
    paths = at(tree, "paths")
    return HostConfig(
        host=_get(tree, "host", HostName, plain.host),
        ports=_ports(at(tree, "ports")),
        hypervisors=_hypervisors(at(tree, "hypervisors")),
        policy=_policy(at(tree, "policy"), files),
        aliases=_frozen({plug: parse_vm(_text(vm)) for plug, vm in as_mapping(at(tree, "aliases")).items()}),
        fencing=_fencing(at(tree, "fencing")),
        limits=_limits(at(tree, "limits")),
        cluster=_cluster(at(tree, "cluster")),
        journal=JournalConfig(_get(at(tree, "journal"), "keep", parse_duration, plain.journal.keep_s)),
        log=LogConfig(_get(at(tree, "log"), "level", LogLevel, plain.log.level)),
        paths=PathsConfig(
            state=_get(paths, "state", Path, plain.paths.state), run=_get(paths, "run", Path, plain.paths.run)
        ),
    )


def _ports(tree: Value) -> PortsConfig:
    plain = PortsConfig()
    limits = _port_limits(tree, plain.limits)
    overrides, services = as_mapping(at(tree, "overrides")), as_mapping(at(tree, "services"))
    return PortsConfig(
        prefix=_get(tree, "prefix", str, plain.prefix),
        limits=limits,
        overrides=_frozen({PortName(name): _port_limits(value, limits) for name, value in overrides.items()}),
        services=_frozen({name: _port_limits(value, WIDEST) for name, value in services.items()}),
        raw=tuple(PortName(_text(name)) for name in as_list(at(tree, "raw"))),
        listen_in=_directories(at(tree, "listen_in")),
    )


def _port_limits(tree: Value, default: PortLimits) -> PortLimits:
    return PortLimits(
        byte_limit=_get(tree, "byte_limit", parse_size, default.byte_limit),
        guest_byte_limit=_get(tree, "guest_byte_limit", parse_size, default.guest_byte_limit),
        cache_buffers=_flag(tree, "cache_buffers", default.cache_buffers),
    )


def _directories(tree: Value) -> tuple[str, ...] | None:
    return None if tree is None else tuple(_text(one) for one in as_list(tree))


def _hypervisors(tree: Value) -> tuple[HypervisorConfig, ...]:
    if tree is None:
        return HostConfig(host=HostName("")).hypervisors
    return tuple(_libvirt(one) if at(one, "type") == "libvirt" else _qmp(one) for one in as_list(tree))


def _libvirt(tree: Value) -> LibvirtConfig:
    plain = LibvirtConfig()
    return LibvirtConfig(_get(tree, "uri", str, plain.uri), _get(tree, "saves", Path, plain.saves))


def _qmp(tree: Value) -> QmpConfig:
    sockets = at(tree, "sockets")
    globs = (sockets,) if isinstance(sockets, str) else as_list(sockets)
    start = as_mapping(at(tree, "start"))
    return QmpConfig(
        sockets=tuple(map(_text, globs)) or QmpConfig().sockets,
        start=_frozen({parse_vm(vm): tuple(map(_text, as_list(argv))) for vm, argv in start.items()}),
    )


def _policy(tree: Value, files: Sequence[ReadFile]) -> PolicyConfig:
    plain = PolicyConfig()
    evidence = _get(tree, "evidence", EvidenceRule, plain.evidence)
    groups = {name: _group(name, group, evidence) for file in files for name, group in file.groups().items()}
    return PolicyConfig(_frozen(groups), evidence, _get(tree, "minority", MinorityRule, plain.minority))


def _group(name: str, tree: Value, evidence: EvidenceRule) -> Group:
    plain = Group(name)
    actions = at(tree, "actions")
    allowed = frozenset(GROUP_ACTIONS[_text(word)] for word in as_list(actions))
    return Group(
        name=name,
        members=tuple(parse_vm(_text(member)) for member in as_list(at(tree, "members"))),
        # `actions: []` allows nothing; only without the key, all are allowed.
        actions=plain.actions if actions is None else allowed,
        self_fence=_flag(tree, "self", plain.self_fence),
        evidence=_get(tree, "evidence", EvidenceRule, evidence),
    )


def _fencing(tree: Value) -> FencingConfig:
    plain = FencingConfig()
    return FencingConfig(
        quit_timeout_s=_get(tree, "quit_timeout", parse_duration, plain.quit_timeout_s),
        timeout_s=_get(tree, "timeout", parse_duration, plain.timeout_s),
        after_kill=_get(tree, "after_kill", AfterKill, plain.after_kill),
    )


def _limits(tree: Value) -> LimitsConfig:
    plain = LimitsConfig()
    return LimitsConfig(
        channels=_get(tree, "channels", parse_count, plain.channels),
        clients=_get(tree, "clients", parse_count, plain.clients),
        requests=_get(tree, "requests", parse_count, plain.requests),
    )


def _cluster(tree: Value) -> ClusterConfig:
    plain = ClusterConfig()
    return ClusterConfig(
        bus=_get(tree, "bus", BusKind, plain.bus), standalone=_flag(tree, "standalone", plain.standalone)
    )


def _get(tree: Value, key: str, convert: Callable[[str], _T], default: _T) -> _T:
    value = at(tree, key)
    return default if value is None else convert(_text(value))


def _flag(tree: Value, key: str, default: bool) -> bool:
    value = at(tree, key)
    return value if isinstance(value, bool) else default


def _text(value: Value) -> str:
    assert isinstance(value, str), "the schema admits text only"
    return value


def _frozen(values: Mapping[_K, _T]) -> Mapping[_K, _T]:
    return MappingProxyType(dict(values))
