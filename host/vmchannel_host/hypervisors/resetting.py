# SPDX-License-Identifier: LGPL-2.1-or-later
"""`system_reset` and its proof (S8)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from vmchannel_host.hypervisors import HypervisorError, NotProven
from vmchannel_host.hypervisors.instances import Watched
from vmchannel_host.hypervisors.qmp_monitor import (
    EventTap,
    Monitor,
    MonitorClosed,
    MonitorError,
    read_resettable,
    read_run_state,
)
from vmchannel_host.model import HostName, InstanceReset, Migration, RunState


async def reset_instance(
    watched: Watched, *, host: HostName, clock: Callable[[], float], timeout_s: float
) -> InstanceReset:
    """Reset the one running instance of a VM and prove it.

    The RESET event must arrive after the command was sent, and the last thing read before was a fresh
    `query-status`: QEMU writes events and replies in the order in which they happen, so no older event can be
    left in the stream. (QEMU 7.2 was seen to write the event just before the command's own return, as well as
    after it: the command is carried out before its reply is queued. Both are taken; the reply must come too.)
    A reset by the guest has another reason and does not count.

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
            with monitor.tap("RESET") as tap:
                await monitor.execute("system_reset", timeout_s=timeout_s)
                await _wait_for_event(tap, monitor)
            await _check_runs(watched, monitor, timeout_s)
    except TimeoutError as error:
        raise NotProven(f"{watched.identity}: no proof of a reset in {timeout_s:.3g} s") from error
    except MonitorError as error:
        raise HypervisorError(f"{watched.identity}: reset not proven: {error}") from error
    return InstanceReset(host, watched.identity, elapsed_ms=round((clock() - began) * 1000))


async def _check_resettable(watched: Watched, monitor: Monitor, timeout_s: float) -> None:
    command = watched.process.command
    by_command_line = not command.passthrough and not command.no_reboot
    if not by_command_line or not await read_resettable(monitor, timeout_s=timeout_s):
        raise HypervisorError(
            f"{watched.identity}: a reset is no proof: passthrough device, -no-reboot, or unknown"
        )
    await _check_runs(watched, monitor, timeout_s)


async def _check_runs(watched: Watched, monitor: Monitor, timeout_s: float) -> None:
    run_state, migration = await read_run_state(monitor, timeout_s=timeout_s)
    if run_state is not RunState.RUNNING or migration is not Migration.NONE or watched.process.ended():
        raise HypervisorError(
            f"{watched.identity}: no reset in state {run_state.value}, migration {migration.value}"
        )


def _by_our_command(data: Mapping[str, object]) -> bool:
    return data.get("reason") == "host-qmp-system-reset" and data.get("guest") is False


async def _wait_for_event(tap: EventTap, monitor: Monitor) -> None:
    """Wait for the RESET event; a monitor that closes first means that QEMU left instead (-no-reboot)."""
    async with asyncio.TaskGroup() as tasks:
        event = tasks.create_task(tap.wait_for(_by_our_command), name="reset event")
        closed = tasks.create_task(monitor.wait_closed(), name="monitor closed")
        await asyncio.wait((event, closed), return_when=asyncio.FIRST_COMPLETED)
        proven = event.done()
        event.cancel()
        closed.cancel()
    if not proven:
        raise MonitorClosed(f"{monitor.path}: closed before the RESET event")
