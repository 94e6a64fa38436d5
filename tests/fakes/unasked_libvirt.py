# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirt behind a `LibvirtMonitor` that only listens."""

from __future__ import annotations

from collections.abc import Callable

from vmchannel_host.hypervisors.libvirt.link import Link
from vmchannel_host.model import Migration, RunState, VmUuid


class UnaskedLibvirt:
    """Implements `Asking`; whoever asks fails the test."""

    uri = "test:///nobody"

    async def state_of(self, vm: VmUuid, *, timeout_s: float) -> tuple[RunState, Migration]:
        raise AssertionError(vm)

    async def is_resettable(self, vm: VmUuid, *, timeout_s: float) -> bool:
        raise AssertionError(vm)

    async def call_link(self, name: str, function: Callable[[Link], None], *, timeout_s: float) -> None:
        raise AssertionError(name)
