# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of the daemon touches the machine, and the hypervisor made of it. Tests compose other parts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fence_vmchannel.hub.hub import boot_clock
from vmchannel_host.config.model import HostConfig
from vmchannel_host.hypervisors.host import HostHypervisor
from vmchannel_host.hypervisors.launch import Launcher
from vmchannel_host.hypervisors.libvirt.binding import open_link
from vmchannel_host.hypervisors.libvirt.link import OpenLink
from vmchannel_host.hypervisors.libvirt.plug_words import channel_directory
from vmchannel_host.hypervisors.libvirt.plugging import LibvirtPlugging
from vmchannel_host.hypervisors.libvirt.source import LibvirtSettings, LibvirtSource
from vmchannel_host.hypervisors.peer import ChardevPeers, QemuPeers
from vmchannel_host.hypervisors.process import (
    HOST_PID_NAMESPACE,
    ProcessTable,
    read_boot_id,
    read_pid_namespace,
)
from vmchannel_host.hypervisors.process_watch import ProcessWatch
from vmchannel_host.hypervisors.source import Source, Starter
from vmchannel_host.model import PidNamespace
from vmchannel_host.port_sockets.listeners import PortListeners, default_directories

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What touches the machine. Tests compose others; no key of the configuration and no option does."""

    processes: ProcessTable
    peers: ChardevPeers
    clock: Callable[[], float] = boot_clock  # CLOCK_BOOTTIME, seconds
    wall_clock: Callable[[], float] = time.time
    random_bytes: Callable[[int], bytes] = os.urandom
    open_libvirt: OpenLink = open_link


def real_parts() -> Parts:
    """This machine."""
    processes = ProcessTable(boot_id=read_boot_id(), pid_namespace=read_pid_namespace())
    return Parts(processes=processes, peers=QemuPeers(processes))


def host_hypervisor(config: HostConfig, parts: Parts, launcher: Launcher) -> HostHypervisor:
    """One for the host: every entry of `hypervisors` is a source of it (decision 0012)."""
    watch = ProcessWatch(parts.processes, host=config.host, clock=parts.clock)
    libvirts = tuple(
        LibvirtSource(
            LibvirtSettings(one.uri, one.saves), watch, parts.open_libvirt, wall_clock=parts.wall_clock
        )
        for one in config.libvirt
    )
    sources: tuple[Source, ...] = (*_qmp_sockets(config, watch), *libvirts)
    starters: tuple[Starter, ...] = (launcher, *libvirts)
    return HostHypervisor(
        watch,
        sources,
        starters,
        host=config.host,
        clock=parts.clock,
        ports=str(config.paths.run / "ports"),
        definers=tuple(
            LibvirtPlugging(source, str(channel_directory(one.saves)))
            for one, source in zip(config.libvirt, libvirts, strict=True)
        ),
        libvirts=[one.state for one in libvirts],
        defined_ports={one.uri: one.defined_ports.follow for one in libvirts},
    )


def port_listeners(config: HostConfig, parts: Parts, refused: Callable[[], None]) -> PortListeners:
    """Where QEMUs may connect. `refused` is called for each connection that is none of theirs."""
    given = config.ports.listen_in
    usual = default_directories(
        str(config.paths.run),
        (pattern for one in config.qmp for pattern in one.sockets),
        (str(path) for one in config.libvirt for path in _channel_directories(one.saves)),
    )
    return PortListeners(usual if given is None else given, parts.processes, refused=refused)


def _channel_directories(saves: Path) -> tuple[Path, Path]:
    directory = channel_directory(saves)
    return directory.parent, directory


def _qmp_sockets(config: HostConfig, watch: ProcessWatch) -> tuple[Source, ...]:
    """Nothing is imported where there is no bare QEMU: the QMP library may be missing there."""
    if not config.qmp:
        return ()
    from vmchannel_host.hypervisors.qmp import QmpSettings, QmpSockets

    globs = tuple(glob for one in config.qmp for glob in one.sockets)
    return (QmpSockets(QmpSettings(sockets=globs), watch),)


def warn_of_namespace(own: PidNamespace) -> None:
    """A container in which the VMs run too is a place to try things; on a host it hides the VMs."""
    if own != HOST_PID_NAMESPACE:
        _log.error(
            "this daemon runs in pid namespace %d, not in the host's: it sees and fences only VMs whose "
            "processes run in it. On a host that runs VMs, run it in the host's pid namespace",
            own,
        )
