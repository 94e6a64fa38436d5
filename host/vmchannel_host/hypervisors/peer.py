# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who listens behind a port's socket: it must be the QEMU process of that VM.

A VM's identity is the socket it speaks through, and SO_PEERCRED names only whoever called listen() last. So
it must be the process that was identified as the VM's instance: same pid, start time and executable, with a
pidfd open (S1, S9). Its command line is not read again: that blocks as long as a hung process holds its
memory map, and each attempt to connect would leave a thread behind (S7).
"""

from __future__ import annotations

from typing import Protocol

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.process import ProcessTable
from vmchannel_host.model import ProcessIdentity


class WrongPeer(HypervisorError):
    """The process behind the socket is not the QEMU of that VM: do not speak to it."""


class ChardevPeers(Protocol):
    """Checks the process behind a chardev's socket. Tests compose another one; no flag does."""

    def verify(self, pid: int, identity: ProcessIdentity) -> None:
        """See that the process `pid` (from SO_PEERCRED) is that instance. Does not block.

        Raises:
            WrongPeer: it is another process, has ended, or cannot be recognised.
        """
        ...


class QemuPeers:
    """The real check, against the processes of this host."""

    def __init__(self, processes: ProcessTable) -> None:
        self._processes = processes

    def verify(self, pid: int, identity: ProcessIdentity) -> None:
        if pid != identity.pid:
            raise WrongPeer(f"the socket of VM {identity.vm_uuid} is served by pid {pid}, not by {identity}")
        try:
            self._processes.reopen(identity).close()
        except HypervisorError as error:
            raise WrongPeer(f"the socket is served by another process: {error}") from error
