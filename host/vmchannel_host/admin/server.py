# SPDX-License-Identifier: LGPL-2.1-or-later
"""The admin API: HTTP and JSON over a unix socket, for vmchannelctl, curl and Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, cast

from aiohttp import web

from vmchannel_host.admin.handlers import AdminHandlers, AdminLimits, as_refusal, drop
from vmchannel_host.admin.json_text import AdminRefusal, dump
from vmchannel_host.admin.listener import AdminSocket
from vmchannel_host.admin.metrics import Metrics
from vmchannel_host.admin.view import AdminView

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

__all__ = ["AdminLimits", "AdminServer"]

MAX_BODY: Final = 16_384
"""Largest request body, in bytes; the largest order has under 2,000."""


class AdminServer:
    """Serves the admin API from `start` until `close`."""

    def __init__(
        self,
        view: AdminView,
        metrics: Metrics,
        path: Path,
        *,
        group: str = "vmchannel",
        limits: AdminLimits = AdminLimits(),  # noqa: B008 - frozen
    ) -> None:
        """Build it; nothing is opened yet.

        Args:
            view: what is shown and asked.
            metrics: /metrics; made to follow the view here.
            path: of the unix socket.
            group: who may connect beside root, where the group exists.
            limits: of clients.
        """
        metrics.follow(view)
        self._handlers = AdminHandlers(view, metrics, limits)
        self._metrics = metrics
        self._path = path
        self._group = group
        self._limits = limits
        self._socket: AdminSocket | None = None
        self._server: asyncio.AbstractServer | None = None
        self._runner: web.AppRunner | None = None
        self._quiet: dict[object, asyncio.TimerHandle] = {}  # connections without a request yet
        self._requests: set[tuple[asyncio.Task[object], asyncio.Future[None]]] = set()

    async def start(self) -> None:
        """Open the socket and serve.

        Raises:
            AdminSocketError: another daemon serves it, or the path cannot be used.
        """
        self._socket = AdminSocket(self._path, group=self._group)
        application = web.Application(middlewares=[self._middleware], client_max_size=MAX_BODY)
        application.add_routes(self._handlers.routes())
        # No lingering: a body that does not come is not waited for a second time after its refusal.
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, lingering_time=0)
        await self._runner.setup()
        self._server = await asyncio.get_running_loop().create_unix_server(
            self._protocol, sock=self._socket.socket, backlog=128
        )

    async def close(self, *, timeout_s: float = 5.0) -> None:
        """End: live views at once, fences that someone waits for after `timeout_s` seconds. Idempotent."""
        self._handlers.stop()
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._end_requests(timeout_s)
            server = self._runner.server
            if server is not None:
                await server.shutdown(0.1)
            await self._runner.cleanup()
            self._runner = None
        for timer in self._quiet.values():
            timer.cancel()
        self._quiet.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _end_requests(self, timeout_s: float) -> None:
        """Wait for what is being answered, then cancel it.

        aiohttp forgets a request whose client has gone, though its handler runs on: here all are known.
        """
        for patience_s in (timeout_s, 1.0):
            if self._requests:
                await asyncio.wait([done for _, done in self._requests], timeout=patience_s)
            for task, _ in self._requests:
                task.cancel()

    @property
    def connections(self) -> int:
        """Clients that are connected now."""
        server = self._runner.server if self._runner else None
        return 0 if server is None else len(server.connections)

    def _protocol(self) -> asyncio.BaseProtocol:
        """One connection. aiohttp bounds neither their number nor how long the first request may take."""
        server = self._runner.server if self._runner else None
        if server is None or self.connections >= self._limits.clients:
            return _Refuse()
        protocol = server()
        loop = asyncio.get_running_loop()

        def drop() -> None:
            self._quiet.pop(protocol, None)
            protocol.force_close()

        self._quiet[protocol] = loop.call_later(self._limits.patience_s, drop)
        return protocol

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer every request with JSON, and send the answer in time or not at all."""
        timer = self._quiet.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()
        task, done = asyncio.current_task(), asyncio.get_running_loop().create_future()
        assert task is not None  # a coroutine that runs is in a task
        self._requests.add((task, done))
        try:
            return await self._respond(request, handler)
        finally:
            self._requests.discard((task, done))
            done.set_result(None)

    async def _respond(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await self._answer(request, handler)
        if response.prepared:
            return response
        try:
            async with asyncio.timeout(self._limits.patience_s):
                await response.prepare(request)
                await response.write_eof()
        except (TimeoutError, ConnectionError):
            drop(request)  # it does not read: its answer is not kept for it
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            self._metrics.input_refused("admin-request")
            remedy = "see vmchannelctl(8) for the paths" if error.status in (404, 405) else ""
            code = error.reason.lower().replace(" ", "_")
            return refusal_response(AdminRefusal(error.status, code, error.reason, remedy))
        except Exception as error:  # noqa: BLE001 - the top of a request: logged, never an answer of success
            refusal = as_refusal(error, request.path)
            if refusal.code == "bad_request":
                self._metrics.input_refused("admin-request")
            return refusal_response(refusal)


def refusal_response(refusal: AdminRefusal) -> web.Response:
    """`{code, reason, remedy}` with its status."""
    return web.json_response(text=dump(refusal.body), status=refusal.status)


class _Refuse(asyncio.Protocol):
    """Tells a connection too many so, and closes it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """(`asyncio.BaseProtocol`)"""
        writer = cast("asyncio.WriteTransport", transport)
        body = dump(
            {"code": "limit", "reason": "too many admin clients", "remedy": "close some of them"}
        ).encode()
        writer.write(
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        writer.close()
