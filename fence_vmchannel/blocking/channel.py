# SPDX-License-Identifier: LGPL-2.1-or-later
"""A channel for programs without asyncio."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from fence_vmchannel.assembly import Assembly
from fence_vmchannel.blocking.shell import BlockingShell
from fence_vmchannel.core.events import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Data,
    Granted,
    Limits,
    Priority,
)
from fence_vmchannel.errors import ChannelClosed, CloseCode, MessageTooLarge
from fence_vmchannel.messages import FENCE_SERVICE
from fence_vmchannel.outcomes import closing_error
from fence_vmchannel.peers import PeerInfo, PeerKind

if TYPE_CHECKING:
    from fence_vmchannel.hub.local_protocol import Origin


class BlockingChannel:
    """One channel; whole messages in order. Made by `BlockingClient`."""

    def __init__(self, shell: BlockingShell, peer: PeerInfo, target: str, payload: bytes) -> None:
        self.peer = peer
        self.target = target
        self.payload = payload  # what the opener sent with its request
        self.greeting = b""  # what the service sent when it accepted
        self._shell = shell
        self._id = 0
        self._accepted = False
        self._window = Limits().window_bytes
        self._inbox = Assembly(self._window)
        self._closed: Closed | None = None

    def send(self, message: bytes, *, deadline: float) -> None:
        """Send one message; waits until the reader's window has room for all of it.

        Raises:
            MessageTooLarge: the reader's window could never take it.
            ChannelClosed: the channel has ended.
            DeadlineExceeded: the reader was too slow; nothing has been sent.
        """
        connection = self._shell.connection
        self.check_open()
        if len(message) > connection.max_message(self._id):
            most = connection.max_message(self._id)
            raise MessageTooLarge(f"{len(message)} bytes; the reader takes messages of at most {most}")

        def ready() -> bool:
            return self._closed is not None or connection.credit(self._id) >= max(1, len(message))

        if not ready():
            self._shell.wait(ready, deadline, f"sending to {self.target}")
            self.check_open()
        connection.send(self._id, message)
        self._shell.wait(lambda: True, deadline, "sending")

    def receive(self, *, deadline: float) -> bytes | None:
        """The next message; None when the peer has closed the channel normally.

        Raises:
            ChannelClosed: it ended otherwise; `code` says why.
            DeadlineExceeded: none came in time.
        """
        if not self._inbox:
            self._shell.wait(
                lambda: bool(self._inbox) or self._closed is not None, deadline, f"waiting for {self.target}"
            )
        if not self._inbox:
            if self._closed is not None and self._closed.code is CloseCode.NORMAL:
                return None
            self.check_open()
        message, delivered, limit = self._inbox.take()
        self._shell.connection.grant(self._id, delivered, limit, lazily=True)
        return message

    def request(self, message: bytes, *, deadline: float) -> bytes:
        """Send one message and wait for one. Raises as `send` and `receive`; the outcome is then unknown."""
        self.send(message, deadline=deadline)
        answer = self.receive(deadline=deadline)
        if answer is None:
            raise ChannelClosed(CloseCode.NORMAL, "closed without an answer")
        return answer

    def close(self, code: CloseCode = CloseCode.NORMAL, reason: str = "") -> None:
        """End the channel, after what was sent on it; it goes out with the next call, or the client's
        `close`.
        """
        if self._closed is None:
            self._closed = Closed(self._id, code, reason, aborted=False)
            self._shell.close(self._id, code, reason)

    def __enter__(self) -> BlockingChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- see `ChannelUser` ---

    def on_accepted(self, event: ChannelAccepted) -> None:
        """See `ChannelUser`."""
        self._accepted = True
        self.greeting = event.payload

    def on_data(self, event: Data) -> None:
        """See `ChannelUser`."""
        self._inbox.add(event)

    def on_granted(self, event: Granted) -> None:
        """See `ChannelUser`: `send` asks the connection."""

    def on_closed(self, event: Closed) -> None:
        """See `ChannelUser`."""
        if self._closed is None:
            self._closed = event

    # --- for the client ---

    @classmethod
    def opened(cls, shell: BlockingShell, target: str, *, payload: bytes, deadline: float) -> BlockingChannel:
        """Open a channel and wait until it is accepted; raises as `BlockingClient.open`."""
        channel = cls(shell, shell.peer, target, payload)
        priority = Priority.FENCING if target == FENCE_SERVICE else Priority.NORMAL
        channel._id = shell.open(target, channel, window=channel._window, priority=priority, payload=payload)
        try:
            shell.wait(lambda: channel._accepted or channel.closed, deadline, f"opening {target}")
        except BaseException:
            channel.close()
            raise
        if not channel._accepted:
            channel.check_open()
        return channel

    @classmethod
    def incoming(cls, shell: BlockingShell, event: ChannelOpened, origin: Origin) -> BlockingChannel:
        """Accept a channel that a peer opened.

        Raises:
            ChannelClosed: the peer has closed it meanwhile.
        """
        peer = PeerInfo(origin.peer, PeerKind(origin.kind), origin.port, origin.key)
        channel = cls(shell, peer, event.target, origin.payload)
        channel._id = event.channel
        shell.adopt(event.channel, channel)
        shell.connection.accept(event.channel, window=channel._window)
        channel._accepted = True
        return channel

    @property
    def closed(self) -> bool:
        """Whether the channel has ended. Messages that came before may still wait."""
        return self._closed is not None

    def check_open(self) -> None:
        """Raise ChannelClosed (ServiceRefused if it never opened) when the channel has ended."""
        if self._closed is not None:
            raise closing_error(self._closed.code, self._closed.reason, accepted=self._accepted)
