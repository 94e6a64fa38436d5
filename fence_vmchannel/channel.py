# SPDX-License-Identifier: LGPL-2.1-or-later
"""A channel for asyncio applications: whole messages in order, with back-pressure both ways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from fence_vmchannel.assembly import Assembly
from fence_vmchannel.core.events import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Data,
    Granted,
    Limits,
    PeerIdentity,
    Priority,
)
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.errors import (
    ChannelClosed,
    CloseCode,
    LocalProtocolError,
    MessageTooLarge,
)
from fence_vmchannel.outcomes import closing_error
from fence_vmchannel.peers import PeerInfo


class Channel:
    """One channel, in the process that uses it. Made by `open` and `offer`, not by hand.

    What has been received but not fetched is bounded by the window; the peer's `send` waits meanwhile.
    """

    def __init__(self, endpoint: Endpoint, peer: PeerInfo, target: str, payload: bytes, window: int) -> None:
        self._endpoint = endpoint
        self._peer = peer
        self._target = target
        self._payload = payload
        self._window = window
        self._id = 0
        self._incoming = False
        self._accepted = False
        self._greeting = b""
        self._closed: Closed | None = None
        self._inbox = Assembly(window)
        self._arrived = asyncio.Event()
        self._credited = asyncio.Event()
        self._ended = asyncio.Event()
        self._when_closed: list[Callable[[], None]] = []
        self._sending = asyncio.Lock()

    # --- for the application ---

    @property
    def peer(self) -> PeerInfo:
        """Who is at the other end."""
        return self._peer

    @property
    def peer_identity(self) -> PeerIdentity | None:
        """What the other side's hub said of itself in its last greeting: untrusted, bound to the session."""
        return self._endpoint.connection.peer

    @property
    def target(self) -> str:
        """The service's name."""
        return self._target

    @property
    def payload(self) -> bytes:
        """What the opener sent with its request to open."""
        return self._payload

    @property
    def greeting(self) -> bytes:
        """What the service sent when it accepted; b"" before."""
        return self._greeting

    @property
    def closed(self) -> bool:
        """Whether the channel has ended. Messages that came before may still wait."""
        return self._closed is not None

    @property
    def close_code(self) -> CloseCode | None:
        """How the channel has ended; None while it has not."""
        return self._closed.code if self._closed is not None else None

    async def accept(self, payload: bytes = b"") -> None:
        """Accept a channel that a peer opened, with a greeting for it. `send` and `receive` imply it.

        Raises:
            ChannelClosed: the peer has closed it meanwhile.
            LocalProtocolError: it is accepted already, or it is ours.
        """
        if not self._incoming or self._accepted:
            raise LocalProtocolError("only a channel that the peer opened is accepted, and once")
        self._check_open()
        self._accept(payload)

    async def send(self, message: bytes) -> None:
        """Send one message; waits until the reader's window has room for all of it.

        Returns when this process has queued it: that it was received, only an answer tells. May be cancelled
        while it waits; nothing has been sent then.

        Raises:
            MessageTooLarge: the reader's window could never take it.
            ChannelClosed: the channel has ended.
        """
        async with self._sending:
            self._check_open()
            if not self._accepted:
                self._accept(b"")
            connection = self._endpoint.connection
            if len(message) > connection.max_message(self._id):
                most = connection.max_message(self._id)
                raise MessageTooLarge(f"{len(message)} bytes; the reader takes messages of at most {most}")
            while True:
                self._credited.clear()
                self._check_open()
                # An empty message needs credit too, but `credit` cannot say "0 bytes": so ask for one byte.
                if connection.credit(self._id) >= max(1, len(message)):
                    break
                await self._credited.wait()
            connection.send(self._id, message)
            self._endpoint.kick()

    async def receive(self) -> bytes | None:
        """The next message; None when the peer has closed the channel normally. Waits as long as it takes.

        Raises:
            ChannelClosed: it ended otherwise; `code` says why. Its last messages have been delivered before.
        """
        if self._incoming and not self._accepted and self._closed is None:
            self._accept(b"")
        while not self._inbox:
            if self._closed is not None:
                if self._closed.code is CloseCode.NORMAL:
                    return None
                raise self._closing_error()
            self._arrived.clear()
            await self._arrived.wait()
        message, delivered, limit = self._inbox.take()
        if self._closed is None:
            self._endpoint.connection.grant(self._id, delivered, limit, lazily=True)
            self._endpoint.kick()
        return message

    async def request(self, message: bytes) -> bytes:
        """Send one message and wait for one.

        Raises:
            ChannelClosed: the channel ended before an answer came; whether the request was acted on is
            unknown.
        """
        await self.send(message)
        answer = await self.receive()
        if answer is None:
            raise ChannelClosed(CloseCode.NORMAL, "closed without an answer")
        return answer

    def close(self, code: CloseCode = CloseCode.NORMAL, reason: str = "") -> None:
        """End the channel, after what was sent on it. Closing again does nothing."""
        if self._closed is None:
            self._endpoint.close(self._id, code, reason)
            self._end(Closed(self._id, code, reason, aborted=False))

    async def wait_closed(self) -> None:
        """Wait until the channel has ended, from either side."""
        await self._ended.wait()

    def when_closed(self, call: Callable[[], None]) -> None:
        """Call `call` as soon as the channel ends, from either side; at once if it has."""
        if self._closed is not None:
            call()
        else:
            self._when_closed.append(call)

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- for hub and client ---

    @property
    def endpoint(self) -> Endpoint:
        """The connection that carries it."""
        return self._endpoint

    @property
    def number(self) -> int:
        """Which of the connection's channels it is."""
        return self._id

    @classmethod
    async def opened(
        cls,
        endpoint: Endpoint,
        peer: PeerInfo,
        target: str,
        *,
        payload: bytes = b"",
        priority: Priority = Priority.NORMAL,
        window: int | None = None,
    ) -> Channel:
        """Open a channel and wait until the peer accepts it. Cancelling closes it.

        Raises:
            ServiceRefused: the peer refuses it, or a limit is reached.
            ChannelClosed, MessageTooLarge: as for `Connection.open`.
        """
        channel = cls(endpoint, peer, target, payload, window or Limits().window_bytes)
        channel._id = endpoint.open(
            target, channel, window=channel._window, priority=priority, payload=payload
        )
        try:
            while not channel._accepted:
                channel._credited.clear()
                if channel._closed is not None:
                    raise channel._closing_error()
                await channel._credited.wait()
        except BaseException:
            channel.close()
            raise
        return channel

    @classmethod
    def incoming(
        cls, endpoint: Endpoint, peer: PeerInfo, event: ChannelOpened, *, payload: bytes | None = None
    ) -> Channel:
        """A channel that the peer has opened, not accepted yet. `payload` stands in for the event's."""
        channel = cls(
            endpoint, peer, event.target, event.payload if payload is None else payload, Limits().window_bytes
        )
        channel._id = event.channel
        channel._incoming = True
        endpoint.adopt(event.channel, channel)
        return channel

    def on_accepted(self, event: ChannelAccepted) -> None:
        """See `ChannelUser`."""
        self._accepted = True
        self._greeting = event.payload
        self._credited.set()

    def on_data(self, event: Data) -> None:
        """See `ChannelUser`."""
        if self._inbox.add(event):
            self._arrived.set()

    def on_granted(self, event: Granted) -> None:
        """See `ChannelUser`."""
        self._credited.set()

    def on_closed(self, event: Closed) -> None:
        """See `ChannelUser`."""
        if self._closed is None:
            self._end(event)

    def _end(self, event: Closed) -> None:
        self._closed = event
        for waiting in (self._arrived, self._credited, self._ended):
            waiting.set()
        calls, self._when_closed = self._when_closed, []
        for call in calls:
            call()

    def _accept(self, payload: bytes) -> None:
        self._endpoint.connection.accept(self._id, window=self._window, payload=payload)
        self._accepted = True
        self._endpoint.kick()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closing_error()

    def _closing_error(self) -> ChannelClosed:
        assert self._closed is not None
        return closing_error(self._closed.code, self._closed.reason, accepted=self._accepted)
