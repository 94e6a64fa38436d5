# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each path of the admin API does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from aiohttp import web

from fence_vmchannel.messages import FenceAnswer, FenceProgress
from vmchannel_host.admin.json_text import (
    AdminRefusal,
    answer_json,
    answer_status,
    confirm_json,
    confirm_status,
    dump,
    parse_action,
    parse_name,
    parse_order,
    parse_plug,
    parse_vm,
    plug_json,
    plug_status,
    to_json,
)
from vmchannel_host.admin.listener import peer_user
from vmchannel_host.admin.metrics import CONTENT_TYPE, Metrics
from vmchannel_host.admin.view import AdminEvent, AdminView, FenceOrder
from vmchannel_host.journal.types import JournalError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PROGRESS: Final = 64  # lines kept for a client that does not read; the oldest go
_HEARTBEAT_S: Final = 15.0  # how soon a client that went without a word is noticed


@dataclass(frozen=True, slots=True)
class AdminLimits:
    """What one client, or all of them, may hold."""

    clients: int = 64  # connections; one more is answered 503 and closed
    patience_s: float = 10.0  # for a request to arrive whole, and for an answer to be taken
    grace_s: float = 5.0  # for the answer to a fence after its own time-out
    streams: int = 32  # live views at once


class AdminHandlers:
    """The paths, over a view."""

    def __init__(self, view: AdminView, metrics: Metrics, limits: AdminLimits) -> None:
        self._view = view
        self._metrics = metrics
        self._limits = limits
        self._patience_s = limits.patience_s
        self._stopping = asyncio.Event()
        self._streams = 0

    def routes(self) -> Sequence[web.RouteDef]:
        """The table of paths."""
        return [
            web.get("/v1/status", self._snapshot(self._view.status)),
            web.get("/v1/vms", self._snapshot(self._view.vms)),
            web.get("/v1/definitions", self._snapshot(self._view.definitions)),
            web.get("/v1/ports", self._snapshot(self._view.ports)),
            web.get("/v1/hosts", self._snapshot(self._view.hosts)),
            web.get("/v1/ops", self._ops),
            web.get("/v1/ops/{operation}", self._op),
            web.get("/v1/doctor", self._doctor),
            web.get("/v1/can", self._can),
            web.get("/v1/journal/verify", self._verify),
            web.get("/v1/events", self._events),
            web.post("/v1/fence", self._fence),
            web.post("/v1/confirm-off", self._confirm_off),
            web.post("/v1/attach", self._attach),
            web.post("/v1/detach", self._detach),
            web.get("/metrics", self._render_metrics),
        ]

    def stop(self) -> None:
        """End the live views."""
        self._stopping.set()

    def _snapshot(
        self, read: Callable[[], object]
    ) -> Callable[[web.Request], Coroutine[None, None, web.Response]]:
        async def handler(_: web.Request) -> web.Response:
            return _json(read())

        return handler

    async def _ops(self, request: web.Request) -> web.Response:
        text = request.query.get("limit", "50")
        if not (text.isascii() and text.isdigit() and 0 < len(text) <= 4 and 0 < int(text) <= 1000):
            raise AdminRefusal(400, "bad_request", "limit must be 1 to 1000")
        return _json(await self._view.ops(int(text)))

    async def _op(self, request: web.Request) -> web.Response:
        operation = await self._view.op(request.match_info["operation"])
        if operation is None:
            raise AdminRefusal(404, "not_found", "no operation of that id", "see `vmchannelctl ops`")
        return _json(operation)

    async def _doctor(self, _: web.Request) -> web.Response:
        return _json(await self._view.doctor())

    async def _can(self, request: web.Request) -> web.Response:
        names = [parse_name(key, request.query.get(key)) for key in ("vm", "plug")]
        action = parse_action(request.query.get("action"))
        return _json(await self._view.can(names[0], action, names[1]))

    async def _verify(self, _: web.Request) -> web.Response:
        return _json(await self._view.verify_journal())

    async def _render_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _confirm_off(self, request: web.Request) -> web.Response:
        vm = parse_vm(await self._body(request))
        told = await self._view.confirm_off(vm, _operator(request))
        return web.json_response(text=dump(confirm_json(told)), status=confirm_status(told))

    async def _attach(self, request: web.Request) -> web.Response:
        return await self._plug(request, attach=True)

    async def _detach(self, request: web.Request) -> web.Response:
        return await self._plug(request, attach=False)

    async def _plug(self, request: web.Request, *, attach: bool) -> web.Response:
        told = await self._view.plug(parse_plug(await self._body(request), _operator(request), attach=attach))
        return web.json_response(text=dump(plug_json(told)), status=plug_status(told))

    async def _body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._patience_s):
                return await request.read()
        except TimeoutError as error:
            raise AdminRefusal(408, "timeout", "the request did not arrive in time") from error

    async def _fence(self, request: web.Request) -> web.StreamResponse:
        order = parse_order(await self._body(request), _operator(request))
        if "text/event-stream" in request.headers.get("Accept", ""):
            return await self._fence_with_progress(request, order)
        answer = await self._order(order, lambda _: None)
        return web.json_response(text=dump(answer_json(answer)), status=answer_status(answer))

    async def _order(self, order: FenceOrder, progress: Callable[[FenceProgress], None]) -> FenceAnswer:
        """The view keeps the deadline; should it not, the outcome is unknown and that is what is said."""
        try:
            async with asyncio.timeout(order.timeout_s + self._limits.grace_s):
                return await self._view.fence(order, progress)
        except TimeoutError as error:
            raise AdminRefusal(
                504, "deadline", "no answer in time: the outcome is unknown", "look with `vmchannelctl ops`"
            ) from error

    async def _fence_with_progress(self, request: web.Request, order: FenceOrder) -> web.StreamResponse:
        """Send `progress` events, then one `answer` or `error`. A client that goes ends nothing (S5)."""
        lines: asyncio.Queue[FenceProgress] = asyncio.Queue(_PROGRESS)

        def take(progress: FenceProgress) -> None:
            if lines.full():
                lines.get_nowait()
            lines.put_nowait(progress)

        stream = _Stream(request, self._patience_s)
        await stream.open()
        async with asyncio.TaskGroup() as tasks:
            writer = tasks.create_task(stream.copy(lines), name="fence progress")
            try:
                kind, body = await self._outcome(request, order, take)
            finally:
                writer.cancel()
        while not lines.empty():
            await stream.send("progress", to_json(lines.get_nowait()))
        await stream.send(kind, body)
        return await stream.end()

    async def _outcome(
        self, request: web.Request, order: FenceOrder, progress: Callable[[FenceProgress], None]
    ) -> tuple[str, object]:
        """The last event of a fence: its answer, or why there is none."""
        try:
            return "answer", answer_json(await self._order(order, progress))
        except Exception as error:  # noqa: BLE001 - the head is sent: what failed is told as an event
            return "error", as_refusal(error, request.path).body

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._streams >= self._limits.streams:
            raise AdminRefusal(503, "limit", f"{self._streams} live views are open", "close some of them")
        self._streams += 1
        events = self._view.events()
        try:
            stream = _Stream(request, self._patience_s)
            await stream.open()
            await self._send_events(stream, events)
            return await stream.end()
        finally:
            self._streams -= 1
            if isinstance(events, AsyncGenerator):
                await events.aclose()

    async def _send_events(self, stream: _Stream, events: AsyncIterator[AdminEvent]) -> None:
        stop = asyncio.create_task(self._stopping.wait(), name="admin stop")
        following = asyncio.create_task(_next(events), name="admin next event")
        try:
            while not stop.done() and stream.alive:
                await asyncio.wait(
                    {stop, following}, timeout=_HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED
                )
                if not following.done():
                    await stream.comment("alive")
                    continue
                event = following.result()
                if event is None:
                    return
                await stream.send(event.kind, to_json(event))
                following = asyncio.create_task(_next(events), name="admin next event")
        finally:
            await _end(stop)
            await _end(following)


def drop(request: web.Request) -> None:
    """Cut a client off. aiohttp's own close waits until the client has read what is buffered for it."""
    if request.transport is not None:
        request.transport.abort()


def as_refusal(error: Exception, path: str) -> AdminRefusal:
    """What a failed request is answered; an error that nobody expected is logged."""
    if isinstance(error, AdminRefusal):
        return error
    if isinstance(error, JournalError):
        return AdminRefusal(503, "journal", f"the journal: {error}", "mend what it names; fencing is refused")
    logger.error("admin request failed path=%r", path[:200], exc_info=error)
    return AdminRefusal(500, "internal", f"internal error: {type(error).__name__}", "see the daemon's log")


class _Stream:
    """Server-sent events to one client. A client that does not take them in time is dropped, silently."""

    def __init__(self, request: web.Request, patience_s: float) -> None:
        self._request = request
        self._patience_s = patience_s
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        self.alive = True

    async def open(self) -> None:
        """Send the head."""
        await self._bounded(self._response.prepare(self._request))

    async def send(self, kind: str, value: object) -> None:
        """Send one event; its data is one line of JSON."""
        await self._write(f"event: {kind}\ndata: {dump(value)}\n\n")

    async def comment(self, text: str) -> None:
        """Send what clients ignore, to see whether there still is one."""
        await self._write(f": {text}\n\n")

    async def copy(self, lines: asyncio.Queue[FenceProgress]) -> None:
        """Send progress as it comes, until cancelled."""
        while True:
            await self.send("progress", to_json(await lines.get()))

    async def end(self) -> web.StreamResponse:
        """Send the end."""
        await self._bounded(self._response.write_eof())
        return self._response

    async def _write(self, text: str) -> None:
        await self._bounded(self._response.write(text.encode("ascii")))

    async def _bounded(self, sending: Coroutine[None, None, object]) -> None:
        if not self.alive:
            sending.close()
            return
        try:
            async with asyncio.timeout(self._patience_s):
                await sending
        except (TimeoutError, ConnectionError):
            self.alive = False
            drop(self._request)


async def _next(events: AsyncIterator[T]) -> T | None:
    return await anext(events, None)


async def _end(task: asyncio.Task[T]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # looked at, so that it is not reported as forgotten


def _json(value: object) -> web.Response:
    return web.json_response(text=dump(value))


def _operator(request: web.Request) -> str:
    connection = request.get_extra_info("socket")
    return peer_user(connection) if connection is not None else "operator"
