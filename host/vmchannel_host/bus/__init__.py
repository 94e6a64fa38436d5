# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cluster bus: one agreed order of messages for all hosts.

The bus is not the truth (S11): it orders messages and says which view they belong to; what a message proves
is decided in `vmchannel_host.fencing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from vmchannel_host.model import HostName

M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True)
"""What travels: an in-memory message on the local bus; an engine with a network has a codec injected."""


class BusError(Exception):
    """The message could not be given to the bus. It may be retried; it was not delivered."""


@dataclass(frozen=True, slots=True, order=True)
class Token:
    """A place in the agreed order. Later places are greater."""

    view: int  # rises with each change of membership
    sequence: int  # rises with each message of the view


@dataclass(frozen=True, slots=True)
class Delivered(Generic[M]):
    """A message, in the same place of the order on every host."""

    token: Token
    sender: HostName
    valid: bool  # delivered in a quorate, synced view (S4, S11): only then may an outcome count
    message: M


class Bus(Protocol[M]):
    """What the coordinator needs of a bus."""

    @property
    def host(self) -> HostName:
        """This host."""
        ...

    def hosts(self) -> frozenset[HostName]:
        """Every host that could hold an instance (S3), this one included."""
        ...

    def current(self, token: Token) -> bool:
        """Whether a message of that token may still be acted on: its view is the present one and valid."""
        ...

    def subscribe(self, handler: Callable[[Delivered[M]], None]) -> None:
        """Call `handler` for each delivery from now on, one at a time, in order. It must not block."""
        ...

    def publish(self, message: M) -> None:
        """Hand a message over. Never blocks; it counts when it is delivered back, to this host too.

        Raises:
            BusError: not taken, will not be delivered.
        """
        ...


__all__ = ["Bus", "BusError", "Delivered", "Token"]
