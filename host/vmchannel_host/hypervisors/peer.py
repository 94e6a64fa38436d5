# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who listens behind a port's socket: it must be the QEMU process of that VM.

A VM's identity is the socket it speaks through, and SO_PEERCRED names only whoever called listen() last. So
executable, start time and UUID of that process are checked, with a pidfd open (S1, S9).
"""

from __future__ import annotations

from typing import Protocol

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.process import ProcessTable
from vmchannel_host.model import ProcessIdentity, VmUuid


class WrongPeer(HypervisorError):
    """The process behind the socket is not the QEMU of that VM: do not speak to it."""


class ChardevPeers(Protocol):
    """Checks the process behind a chardev's socket. Tests compose another one; no flag does."""

    def verify(self, pid: int, vm_uuid: VmUuid) -> ProcessIdentity:
        """Identify the process `pid` (from SO_PEERCRED) as an instance of the VM. Blocks for a short time.

        Raises:
            WrongPeer: it is another process, has ended, or cannot be identified.
        """
        ...


class QemuPeers:
    """The real check, against the processes of this host."""

    def __init__(self, processes: ProcessTable) -> None:
        self._processes = processes

    def verify(self, pid: int, vm_uuid: VmUuid) -> ProcessIdentity:
        try:
            process = self._processes.open(pid)
        except HypervisorError as error:
            raise WrongPeer(f"the socket is served by an unknown process: {error}") from error
        process.close()
        if process.identity.vm_uuid != vm_uuid:
            raise WrongPeer(
                f"the socket of VM {vm_uuid} is served by VM {process.identity.vm_uuid} (pid {pid})"
            )
        return process.identity
