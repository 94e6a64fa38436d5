# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ways from a program in the guest to the host's fence service: the guest's hub, else the port itself.

Blocking, without asyncio: a fence agent pays for every import.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from fence_vmchannel.addresses import DEFAULT_PORT
from fence_vmchannel.blocking.channel import BlockingChannel
from fence_vmchannel.blocking.client import BlockingClient
from fence_vmchannel.discovery import SYSTEM_PATHS, PortPaths
from fence_vmchannel.errors import (
    ChannelError,
    CloseCode,
    DeadlineExceeded,
    HubUnreachable,
    LinkError,
    PortBusy,
    PortNotFound,
    ServiceRefused,
)
from fence_vmchannel.links.local import GUEST_SOCKET, sessions_path
from fence_vmchannel.messages import FENCE_SERVICE, Announce, encode_message

_HUB_GREETING_S: Final = 5.0
"""A hub greets in milliseconds; one that takes longer is stuck, and the port may do better."""

_RESTART_S: Final = 5.0
"""So long after a hub has stopped in order the next one is waited for: whoever opens the port himself
meanwhile begins another session with the host, and the hub's programs lose theirs."""

_STATUS_RESERVE_S: Final = 0.5
"""Kept back from waiting for the host, to ask the hub why it did not come."""

_FIRST_SLICE_S: Final = 2.0
_LAST_SLICE_S: Final = 16.0
"""How long one attempt holds the port. Between attempts a hub that starts can take it."""


class HubLine:
    """An open channel to the fence service, with the client that carries it."""

    def __init__(self, client: BlockingClient, channel: BlockingChannel) -> None:
        self._client = client
        self._channel = channel

    @property
    def greeting(self) -> bytes:
        """What the service sent when it accepted."""
        return self._channel.greeting

    def send(self, message: bytes, *, deadline: float) -> None:
        """See `FenceLine`."""
        self._channel.send(message, deadline=deadline)

    def receive(self, *, deadline: float) -> bytes | None:
        """See `FenceLine`."""
        return self._channel.receive(deadline=deadline)

    def close(self) -> None:
        """See `FenceLine`."""
        self._channel.close()
        self._client.close()


class GuestReach:
    """Opens the fence service through the hub on a unix socket or, if nobody serves it, over the port."""

    def __init__(
        self,
        *,
        socket: str = GUEST_SOCKET,
        port: str = DEFAULT_PORT,
        announce: Callable[[], Announce | None] | None = None,
        paths: PortPaths = SYSTEM_PATHS,
        boot_id: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Keep what is needed to connect; nothing is opened.

        Args:
            socket: of the guest's hub.
            port: name of the port that leads to the host.
            announce: finds the announcement of the node's name, for when no hub does it.
            paths: where the system shows its ports.
            boot_id: of this kernel; None reads it.
            clock: `time.monotonic`, which the deadlines are of.
            wall_clock: `time.time`, which the times of files are of.
        """
        self._socket = socket
        self._port = port
        self._announce = announce
        self._paths = paths
        self._boot_id = boot_id
        self._clock = clock
        self._wall_clock = wall_clock
        self._slice_s = _FIRST_SLICE_S

    def __call__(self, *, deadline: float) -> HubLine:
        """Connect once, by the first way that exists; see `Reach`. While the hub restarts there is none."""
        try:
            return self._by_hub(deadline)
        except HubUnreachable as error:
            if self._hub_restarts():
                raise
            return self._by_port(error, deadline)
        except ServiceRefused as error:
            if error.code is not CloseCode.PEER_GONE:
                raise
            return self._by_port(error, deadline)  # a port that the hub does not serve, or not yet

    def _by_hub(self, deadline: float) -> HubLine:
        # A hub that goes away is not waited for: the request is asked again, with its id.
        client = BlockingClient.connect(
            self._socket, deadline=min(deadline, self._clock() + _HUB_GREETING_S), resume_s=0
        )
        service = FENCE_SERVICE if self._port == DEFAULT_PORT else f"{self._port}:{FENCE_SERVICE}"
        try:
            reserve = min(_STATUS_RESERVE_S, (deadline - self._clock()) / 4)
            return HubLine(client, client.open(service, deadline=deadline - reserve))
        except DeadlineExceeded as error:
            why = _why_no_host(client, self._port, deadline)
            client.close()
            raise DeadlineExceeded(why) from error
        except BaseException:
            client.close()
            raise

    def _hub_restarts(self) -> bool:
        """Whether a hub has just left its sessions to the next one."""
        try:
            left_at = os.stat(sessions_path(self._socket)).st_mtime
        except OSError:
            return False
        return 0 <= self._wall_clock() - left_at < _RESTART_S

    def _by_port(self, no_hub: ChannelError, deadline: float) -> HubLine:
        end = min(deadline, self._clock() + self._slice_s)
        self._slice_s = min(_LAST_SLICE_S, 2 * self._slice_s)
        try:
            client = BlockingClient.open_port(
                self._port, deadline=end, boot_id=self._boot_id, paths=self._paths
            )
        except (PortNotFound, PortBusy) as error:
            raise type(error)(f"{error}; {no_hub}") from error
        except DeadlineExceeded as error:
            raise DeadlineExceeded(
                f"port {self._port} is open, but no host daemon greets on it (is vmchanneld running?)"
            ) from error
        except LinkError as error:
            raise LinkError(f"{error}; {no_hub}") from error
        try:
            line = HubLine(client, client.open(FENCE_SERVICE, deadline=deadline))
            announcement = self._announce() if self._announce is not None else None
            if announcement is not None:
                line.send(encode_message(announcement), deadline=deadline)
        except BaseException:
            client.close()
            raise
        return line


def _why_no_host(client: BlockingClient, port: str, deadline: float) -> str:
    """What the hub knows of a host that has not accepted the channel."""
    try:
        status = client.status(deadline=deadline)
    except ChannelError:
        return f"the hub runs, but the host does not answer on port {port}"
    for peer in status.peers:
        if peer.port == port and not peer.connected:
            detail = f": {peer.detail}" if peer.detail else ""
            return f"the hub has no session with the host on port {port}{detail} (is vmchanneld running?)"
    return f"the host is connected on port {port}, but its fence service does not accept"
