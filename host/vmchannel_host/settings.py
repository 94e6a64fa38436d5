# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a reload of the configuration replaces in a running daemon, and what of it the parts are told."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Final

from vmchannel_host.config.model import AfterKill, HostConfig
from vmchannel_host.fencing.evidence import Rules
from vmchannel_host.fencing.run import FenceSettings
from vmchannel_host.policy.policy import Policy

FIXED: Final = ("host", "paths", "ports", "limits", "cluster")
"""What a running daemon cannot change: a reload keeps it. New QMP socket globs take a restart too."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Settings:
    """What a reload replaces."""

    config: HostConfig
    policy: Policy = field(init=False)

    def __post_init__(self) -> None:
        self.policy = Policy.from_config(self.config)

    def take(self, config: HostConfig) -> HostConfig:
        """Take over what may change while the daemon runs; returns what is in force now."""
        for key in FIXED:
            if getattr(config, key) != getattr(self.config, key):
                _log.warning("%s was changed; that takes a restart", key)
        self.config = replace(config, **{key: getattr(self.config, key) for key in FIXED})
        self.policy = Policy.from_config(self.config)
        return self.config


def start_commands(config: HostConfig) -> dict[str, tuple[str, ...]]:
    """The start commands of VMs on bare QEMU, by the VM's name or UUID."""
    return {vm: command for one in config.qmp for vm, command in one.start.items()}


def fence_settings(config: HostConfig) -> FenceSettings:
    """What the coordinator goes by."""
    return FenceSettings(
        quit_timeout_s=config.fencing.quit_timeout_s,
        timeout_s=config.fencing.timeout_s,
        rules=Rules(
            settle=config.fencing.after_kill is AfterKill.SETTLE, standalone=config.cluster.standalone
        ),
    )
