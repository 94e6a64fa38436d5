# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read `host.yaml` and `policy.d/*.yaml` beside it into one `HostConfig`, or tell all that is wrong.

A pure function of the files: reading again never changes anything, so a reload that fails leaves the old
configuration in force (S10).
"""

from __future__ import annotations

import errno
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmchannel_host.config.build import build_config
from vmchannel_host.config.checks import ReadFile, check_duplicate_groups, check_groups, check_host_file
from vmchannel_host.config.model import (
    AfterKill,
    BusKind,
    ClusterConfig,
    EvidenceRule,
    FencingConfig,
    Group,
    HostConfig,
    HypervisorConfig,
    JournalConfig,
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
from vmchannel_host.config.scalars import KINDS
from vmchannel_host.config.schema import HOST_SCHEMA, POLICY_SCHEMA, Schema, Violation, violations
from vmchannel_host.config.yaml_text import MAX_BYTES, Position, YamlError, parse_yaml
from vmchannel_host.config.yaml_text import Path as KeyPath

__all__ = [
    "AfterKill",
    "BusKind",
    "ClusterConfig",
    "ConfigError",
    "ConfigProblem",
    "EvidenceRule",
    "FencingConfig",
    "Group",
    "HostConfig",
    "HypervisorConfig",
    "JournalConfig",
    "LimitsConfig",
    "LogConfig",
    "LogLevel",
    "MinorityRule",
    "PathsConfig",
    "PolicyConfig",
    "PortLimits",
    "PortsConfig",
    "QmpConfig",
    "check_config",
    "load_config",
]

DEFAULT_CONFIG = Path("/etc/vmchannel/host.yaml")

POLICY_DIR = "policy.d"
"""Folder beside `host.yaml` whose `*.yaml` files define groups, one owner each if one likes."""


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One thing that is wrong with a file. Its text is `FILE:LINE:COLUMN: KEY: what is wrong`."""

    file: str
    line: int  # from 1; 0 when it concerns the file as a whole
    column: int  # from 1; 0 likewise
    key: str  # path of the key, as `policy.groups.web.actions[0]`; "" for the file as a whole
    message: str  # what was found, what is expected, the nearest valid word

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class ConfigError(Exception):
    """The files are not a valid configuration. The text has one line for each problem.

    Attributes:
        problems: all of them, in the order of files and lines; never empty.
    """

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


def load_config(path: Path | str, *, host_name: str | None = None) -> HostConfig:
    """Read the configuration. Blocks for the time of reading a few small files.

    Args:
        path: of `host.yaml`; `policy.d/*.yaml` beside it is read too.
        host_name: default of the key `host`; None takes the machine's host name.

    Raises:
        ConfigError: the files are missing or wrong; it names every problem. Keep the configuration in force.
    """
    path = Path(path)
    default_host = socket.gethostname() if host_name is None else host_name
    files, problems = _read_all(path)
    problems += _check(files)
    if problems:
        # host.yaml first, then policy.d by name: a file that could not be parsed stands among the others.
        problems.sort(key=lambda one: (one.file != str(path), one.file, one.line, one.column))
        raise ConfigError(problems)
    config = build_config(files, default_host)
    _check_default_host(config.host, path)
    return config


def check_config(path: Path | str, *, host_name: str | None = None) -> list[ConfigProblem]:
    """All problems of the files; empty when `load_config` would succeed."""
    try:
        load_config(path, host_name=host_name)
    except ConfigError as error:
        return list(error.problems)
    return []


def _read_all(path: Path) -> tuple[list[ReadFile], list[ConfigProblem]]:
    """Parse `host.yaml` and the files of `policy.d/`; files that cannot be parsed are problems only."""
    files: list[ReadFile] = []
    problems: list[ConfigProblem] = []
    try:
        fragments = sorted(
            entry for entry in (path.parent / POLICY_DIR).iterdir() if _is_fragment(entry.name)
        )
    except FileNotFoundError:
        fragments = []  # it is optional
    except OSError as error:
        fragments = []
        problems.append(_whole(path.parent / POLICY_DIR, f"cannot be listed: {error.strerror}"))
    for file in (path, *fragments):
        try:
            files.append(ReadFile(str(file), parse_yaml(_read(file)), is_policy=file is not path))
        except OSError as error:
            problems.append(_whole(file, f"cannot be read: {error.strerror or error}"))
        except YamlError as error:
            at = error.position
            problems.append(
                ConfigProblem(str(file), at.line if at else 0, at.column if at else 0, "", str(error))
            )
    return files, problems


def _check_default_host(host: str, path: Path) -> None:
    try:
        KINDS["host"](host)  # from the file it is checked already; the machine may be called anything
    except ValueError as error:
        message = f"the machine's host name is {host!r}, expected {error}: set `host`"
        raise ConfigError([ConfigProblem(str(path), 0, 0, "host", message)]) from error


def _is_fragment(name: str) -> bool:
    return name.endswith(".yaml") and not name.startswith(".")


def _read(path: Path) -> bytes:
    # A FIFO or device would block, or never end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _check(files: Sequence[ReadFile]) -> list[ConfigProblem]:
    """All problems of the files that could be parsed."""
    found: list[tuple[ReadFile, Violation]] = list(check_duplicate_groups(files))
    problems: list[ConfigProblem] = []
    for file in files:
        tree = file.document.tree
        found += ((file, violation) for violation in violations(tree, _schema(file)))
        found += ((file, violation) for violation in check_groups(file))
        if not file.is_policy:
            found += ((file, violation) for violation in check_host_file(tree))
        problems += (
            _problem(file, fault.position, fault.path, fault.message) for fault in file.document.faults
        )
    for file, violation in found:
        document = file.document
        position = (
            document.key_position(violation.path) if violation.at_key else document.position(violation.path)
        )
        problems.append(_problem(file, position, violation.path, violation.message))
    return problems


def _schema(file: ReadFile) -> Schema:
    return POLICY_SCHEMA if file.is_policy else HOST_SCHEMA


def _problem(file: ReadFile, position: Position, path: KeyPath, message: str) -> ConfigProblem:
    return ConfigProblem(file.name, position.line, position.column, _key(path), message)


def _whole(path: Path, message: str) -> ConfigProblem:
    return ConfigProblem(str(path), 0, 0, "", message)


def _key(path: KeyPath) -> str:
    """A path as people write it: policy.groups.web.actions[0]."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if part.isprintable() else f".{part!r}"
    return text.removeprefix(".")[:200]
