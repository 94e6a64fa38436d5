# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's event loop: `libvirtaio` on an asyncio loop in a thread of its own.

No code of libvirt's runs in the daemon's own loop: a call that holds one of its locks would stop everything
(S7). Calls are made from other threads again, and from these libvirt changes what its loop waits for, which
`libvirtaio` takes for calls from within the loop: an event would wait there until something else wakes it up.
So these changes are handed over. libvirt takes one event loop for the life of a process.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, cast

TURNS: Final = 10
"""Turns of its loop from libvirt's socket to an event's callback: four by `libvirtaio`'s code."""


class EventThread:
    """The thread; a daemon thread, for it never ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def register(self) -> None:
        """Start it, and let libvirt use it. Before the first connection is opened.

        Raises:
            ImportError: libvirt's Python modules are not installed.
        """
        aio: Any = import_module("libvirtaio")
        # Else to connect to `qemu:///session` starts a libvirtd where none runs, and that its autostart VMs.
        os.environ["LIBVIRT_AUTOSTART"] = "0"
        _threaded(aio)(loop=self._loop).register()
        threading.Thread(target=self._loop.run_forever, name="vmchannel libvirt events", daemon=True).start()

    def settle(self, *, timeout_s: float) -> None:
        """Return when the events that libvirt's client has received have been given to their callbacks.

        Raises:
            TimeoutError: not in time.
        """
        turns = asyncio.run_coroutine_threadsafe(_turns(), self._loop)
        try:
            turns.result(timeout_s)
        finally:
            turns.cancel()


async def _turns() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


def _threaded(aio: Any) -> Callable[..., Any]:
    """`libvirtaio`'s implementation, callable from any thread."""
    plain: Any = aio.virEventAsyncIOImpl
    base = cast("type[Any]", plain)

    class Threaded(base):  # type: ignore[misc, valid-type] # the module is untyped, imported when needed
        def _hand_over(self, function: Callable[..., object], *arguments: object) -> None:
            self.loop.call_soon_threadsafe(function, *arguments)

        def _add_handle(self, fd: int, event: int, cb: Any, opaque: Any) -> int:
            callback = aio.FDCallback(self, cb, opaque, descriptor=None, event=event)
            self._hand_over(self._install_handle, fd, callback)
            return int(callback.iden)

        def _install_handle(self, fd: int, callback: Any) -> None:
            callback.descriptor = self.descriptors[fd]
            self.callbacks[callback.iden] = callback
            callback.descriptor.add_handle(callback)
            self._pending_inc()

        def _update_handle(self, watch: int, event: int) -> None:
            self._hand_over(self._update, plain._update_handle, watch, event)

        def _update(self, change: Callable[..., object], iden: int, value: int) -> None:
            if iden in self.callbacks:  # a timer that rings while it is stopped still updates itself
                change(self, iden, value)

        def _remove_handle(self, watch: int) -> int:
            self._hand_over(plain._remove_handle, self, watch)
            return 0

        def _add_timeout(self, timeout: int, cb: Any, opaque: Any) -> int:
            callback = aio.TimeoutCallback(self, cb, opaque)
            self._hand_over(self._install_timeout, timeout, callback)
            return int(callback.iden)

        def _install_timeout(self, timeout: int, callback: Any) -> None:
            self.callbacks[callback.iden] = callback
            callback.update(timeout=timeout)
            self._pending_inc()

        def _update_timeout(self, timer: int, timeout: int) -> None:
            self._hand_over(self._update, plain._update_timeout, timer, timeout)

        def _remove_timeout(self, timer: int) -> int:
            self._hand_over(plain._remove_timeout, self, timer)
            return 0

    return Threaded


def event_thread() -> EventThread:
    """The one of this process, registered with libvirt at the first call. From any thread.

    Raises:
        ImportError: libvirt's Python modules are not installed.
    """
    with _FIRST:
        return _event_thread()


_FIRST: Final = threading.Lock()


@functools.cache
def _event_thread() -> EventThread:
    thread = EventThread()
    thread.register()
    return thread
