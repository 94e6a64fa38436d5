# SPDX-License-Identifier: LGPL-2.1-or-later
"""`system_reset` and its proof (S8)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vmchannel_host.hypervisors import HypervisorError, NotProven
from vmchannel_host.hypervisors.instances import Watched
from vmchannel_host.hypervisors.monitors import InstanceMonitor, MonitorError
from vmchannel_host.model import HostName, InstanceReset, Migration, RunState


async def reset_instance(
    watched: Watched, *, host: HostName, clock: Callable[[], float], timeout_s: float
) -> InstanceReset:
    """Reset the one running instance of a VM and prove it.

    The RESET event must arrive after the command was sent, and the last thing read before was a fresh run
    state: all that happened before was told by then, so no older event can be left in the stream. A reset by
    the guest has another reason and does not count.

    Raises:
        HypervisorError: nothing is proven; the VM may have been reset or not.
        NotProven: the same, by time.
    """
    began = clock()
    monitor = watched.monitor
    if monitor is None or watched.mute:
        raise HypervisorError(f"{watched.identity}: no monitor answers, so a reset cannot be proven")
    try:
        async with asyncio.timeout(timeout_s):
            await _check_resettable(watched, monitor, timeout_s)
            await monitor.reset(timeout_s=timeout_s)
            await _check_runs(watched, monitor, timeout_s)
    except TimeoutError as error:
        raise NotProven(f"{watched.identity}: no proof of a reset in {timeout_s:.3g} s") from error
    except MonitorError as error:
        raise HypervisorError(f"{watched.identity}: reset not proven: {error}") from error
    return InstanceReset(host, watched.identity, elapsed_ms=round((clock() - began) * 1000))


async def _check_resettable(watched: Watched, monitor: InstanceMonitor, timeout_s: float) -> None:
    command = watched.process.command
    by_command_line = not command.passthrough and not command.no_reboot
    if not by_command_line or not await monitor.resettable(timeout_s=timeout_s):
        raise HypervisorError(
            f"{watched.identity}: a reset is no proof: passthrough device, -no-reboot, or unknown"
        )
    await _check_runs(watched, monitor, timeout_s)


async def _check_runs(watched: Watched, monitor: InstanceMonitor, timeout_s: float) -> None:
    run_state, migration = await monitor.run_state(timeout_s=timeout_s)
    if run_state is not RunState.RUNNING or migration is not Migration.NONE or watched.process.ended():
        raise HypervisorError(
            f"{watched.identity}: no reset in state {run_state.value}, migration {migration.value}"
        )
