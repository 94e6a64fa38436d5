# SPDX-License-Identifier: LGPL-2.1-or-later
"""What many share without one of them taking all of it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Final

from fence_vmchannel.peers import PeerInfo, PeerKind

ROOT_RESERVE: Final = 8
"""Of the places for clients, how many only root gets: other users cannot keep the fence agent out."""


def may_take(more: int, *, held: int, free: int) -> bool:
    """Whether one of many, who holds `held` already, may take `more` of what is free.

    Nobody comes to hold more than he leaves: the first gets at most a half, the next a quarter, and so on.
    But who holds nothing yet is refused only when there is not so much left.
    """
    return held + more <= free - more or (not held and more <= free)


def owner(peer: PeerInfo) -> Hashable | None:
    """Who is meant by "one of many": a VM with all its ports, or a user with all his programs.

    None: nobody limits him. That is root on the hub's own machine, and the host of a guest.
    """
    if peer.kind is PeerKind.LOCAL:
        who = peer.credentials
        return None if who is not None and who.uid == 0 else ("uid", who.uid if who is not None else -1)
    return ("vm", peer.key or peer.name) if peer.kind is PeerKind.VM else None


class ClientPlaces:
    """The places for local applications, by user."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._reserve = min(ROOT_RESERVE, places // 2)
        self._taken: Counter[int] = Counter()

    def enter(self, uid: int) -> bool:
        """Take a place for a program of this user; False: there is none for him."""
        free = self._places - self._taken.total()
        mine = free > 0 if uid == 0 else may_take(1, held=self._taken[uid], free=free - self._reserve)
        if mine:
            self._taken[uid] += 1
        return mine

    def leave(self, uid: int) -> None:
        """Give a place back."""
        self._taken[uid] -= 1
        if not self._taken[uid]:
            del self._taken[uid]
