# SPDX-License-Identifier: LGPL-2.1-or-later
"""A look that the end of the daemon overtakes finds nothing, and must not say so."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.hypervisors.qemu_rig import Rig, make_host, of
from vmchannel_host.hypervisors import HypervisorError


async def test_a_look_during_which_the_watching_ends_proves_nothing(rig: Rig) -> None:
    qemu = rig.qemu()
    host = make_host(rig.directory)
    running = asyncio.create_task(host.hypervisor.run())
    while not of(await host.look(), qemu):
        await asyncio.sleep(0.05)
    looking = asyncio.create_task(host.look())
    await asyncio.sleep(0)  # it scans: the process is known, so it is not opened again
    running.cancel()
    await asyncio.wait((running,))
    with pytest.raises(HypervisorError, match="stops"):
        await looking
