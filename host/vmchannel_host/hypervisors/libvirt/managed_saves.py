# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that a libvirt keeps of domains that have ended: removed, and seen though libvirt is mute."""

from __future__ import annotations

import logging
from pathlib import Path

from vmchannel_host.hypervisors import HypervisorError, NotProven
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.libvirt.connection import Connection
from vmchannel_host.hypervisors.libvirt.link import Link, NoSuchDomain
from vmchannel_host.hypervisors.libvirt.saved import SavedMemory, read_saved_memory
from vmchannel_host.model import VmUuid

log = logging.getLogger(__name__)


class ManagedSaves:
    """The managed saves of one libvirt. For one event loop."""

    def __init__(self, connection: Connection, directory: Path, calls: DetachedCalls) -> None:
        """
        Args:
            connection: to that libvirt.
            directory: where it keeps them.
            calls: for reading that directory, which may hang.
        """
        self._connection = connection
        self._directory = directory
        self._calls = calls
        self._untold: set[VmUuid] = set()  # whose memory was removed, and nobody was told; threads add

    async def discard(self, vm: VmUuid, *, timeout_s: float) -> tuple[str, ...]:
        """Remove a VM's. See `Hypervisor.discard_memory`; what is removed too late the next call tells."""
        uri = self._connection.uri

        def remove(link: Link) -> None:
            if link.remove_managed_save(vm):
                self._untold.add(vm)
                log.warning("vm=%s managed save removed uri=%s", vm, uri)

        try:
            await self._connection.call("remove managed save", remove, timeout_s=timeout_s)
        except NoSuchDomain:
            pass
        except HypervisorError as error:
            log.warning("vm=%s managed save not removed, or not known whether there is one: %s", vm, error)
        if vm not in self._untold:
            return ()
        self._untold.discard(vm)
        return (f"managed save removed from libvirt ({uri})",)

    async def on_disk(self, *, timeout_s: float) -> SavedMemory:
        """What a libvirt that does not answer keeps; never raises."""
        try:
            return await self._calls.call(
                "read managed saves", lambda: read_saved_memory(self._directory), timeout_s=timeout_s
            )
        except NotProven as error:
            return SavedMemory(frozenset(), f"{error}")
