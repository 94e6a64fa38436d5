# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two applications joined by two hubs, without sockets and in virtual time: real shells, real relays.

guest application - guest's hub - port - host's hub - host application, and beside the first a fence agent
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fence_vmchannel.assembly import Assembly
from fence_vmchannel.core.channel_state import message_cost
from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Data,
    Granted,
    Limits,
    PeerIdentity,
    Priority,
    Role,
)
from fence_vmchannel.core.frames import Frame, FrameDecoder, FrameType, frames_only
from fence_vmchannel.errors import LinkError
from fence_vmchannel.hub.relay import relay
from fence_vmchannel.peers import PeerInfo, PeerKind
from fence_vmchannel.shell import Shell
from tests.fakes.conversation import seeded_bytes

SOCKET_BYTES = 65_536
"""What a link holds on its way, as a socket does."""


class Pipe:
    """One direction of a link."""

    def __init__(self) -> None:
        self.data = bytearray()  # on its way
        self.written = bytearray()  # all that ever was
        self.ended = False
        self.held = False  # the receiver reads nothing now


class MemoryLink:
    """One end of a link in memory: a `Link` whose readiness nobody has to wait for."""

    def __init__(self, incoming: Pipe, outgoing: Pipe) -> None:
        self.incoming, self.outgoing = incoming, outgoing

    @property
    def name(self) -> str:
        return "memory"

    @property
    def present(self) -> bool:
        return True

    def fileno(self) -> int:
        return -1

    def refresh(self) -> None:
        pass

    def receive(self) -> bytes:
        if self.incoming.held:
            return b""
        data = bytes(self.incoming.data)
        self.incoming.data.clear()
        if not data and self.incoming.ended:
            raise LinkError("cut")
        return data

    def send(self, data: memoryview) -> int:
        taken = max(0, min(len(data), SOCKET_BYTES - len(self.outgoing.data)))
        self.outgoing.data += data[:taken]
        self.outgoing.written += data[:taken]
        return taken

    def close(self) -> None:
        self.incoming.ended = self.outgoing.ended = True


class HubShell(Shell):
    """One connection of a hub; what its peer opens goes on to `target`."""

    target: Shell | None = None

    def channel_opened(self, event: ChannelOpened) -> None:
        """See `Shell`."""
        assert self.target is not None
        priority = Priority.FENCING if event.target == "fence" else Priority.NORMAL
        relay(self, event, self.target, event.target, payload=event.payload, priority=priority)


@dataclass(eq=False)
class Talk:
    """One end of a channel: writes numbered messages, reads and checks those of the other end."""

    shell: Shell
    window: int
    channel: int = 0
    accepted: bool = False
    closed: Closed | None = None
    stalled: bool = False
    sent: int = 0  # messages
    sent_cost: int = 0
    read: int = 0  # messages
    read_cost: int = 0
    inbox: Assembly = field(init=False)

    def __post_init__(self) -> None:
        self.inbox = Assembly(self.window)

    def write(self, size: int) -> bool:
        """Write a message of at least eight bytes, if there is credit for it."""
        data = self.sent.to_bytes(8, "big").ljust(size, b".")
        if not self.accepted or self.shell.connection.credit(self.channel) < len(data):
            return False
        self.shell.connection.send(self.channel, data)
        self.sent += 1
        self.sent_cost += message_cost(len(data))
        return True

    def take(self) -> None:
        """Read what has come, unless stalled."""
        while self.inbox and not self.stalled:
            message, delivered, limit = self.inbox.take()
            assert int.from_bytes(message[:8], "big") == self.read, "lost, doubled or out of order"
            self.read += 1
            self.read_cost = delivered
            self.shell.connection.grant(self.channel, delivered, limit)

    def on_accepted(self, event: ChannelAccepted) -> None:
        """See `ChannelUser`."""
        self.accepted = True

    def on_data(self, event: Data) -> None:
        """See `ChannelUser`."""
        self.inbox.add(event)
        self.take()

    def on_granted(self, event: Granted) -> None:
        """See `ChannelUser`."""

    def on_closed(self, event: Closed) -> None:
        """See `ChannelUser`."""
        self.closed = event


class Application(Shell):
    """Accepts whatever is opened, with windows as the opener has."""

    def __init__(self, name: str, connection: Connection, clock: Callable[[], float]) -> None:
        super().__init__(PeerInfo(name, PeerKind.LOCAL), connection, clock)
        self.accepted: deque[Talk] = deque()
        self.window = 0

    def channel_opened(self, event: ChannelOpened) -> None:
        """See `Shell`."""
        talk = Talk(self, self.window, event.channel, accepted=True)
        self.adopt(event.channel, talk)
        self.connection.accept(event.channel, window=talk.window)
        self.accepted.append(talk)


class Line:
    """The whole line."""

    def __init__(self, limits: Limits, local_limits: Limits) -> None:
        self.now = 1_000.0
        self._seed = 0
        self.guest_app = Application("guest app", self._connection(Role.GUEST, Limits()), self._clock)
        self.agent = Application("agent", self._connection(Role.GUEST, Limits()), self._clock)
        self.guest_local = self._hub_shell(Role.HOST, local_limits)
        self.agent_local = self._hub_shell(Role.HOST, local_limits)
        self.guest_peer = self._hub_shell(Role.GUEST, limits)
        self.host_peer = self._hub_shell(Role.HOST, limits)
        self.host_local = self._hub_shell(Role.HOST, local_limits)
        self.host_app = Application("host app", self._connection(Role.GUEST, Limits()), self._clock)
        self.guest_local.target, self.guest_peer.target = self.guest_peer, self.guest_local
        self.agent_local.target = self.guest_peer
        self.host_local.target, self.host_peer.target = self.host_peer, self.host_local
        self.to_host = self.to_guest = Pipe()
        self._join(self.guest_app, self.guest_local)
        self._join(self.agent, self.agent_local)
        self._join(self.host_app, self.host_local)
        self.plug()
        self.settle()

    @property
    def hubs(self) -> tuple[tuple[HubShell, HubShell], tuple[HubShell, HubShell]]:
        """The connections of each hub."""
        return (self.guest_local, self.guest_peer), (self.host_peer, self.host_local)

    def plug(self) -> None:
        """Join the two hubs by a new link."""
        self.to_guest, self.to_host = self._join(self.guest_peer, self.host_peer)

    def cut(self) -> None:
        """What is on its way on the port is gone, and both hubs notice."""
        self.to_host.data.clear()
        self.to_guest.data.clear()
        for shell in (self.guest_peer, self.host_peer):
            shell.finish("cut")

    def open(
        self, opener: Application, acceptor: Application, service: str, window: int
    ) -> tuple[Talk, Talk]:
        """A channel with such a window at both ends; the opener's end first."""
        priority = Priority.FENCING if service == "fence" else Priority.NORMAL
        acceptor.window = window
        talk = Talk(opener, window)
        talk.channel = opener.open(service, talk, window=window, priority=priority, payload=b"")
        self.settle()
        assert talk.accepted, talk.closed
        return talk, acceptor.accepted.pop()

    def turns(self) -> int:
        """Each shell takes a turn; how many bytes moved."""
        shells = (self.guest_app, self.agent, self.agent_local, *self.hubs[0], *self.hubs[1], self.host_app)
        before = sum(shell.sent_bytes + shell.received_bytes for shell in shells)
        for shell in shells:
            if shell.linked:
                shell.turn()
        return sum(shell.sent_bytes + shell.received_bytes for shell in shells) - before

    def settle(self) -> None:
        """Until nothing moves any more, for some time."""
        for _ in range(4):  # acknowledgements are late on purpose
            for _ in range(10_000):
                if not self.turns():
                    break
            else:
                raise AssertionError("it never comes to rest")
            self.now += 0.03

    def _hub_shell(self, role: Role, limits: Limits) -> HubShell:
        return HubShell(PeerInfo("peer", PeerKind.LOCAL), self._connection(role, limits), self._clock)

    def _connection(self, role: Role, limits: Limits) -> Connection:
        self._seed += 1
        identity = PeerIdentity(f"boot-{self._seed}", "test")
        return Connection(role, identity, random_bytes=seeded_bytes(self._seed), limits=limits)

    def _clock(self) -> float:
        return self.now

    def _join(self, one: Shell, other: Shell) -> tuple[Pipe, Pipe]:
        to_one, to_other = Pipe(), Pipe()
        one.begin(MemoryLink(to_one, to_other))
        other.begin(MemoryLink(to_other, to_one))
        return to_one, to_other


def data_frames(written: bytes) -> list[Frame]:
    """The frames with messages among the bytes that were written to a link."""
    frames = frames_only(FrameDecoder().feed(written))
    return [frame for frame in frames if frame.type == FrameType.DATA]
