# SPDX-License-Identifier: LGPL-2.1-or-later
"""The API without asyncio, whose import alone costs a fence agent 50 ms.

A `BlockingClient` talks to this machine's hub, or, where no hub runs, straight to the host over a port. Every
call that can wait takes a deadline, in seconds of `time.monotonic()`, and raises `DeadlineExceeded` when it
has passed. Nothing happens between calls: a program that does not call for 45 s is taken for gone and greeted
anew.
"""

from __future__ import annotations

import os
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Final

from fence_vmchannel.addresses import DEFAULT_PORT, HUB_SERVICE
from fence_vmchannel.blocking.channel import BlockingChannel
from fence_vmchannel.blocking.shell import BlockingShell
from fence_vmchannel.core.events import (
    PeerIdentity,
)
from fence_vmchannel.discovery import SYSTEM_PATHS, PortPaths, open_port
from fence_vmchannel.errors import (
    ChannelClosed,
    ChannelError,
    CloseCode,
    DeadlineExceeded,
    HubUnreachable,
    LinkError,
    PortBusy,
)
from fence_vmchannel.links.local import GUEST_SOCKET
from fence_vmchannel.links.stream import SocketLink, try_connect
from fence_vmchannel.outcomes import request_error
from fence_vmchannel.peers import HOST_PEER, PeerInfo, PeerKind

if TYPE_CHECKING:
    from fence_vmchannel.hub.events import HubEvent, HubStatus
    from fence_vmchannel.hub.local_protocol import HubQuery

# What concerns the hub itself is imported where it is used: a fence agent never uses it, and making its many
# dataclasses takes as long as half of the other imports.

RESUME_S: Final = 10.0
"""How long a hub may be away, being restarted for instance, before it counts as gone."""

_RETRY_S: Final = 0.05
_DRAIN_S: Final = 1.0


class BlockingClient:
    """A connection to a hub or to the host. Not for use by several threads at once."""

    @classmethod
    def connect(
        cls, path: str = GUEST_SOCKET, *, deadline: float, resume_s: float = RESUME_S
    ) -> BlockingClient:
        """Connect to the hub on the unix socket `path` and wait for its greeting.

        A hub that goes away is waited for up to `resume_s` seconds, within the deadlines of the calls: one
        that was stopped in order goes on where it was, if a call is made within half a minute of its restart;
        from one that was killed each channel hears SESSION_RESET.

        Raises:
            HubUnreachable: nobody serves the socket, it may not be opened, or the hub does not answer in
            time.
        """
        while True:
            try:
                sock = try_connect(path)
            except OSError as error:
                raise HubUnreachable(f"no hub answers on {path}: {error.strerror}") from error
            if sock is not None:
                break
            if not _sleep(_RETRY_S, deadline):
                raise HubUnreachable(f"the hub on {path} has a full queue and takes no client")
        hub = PeerInfo("hub", PeerKind.LOCAL)
        shell = BlockingShell(
            SocketLink(sock, path),
            f"the hub on {path}",
            hub,
            _process_identity(),
            again=lambda: _link_again(path),
            resume_s=resume_s,
        )
        try:
            shell.wait(lambda: shell.connection.opened, deadline, "greeting")
        except DeadlineExceeded as error:
            shell.stop("no greeting")
            raise HubUnreachable(f"the hub on {path} does not answer in time") from error
        except LinkError as error:
            raise HubUnreachable(f"the hub on {path} hung up; it may have too many clients") from error
        return cls(shell)

    @classmethod
    def open_port(
        cls,
        name: str = DEFAULT_PORT,
        *,
        deadline: float,
        boot_id: str | None = None,
        paths: PortPaths = SYSTEM_PATHS,
    ) -> BlockingClient:
        """Open the port `name` of this guest and wait for the host's greeting. No hub may hold it.

        Args:
            name: the port's name.
            deadline: while the port is busy it is tried again until then.
            boot_id: of this kernel; None reads it.
            paths: where the system shows its ports.

        Raises:
            PortNotFound: there is no such port; the text names those that exist.
            PortBusy: another program holds it; the text names process and command.
            DeadlineExceeded: no host is connected to the port, or it does not answer.
            LinkError: the port cannot be opened, for want of permission for instance, or was unplugged.
        """
        while True:
            try:
                link = open_port(name, paths)
                break
            except PortBusy:
                if not _sleep(_RETRY_S, deadline):
                    raise
        identity = PeerIdentity(boot_id or _kernel_boot_id(paths.proc), "fence_vmchannel")
        host = PeerInfo(HOST_PEER, PeerKind.HOST, name)
        shell = BlockingShell(link, f"the host on port {name}", host, identity)
        try:
            shell.wait(lambda: shell.connection.opened, deadline, "greeting")
        except ChannelError as error:
            shell.stop(str(error))
            raise
        return cls(shell)

    def __init__(self, shell: BlockingShell) -> None:
        """For `connect` and `open_port`."""
        self._shell = shell

    # --- channels ---

    def open(self, service: str, *, payload: bytes = b"", deadline: float) -> BlockingChannel:
        """Open a channel to a service; see `Client.open`.

        Raises:
            ServiceRefused: unknown, not permitted, the peer is not there, or a limit is reached; `code`
            tells. HubUnreachable, LinkError: the connection has ended. DeadlineExceeded: no answer in time.
        """
        return BlockingChannel.opened(self._shell, service, payload=payload, deadline=deadline)

    def request(self, service: str, payload: bytes, *, deadline: float) -> bytes:
        """Send one message to a service and return its answer, over a channel of its own.

        Raises:
            DeadlineExceeded, SessionReset, PeerMoved: the outcome is unknown.
            ServiceRefused, ChannelClosed, HubUnreachable, LinkError: as for `open`.
        """
        with self.open(service, deadline=deadline) as channel:
            try:
                return channel.request(payload, deadline=deadline)
            except ChannelClosed as error:
                raise request_error(error) from error

    def offer(self, service: str, *, deadline: float) -> BlockingOffer:
        """Offer a service to the peers of the hub, until the offer is closed; see `Client.offer`.

        Raises:
            ServiceRefused: another application offers it, or this user may not.
        """
        from fence_vmchannel.hub.local_protocol import OfferQuery

        return BlockingOffer(self._shell, self._ask(OfferQuery(service), deadline), service)

    # --- the hub ---

    def watch(self, *, deadline: float) -> BlockingWatch:
        """Watch the hub; see `Client.watch`."""
        from fence_vmchannel.hub.local_protocol import WatchQuery

        return BlockingWatch(self._ask(WatchQuery(), deadline))

    def status(self, *, deadline: float) -> HubStatus:
        """The hub's peers and services now."""
        from fence_vmchannel.hub.local_protocol import StatusQuery, gather_status

        items: list[bytes] = []
        with self._ask(StatusQuery(), deadline) as channel:
            while (data := channel.receive(deadline=deadline)) is not None:
                items.append(data)
            return gather_status(channel.greeting, items)

    @property
    def tick(self) -> int:
        """The host's clock as last heard, in its milliseconds; 0 before the greeting."""
        return self._shell.connection.tick

    def close(self) -> None:
        """Send what is queued (for at most one second), then disconnect. May be called twice."""
        if not self._shell.gone:
            self._shell.drain(_DRAIN_S)
        self._shell.stop("disconnected")

    def __enter__(self) -> BlockingClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ---

    def _ask(self, query: HubQuery, deadline: float) -> BlockingChannel:
        from fence_vmchannel.hub.local_protocol import encode_local

        return self.open(HUB_SERVICE, payload=encode_local(query), deadline=deadline)


class BlockingOffer:
    """An offered service: `next` gives each channel that a peer opens to it."""

    def __init__(self, shell: BlockingShell, channel: BlockingChannel, service: str) -> None:
        self._shell = shell
        self._channel = channel
        self._service = service
        self._unclaimed = shell.offers.setdefault(service, deque())

    def next(self, *, deadline: float) -> BlockingChannel:
        """The next channel, accepted. Its `peer` is the one of the hub that opened it.

        Raises:
            ChannelClosed: the hub ended the offer.
            DeadlineExceeded: nobody opened one in time.
        """
        while True:
            self._shell.wait(
                lambda: bool(self._unclaimed) or self._channel.closed,
                deadline,
                f"waiting for a channel to {self._service}",
            )
            if not self._unclaimed:
                self._channel.check_open()
            event, origin = self._unclaimed.popleft()
            try:
                return BlockingChannel.incoming(self._shell, event, origin)
            except ChannelClosed:
                continue  # its opener has left

    def close(self) -> None:
        """Offer it no more."""
        self._shell.offers.pop(self._service, None)
        self._channel.close()

    def __enter__(self) -> BlockingOffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class BlockingWatch:
    """What happens in the hub, one event a call."""

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel

    def next(self, *, deadline: float) -> HubEvent:
        """The next event.

        Raises:
            ChannelClosed: the hub stops.
            DeadlineExceeded: nothing happened in time.
        """
        from fence_vmchannel.hub.events import HubEvent
        from fence_vmchannel.hub.local_protocol import decode_local

        while True:
            data = self._channel.receive(deadline=deadline)
            if data is None:
                raise ChannelClosed(CloseCode.NORMAL, "the hub ended the watch")
            message = decode_local(data)
            if isinstance(message, HubEvent):
                return message

    def close(self) -> None:
        """Watch no more."""
        self._channel.close()

    def __enter__(self) -> BlockingWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _link_again(path: str) -> SocketLink | None:
    try:
        sock = try_connect(path)
    except OSError:
        return None
    return None if sock is None else SocketLink(sock, path)


def _process_identity() -> PeerIdentity:
    """An application's session ends with its process, so that is its "boot"."""
    return PeerIdentity(f"{os.getpid()}-{os.urandom(8).hex()}", "fence_vmchannel")


def _kernel_boot_id(proc: str) -> str:
    try:
        with open(f"{proc}/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError as error:
        raise LinkError(f"this kernel's boot id cannot be read: {error.strerror}") from error


def _sleep(pause_s: float, deadline: float) -> bool:
    """Sleep a little; False when the deadline has passed instead."""
    left = deadline - time.monotonic()
    if left <= 0:
        return False
    time.sleep(min(pause_s, left))
    return True
