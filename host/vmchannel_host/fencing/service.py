# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fence service: what answers a `FenceRequest`, from a VM's channel or from the operator.

It decides whether a request may become an intent: who asks (S9), once (S5), in time (S6), by which rule of the
policy. Then the coordinator acts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fence_vmchannel.messages import (
    Announce,
    AnnounceAnswer,
    FenceAction,
    FenceAnswer,
    FenceGreeting,
    FenceProgress,
    FenceRequest,
)
from vmchannel_host.model import ProcessIdentity, VmUuid

ProgressSink = Callable[[FenceProgress], None]
"""Takes progress for the asker. Must not block or raise; what it cannot take it drops."""


@dataclass(frozen=True, slots=True)
class Requester:
    """One incarnation of who asks: a stored answer goes to no other (S5).

    The VM's fields come from the socket it speaks through and from its session's greeting, never from a request.
    """

    vm: VmUuid | None  # None: the operator
    name: str  # VM's name, or the operator's user name; untrusted text
    process: ProcessIdentity | None = None
    guest_boot_id: str = ""
    resets: int = 0  # resets and restores of the guest seen while this process ran

    @property
    def key(self) -> str:
        """The incarnation as stored with its requests."""
        raise NotImplementedError


class FenceService:
    """Answers fence requests. One object per daemon; safe for any number of concurrent calls."""

    def greeting(self, requester: Requester) -> FenceGreeting:
        """What the channel's ACCEPT carries."""
        raise NotImplementedError

    async def answer(
        self, request: FenceRequest, requester: Requester, progress: ProgressSink | None = None
    ) -> FenceAnswer:
        """Answer a request, within its deadline whatever happens. Never raises for failure.

        Cancelling means that nobody waits any more; what is an intent goes on (S5), and its answer is stored.
        """
        raise NotImplementedError

    def operator_request(
        self, request_id: bytes, action: FenceAction, plug: str, timeout_s: float
    ) -> FenceRequest:
        """A request as the operator's tool makes it, `timeout_s` seconds from now."""
        raise NotImplementedError

    def cancel(self, request_id: bytes, requester: Requester) -> bool:
        """The client stops waiting. True: dropped before it became an intent; False: it goes on, or is unknown."""
        raise NotImplementedError

    async def announce(self, announce: Announce, requester: Requester) -> AnnounceAnswer:
        """Record a guest's cluster node name under its VM's UUID."""
        raise NotImplementedError

    def requester_interrupted(self, vm: VmUuid) -> None:
        """That VM was paused, reset or restored: its requests that are not yet intents end (S6)."""
        raise NotImplementedError
