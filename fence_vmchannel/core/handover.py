# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hand-over: take a session out of one object, put it into another."""

from __future__ import annotations

from typing import Final

from fence_vmchannel.core.events import PeerIdentity
from fence_vmchannel.core.greeting import NO_SESSION, VERSIONS
from fence_vmchannel.core.reliability import Inbox, Outbox
from fence_vmchannel.core.saved import SavedFrame, SavedSession
from fence_vmchannel.core.session import FEATURES, Session
from fence_vmchannel.errors import RemoteProtocolError

_MAX_CHECK: Final = 0xFFFF_FFFF


def save(session: Session) -> SavedSession:
    """End the session's link and take the whole session, with its channels. The object is dead afterwards."""
    session.freeze()
    return SavedSession(
        role=session.role.value,
        session_id=session.session_id,
        version=session.version,
        features=session.features,
        peer_boot_id=session.peer.boot_id if session.peer else None,
        peer_software=session.peer.software if session.peer else None,
        tick=session.tick,
        proposed_id=session.proposed_id,
        proposed_version=session.proposed_version,
        acknowledged=session.outbox.acknowledged,
        acknowledged_check=session.outbox.acknowledged_check,
        received=session.inbox.received,
        received_check=session.inbox.check,
        channels=session.channels.save(),
        frames=tuple(SavedFrame(frame.identity, frame.payload) for frame in session.outbox.frames()),
    )


def load(session: Session, saved: SavedSession) -> None:
    """Put what `save` gave into a session that was just constructed.

    Raises:
        RemoteProtocolError: values that no `save` gives, or of the other role.
    """
    ids_fit = len(saved.session_id) == len(saved.proposed_id) == len(NO_SESSION)
    versions_fit = saved.version in VERSIONS and saved.proposed_version in VERSIONS
    if saved.role != session.role.value or not versions_fit or not ids_fit:
        raise RemoteProtocolError("a saved session of another role or version")
    session.session_id, session.proposed_id = saved.session_id, saved.proposed_id
    session.version, session.proposed_version = saved.version, saved.proposed_version
    session.features, session.tick = saved.features & FEATURES, saved.tick
    if saved.peer_boot_id is not None:
        session.peer = PeerIdentity(saved.peer_boot_id, saved.peer_software or "")
    numbers, checks = (
        (saved.acknowledged, saved.received, saved.tick),
        (saved.acknowledged_check, saved.received_check),
    )
    try:
        if min(numbers) < 0 or min(checks) < 0 or max(checks) > _MAX_CHECK:
            raise ValueError("numbers that no frame can carry")
        session.outbox = Outbox(saved.acknowledged, saved.acknowledged_check)
        session.inbox = Inbox(saved.received, saved.received_check)
        for frame in saved.frames:
            session.outbox.load(frame.identity, frame.payload)
        session.channels.load(saved.channels)
    except ValueError as error:
        raise RemoteProtocolError(f"a saved session that does not fit: {error}") from error
