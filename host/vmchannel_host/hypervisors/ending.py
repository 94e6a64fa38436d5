# SPDX-License-Identifier: LGPL-2.1-or-later
"""How an instance is ended and what proves it: quit or SIGTERM, SIGKILL, its monitor heard out (S1)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from vmchannel_host.hypervisors import BeforeKill, HypervisorError, NotProven
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.image_locks import OpenStorage, look_at_storage, wait_settled
from vmchannel_host.hypervisors.instances import InstanceTable, Watched
from vmchannel_host.hypervisors.monitors import CommandRefused, InstanceMonitor, MonitorError
from vmchannel_host.model import EndCause, EndProof, HostName, InstanceEnded, IoState

log = logging.getLogger(__name__)

STORAGE_TIMEOUT_S = 0.5
"""How long the look at its files may hold up the SIGKILL, in seconds."""

STREAM_TIMEOUT_S = 1.0
"""How long the monitor's stream may take to end after its process has, in seconds."""

WORD_TIMEOUT_S = 5.0
"""How long libvirt may take to say how an instance ended that was in a migration, in seconds.

To save a VM is such a migration, and no departure. libvirtd has work of its own to do before it says so.
"""

MAX_SETTLING = 64
"""Ended instances whose image locks are probed on; of further ones the writes stay unproven."""

LONGEST_SETTLE_S = 3600.0
"""How long they are probed on, in seconds: a disk that has not answered by then is not waited for."""

SETTLE_POLL_S = (0.5, 30.0)
"""Between two such probes, in seconds: at first, and at most."""

SETTLE_TIMEOUT_S = 10.0
"""How long image locks are waited for after a SIGKILL, in seconds; the slowest write seen took 7.5."""


class Endings:
    """Ends instances. Each instance is ended by one caller at a time; the others wait for it."""

    def __init__(
        self,
        table: InstanceTable,
        calls: DetachedCalls,
        *,
        host: HostName,
        clock: Callable[[], float],
        proc: Path = Path("/proc"),
        settle_timeout_s: float = SETTLE_TIMEOUT_S,
    ) -> None:
        self._table = table
        self._calls = calls
        self._host = host
        self._clock = clock
        self._proc = proc
        self._settle_timeout_s = settle_timeout_s
        self._settling = 0

    async def end(
        self,
        watched: Watched,
        *,
        quit_timeout_s: float,
        timeout_s: float,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        """End an instance: `quit` for at most `quit_timeout_s`, then SIGKILL; prove it within `timeout_s`.

        Raises:
            NotProven: the process did not end in time. What was asked of it may still take effect.
            Exception: what `before_kill` raised; no SIGKILL was sent.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        began = self._clock()
        try:
            async with asyncio.timeout_at(deadline):
                await watched.ending.acquire()
        except TimeoutError as error:
            raise NotProven(
                f"{watched.identity}: another off of it did not finish in {timeout_s:.3g} s"
            ) from error
        try:
            if watched.evidence is not None:
                return watched.evidence
            await self._quit_or_kill(watched, min(quit_timeout_s, timeout_s / 2), deadline, before_kill)
            return await self._conclude(watched, began, deadline)
        finally:
            watched.ending.release()

    async def watch(self, watched: Watched) -> None:
        """Wait for the end of an instance, by whatever cause, and report it. Returns when it is reported."""
        await watched.process.wait_ended()
        async with watched.ending:
            if watched.evidence is None:
                deadline = asyncio.get_running_loop().time() + WORD_TIMEOUT_S + self._settle_timeout_s
                await self._conclude(watched, self._clock(), deadline)

    async def settle(self, watched: Watched) -> None:
        """Wait until the writes of an instance that was killed have settled, if its end could not prove it.

        Else an `off` that a slow disk has failed could never succeed later. The files are held open as long.
        """
        storage = watched.storage_at_kill
        try:
            if storage is None or not storage.files or self._settling >= MAX_SETTLING:
                return
            self._settling += 1
            try:
                if await self._settles_later(storage):
                    log.info("writes have settled: %s", watched.identity)
                    self._table.settled(watched)
            finally:
                self._settling -= 1
        finally:
            watched.drop_storage()

    async def _settles_later(self, storage: OpenStorage) -> bool:
        loop = asyncio.get_running_loop()
        until = loop.time() + LONGEST_SETTLE_S
        pause_s, longest_s = SETTLE_POLL_S
        while (left_s := until - loop.time()) > 0:
            try:
                # One call, however long it hangs: another one would hang beside it.
                if await self._calls.call("probe image locks", storage.free, timeout_s=left_s):
                    return True
            except HypervisorError:
                pass  # too many calls hang: later
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)
        return False

    async def _quit_or_kill(
        self, watched: Watched, quit_timeout_s: float, deadline: float, before_kill: BeforeKill | None
    ) -> None:
        """Leaves in `storage_at_kill` what it had open when it was killed.

        It stays when the caller goes away: whoever concludes the end has no other way to prove its writes.
        """
        if watched.process.command.domain_id is not None:
            await self._terminate(watched, quit_timeout_s)
        elif watched.monitor is not None and watched.monitor.open:
            await self._quit(watched, watched.monitor, quit_timeout_s)
        if watched.process.ended():
            return
        if watched.storage_at_kill is None:
            # As late as possible: what it opens after the look would be missed. Never after a kill: a process
            # that is ending shows nothing, whatever it still writes.
            storage = await self._storage(watched)
            try:
                if not storage.nothing and before_kill is not None:
                    await _marked(watched, before_kill, deadline)
                    if not storage.unprovable:  # the mark took its time: look again
                        storage.close()
                        storage = OpenStorage((), "not looked at")
                        storage = await self._storage(watched)
                if watched.process.ended():
                    return
                watched.process.kill()
                watched.cause, watched.storage_at_kill = EndCause.KILL, storage
            finally:
                if watched.storage_at_kill is not storage:
                    storage.close()
        else:
            watched.process.kill()
        if not await _ended_by(watched, until=deadline):
            raise NotProven(f"{watched.identity} was killed but has not ended: it may hang in the kernel")

    async def _terminate(self, watched: Watched, timeout_s: float) -> None:
        """Have a QEMU of libvirt's leave as libvirt itself would, which then books an end in order.

        SIGTERM needs no libvirtd that answers. That QEMU drained is told by its exit status; where the kernel
        does not tell that, by what it had open.
        """
        storage = await self._storage(watched)
        try:
            watched.cause = EndCause.TERM
            watched.process.terminate()
            until = asyncio.get_running_loop().time() + timeout_s
            if await _ended_by(watched, until=until) and watched.storage_at_kill is None:
                watched.storage_at_kill = storage
        finally:
            if watched.storage_at_kill is not storage:
                storage.close()

    async def _quit(self, watched: Watched, monitor: InstanceMonitor, timeout_s: float) -> None:
        """Ask QEMU to leave, and wait until it has, has refused, or `timeout_s` is over."""
        watched.cause = EndCause.QUIT
        until = asyncio.get_running_loop().time() + timeout_s
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(_ask_to_quit(watched, monitor, timeout_s), name="quit")
            ending = tasks.create_task(_ended_by(watched, until=until), name="end after quit")
            await asyncio.wait((asking, ending), return_when=asyncio.FIRST_COMPLETED)
            if asking.done() and not asking.result():
                ending.cancel()
            else:
                await asyncio.wait((ending,))
                if ending.result():  # its stream has ended too: the answer is in it or will not come
                    await asyncio.wait((asking,), timeout=STREAM_TIMEOUT_S)
            asking.cancel()

    async def _storage(self, watched: Watched) -> OpenStorage:
        def look() -> OpenStorage:
            return look_at_storage(watched.identity.pid, watched.process.command, proc=self._proc)

        try:
            return await self._calls.call(
                "look at storage", look, timeout_s=STORAGE_TIMEOUT_S, discard=OpenStorage.close
            )
        except NotProven as error:
            return OpenStorage((), f"{error}")

    async def _conclude(self, watched: Watched, began: float, deadline: float) -> InstanceEnded:
        """The pidfd has fired: gather the rest of the evidence and report it."""
        elapsed_ms = round((self._clock() - began) * 1000)
        monitor = watched.monitor
        read_to_end = await _read_to_end(monitor, _patience(watched, monitor, deadline))
        io = await self._io_state(watched, watched.storage_at_kill, deadline)
        held_back = not read_to_end and monitor is not None and monitor.ends_with_process
        if not read_to_end:
            log.warning("the monitor's stream did not end with its process: %s", watched.identity)
        evidence = InstanceEnded(
            host=self._host,
            identity=watched.identity,
            proof=EndProof.PIDFD,
            cause=watched.cause,
            io=io,
            # What was not read may say that a migration completed.
            departed=watched.departed or held_back,
            elapsed_ms=elapsed_ms,
        )
        self._table.conclude(watched, evidence)
        log.info(
            "instance ended vm=%s %s cause=%s io=%s departed=%s",
            watched.identity.vm_uuid,
            watched.identity,
            evidence.cause.value,
            io.value,
            evidence.departed,
        )
        return evidence

    async def _io_state(self, watched: Watched, storage: OpenStorage | None, deadline: float) -> IoState:
        if _left_by_itself(watched, watched.process.exit_status(self._proc)):
            return IoState.DRAINED
        if storage is None:
            return IoState.UNPROVEN  # nobody saw what it had open
        if storage.nothing:
            return IoState.NONE
        if storage.unprovable:
            log.info("writes cannot be proven settled: %s: %s", watched.identity, storage.unprovable)
            return IoState.UNPROVEN

        async def probe() -> bool:
            try:
                return await self._calls.call("probe image locks", storage.free, timeout_s=1.0)
            except HypervisorError:
                return False

        loop_time = asyncio.get_running_loop().time()
        settled = await wait_settled(probe, until=min(deadline, loop_time + self._settle_timeout_s))
        return IoState.SETTLED if settled else IoState.UNPROVEN


async def _marked(watched: Watched, before_kill: BeforeKill, deadline: float) -> None:
    """Let the caller note the kill. What it raises, or a passed deadline, keeps the kill from being sent."""
    try:
        async with asyncio.timeout_at(deadline):
            await before_kill()
    except TimeoutError as error:
        raise NotProven(
            f"{watched.identity} was not killed: that it is could not be recorded in time"
        ) from error


async def _ask_to_quit(watched: Watched, monitor: InstanceMonitor, timeout_s: float) -> bool:
    """Send `quit`. False when QEMU refused it; a lost or late answer says nothing."""
    try:
        await monitor.quit(timeout_s=timeout_s)
    except CommandRefused as error:
        log.warning("quit refused: %s", error)
        return False
    except MonitorError:
        return True
    watched.quit_taken = True
    return True


def _left_by_itself(watched: Watched, exit_status: int | None) -> bool:
    """Whether QEMU went the way on which it drains and closes its images.

    `quit` was taken, then it ended; a SHUTDOWN event alone may have been followed by a SIGKILL. A `quit`
    without an answer may have met a QEMU that was crashing: then its exit status must say so.
    """
    if watched.cause is EndCause.TERM:
        return exit_status == 0
    if watched.cause is EndCause.QUIT:
        return exit_status == 0 or (exit_status is None and watched.quit_taken)
    return watched.cause is EndCause.NONE and watched.shutdown_seen and exit_status == 0


async def _ended_by(watched: Watched, *, until: float) -> bool:
    try:
        async with asyncio.timeout_at(until):
            await watched.process.wait_ended()
    except TimeoutError:
        return watched.process.ended()
    return True


def _patience(watched: Watched, monitor: InstanceMonitor | None, deadline: float) -> float:
    """How long the monitor may take to tell the rest, in seconds."""
    if monitor is None or monitor.ends_with_process or not watched.departed:
        return STREAM_TIMEOUT_S
    return max(STREAM_TIMEOUT_S, min(WORD_TIMEOUT_S, deadline - asyncio.get_running_loop().time()))


async def _read_to_end(monitor: InstanceMonitor | None, timeout_s: float) -> bool:
    if monitor is None:
        return True  # nothing was watched, so nothing was missed
    try:
        async with asyncio.timeout(timeout_s):
            await monitor.wait_closed()
    except TimeoutError:
        return not monitor.open
    return True
