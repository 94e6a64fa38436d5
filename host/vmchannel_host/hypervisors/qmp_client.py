# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QMP library's client with bounded memory: events are handed on, unanswered commands counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

from qemu.qmp import EventListener, Message, QMPClient, Runstate

from vmchannel_host.hypervisors.monitors import MonitorClosed, MonitorMute

MAX_MESSAGE_BYTES = 128 * 1024
"""Longest line taken from a monitor, in bytes; query-chardev with 500 chardevs is half of it."""

READ_BYTES = 16 * 1024
"""Taken from a monitor at a time, in bytes; then the other tasks have their turn."""

EventHandler = Callable[[str, Mapping[str, object]], None]


class EventTap:
    """The events of one name; keeps the first 64."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._events: list[Mapping[str, object]] = []
        self._arrived = asyncio.Event()

    def put(self, data: Mapping[str, object]) -> None:
        if len(self._events) < 64:
            self._events.append(data)
            self._arrived.set()

    async def wait_for(self, wanted: Callable[[Mapping[str, object]], bool]) -> None:
        """Wait for the first event that is wanted."""
        while not any(wanted(data) for data in self._events):
            self._arrived.clear()
            await self._arrived.wait()


class Client(QMPClient):
    """The library's client with bounded memory, and quiet: the caller logs what matters."""

    def __init__(self) -> None:
        super().__init__(readbuflen=MAX_MESSAGE_BYTES)
        self.logger = logging.Logger("quiet", logging.CRITICAL + 1)  # noqa: LOG001 - for this object only
        self.events.event_filter = lambda _event: False
        self.handler: EventHandler | None = None
        self.taps: list[EventTap] = []
        self.unanswered: set[str] = set()
        self.heard = asyncio.Event()
        self.register_listener(_Listener(self))

    async def _establish_session(self) -> None:
        await super()._establish_session()
        if self._writer is not None:
            # asyncio's own 256 KiB would be thousands of events in one go: 80 ms for which all others wait.
            cast(Any, self._writer.transport).max_size = READ_BYTES
        if self._bh_tasks is not None:
            self._bh_tasks.add_done_callback(fetch_error)

    def pass_fd(self, fd: int, path: str) -> None:
        """Send a descriptor beside the stream: QEMU keeps it for the next `getfd`.

        The blank that carries it may not fall into the middle of a command that is not yet sent whole.
        """
        if self._writer is None or self.runstate != Runstate.RUNNING:
            raise MonitorClosed(f"{path}: closed")
        if self._writer.transport.get_write_buffer_size():
            raise MonitorMute(f"{path}: QEMU does not read")
        try:
            self.send_fd_scm(fd)
        except BlockingIOError as error:
            raise MonitorMute(f"{path}: QEMU does not read") from error
        except OSError as error:
            raise MonitorClosed(f"{path}: {error.strerror or error}") from error

    def _schedule_disconnect(self) -> None:
        super()._schedule_disconnect()
        if self._dc_task is not None:
            self._dc_task.add_done_callback(fetch_error)

    def _cb_outbound(self, msg: Message) -> Message:
        if isinstance(identifier := msg.get("id"), str):
            self.unanswered.add(identifier)
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        self.heard.set()
        if isinstance(identifier := msg.get("id"), str):
            self.unanswered.discard(identifier)
        return msg


def fetch_error(done: asyncio.Future[Any]) -> None:
    """Errors of the library's tasks are those of the connection: `wait_closed` and `execute` report them."""
    if not done.cancelled():
        done.exception()


class _Listener(EventListener):
    """Hands events on from the reader instead of keeping them: the library's own listener grows for ever."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._owner = client

    async def put(self, event: Message) -> None:
        name, data = event.get("event"), event.get("data")
        if not isinstance(name, str):
            return
        fields: Mapping[str, object] = cast(Mapping[str, object], data) if isinstance(data, dict) else {}
        for tap in self._owner.taps:
            if tap.name == name:
                tap.put(fields)
        if self._owner.handler is not None:
            self._owner.handler(name, fields)
