# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read `host.yaml` and `policy.d/*.yaml` beside it into one `HostConfig`, or tell all that is wrong with them.

A pure function of the files: reading again never changes anything, so a reload that fails leaves the old
configuration in force (S10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmchannel_host.config_model import (
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


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One thing that is wrong with a file. Its text is `FILE:LINE:COLUMN: KEY: what is wrong`."""

    file: str
    line: int  # from 1; 0 when it concerns the file as a whole
    column: int  # from 1; 0 likewise
    key: str  # path of the key, as `policy.groups.web.actions[0]`; "" for the file as a whole
    message: str  # what was found, what is expected, the nearest valid word


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
    raise NotImplementedError


def check_config(path: Path | str) -> list[ConfigProblem]:
    """All problems of the files; empty when `load_config` would succeed."""
    raise NotImplementedError
