# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets a session that an earlier process has left: the same user, the same process behind the peer."""

from __future__ import annotations

from fence_vmchannel.access import Credentials
from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import ChannelOpened, Closed, Opened, PeerIdentity, Reset, Role
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.errors import CloseCode
from fence_vmchannel.hub.waiting import Resumable, Waiting
from fence_vmchannel.peers import PeerInfo, PeerKind
from tests.fakes.conversation import Conversation, seeded_bytes

VM = PeerInfo("vm1", PeerKind.VM, "org.vmchannel.0", "6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
ALICE = Credentials(pid=100, uid=1000, gid=1000)


class Nobody:
    """An observer that hears nothing."""

    def on_connected(self, endpoint: Endpoint, event: Opened) -> None: ...

    def on_disconnected(self, endpoint: Endpoint, reason: str) -> None: ...

    def on_reset(self, endpoint: Endpoint, event: Reset) -> None: ...

    def on_channel(self, endpoint: Endpoint, event: ChannelOpened) -> None: ...


class User:
    """Who uses a channel, and how it ended."""

    def __init__(self) -> None:
        self.end: Closed | None = None

    def on_accepted(self, event: object) -> None: ...

    def on_data(self, event: object) -> None: ...

    def on_granted(self, event: object) -> None: ...

    def on_closed(self, event: Closed) -> None:
        self.end = event


def waiting_for(peer: PeerInfo, owner: str = "") -> tuple[Waiting, Endpoint, User]:
    """One endpoint that waits, with a session and a channel in use."""
    talk = Conversation()
    talk.connect()
    number = talk.host.open("work").number
    talk.run(1)
    talk.cut()
    connection = Connection.import_state(
        talk.host.connection.export_state(),
        Role.HOST,
        PeerIdentity("host-boot"),
        random_bytes=seeded_bytes(1),
    )
    endpoint, user = Endpoint(peer, connection, Nobody(), clock=lambda: 0.0), User()
    endpoint.adopt(number, user)
    waiting = Waiting()
    waiting.add(Resumable(endpoint, owner))
    return waiting, endpoint, user


async def test_an_application_of_the_same_user_gets_its_session_and_once() -> None:
    waiting, endpoint, _ = waiting_for(PeerInfo("local:100", PeerKind.LOCAL, credentials=ALICE))
    session = endpoint.connection.session_id
    again = Credentials(pid=200, uid=1000, gid=1001)
    assert waiting.claim_application(session, again) is endpoint
    assert endpoint.peer.credentials == again  # what it may do is asked anew
    assert waiting.claim_application(session, again) is None


async def test_another_user_gets_nothing_even_if_he_knows_the_session() -> None:
    waiting, endpoint, _ = waiting_for(PeerInfo("local:100", PeerKind.LOCAL, credentials=ALICE))
    session = endpoint.connection.session_id
    for uid in (0, 1001):
        assert not waiting.has_application(session, Credentials(pid=100, uid=uid, gid=1000))
        assert waiting.claim_application(session, Credentials(pid=100, uid=uid, gid=1000)) is None
    assert not waiting.has_application(bytes(16), ALICE)
    assert waiting.claim_application(session, ALICE) is endpoint


async def test_a_peer_of_the_same_owner_gets_its_session() -> None:
    waiting, endpoint, user = waiting_for(VM, "pid 1")
    assert waiting.claim_peer(VM, "pid 1") is endpoint
    assert waiting.all() == ()
    assert user.end is None


async def test_the_session_of_another_process_ends_and_its_users_are_told() -> None:
    waiting, _, user = waiting_for(VM, "pid 1")
    assert waiting.claim_peer(VM, "pid 2") is None
    assert user.end is not None
    assert user.end.code is CloseCode.SESSION_RESET
    assert waiting.claim_peer(VM, "pid 1") is None


async def test_what_nobody_claims_ends_and_its_users_are_told() -> None:
    waiting, _, user = waiting_for(VM)
    waiting.end()
    assert user.end is not None
    assert user.end.code is CloseCode.PEER_GONE
    assert waiting.all() == ()
