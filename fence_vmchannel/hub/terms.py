# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one peer may have of a hub: the limits of its connection, and what is kept for it while it is away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fence_vmchannel.core.channel_state import MIN_WINDOW
from fence_vmchannel.core.events import Limits
from fence_vmchannel.messages import FENCE_SERVICE

BYTE_LIMIT: Final = 1_048_576
"""What may wait of one channel in one direction where nobody says otherwise, cost units."""

SESSION_WINDOWS: Final = 32
"""So many times a channel's limit all channels of a session may hold together, in each direction."""

_DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class ServiceTerms:
    """What holds for the channels of one service; it only narrows what its port allows."""

    byte_limit: int
    keep: bool = True


@dataclass(frozen=True, slots=True)
class PeerTerms:
    """What holds for one peer."""

    limits: Limits = _DEFAULT_LIMITS
    keep: bool = True  # `cache_buffers`; False: what waits for the peer while it is away is dropped
    not_kept: frozenset[str] = frozenset()  # services for which that holds although `keep` is True

    def keeps(self, service: str) -> bool:
        """Whether data of that service waits for a peer that is away. Fencing's always does."""
        return service == FENCE_SERVICE or (self.keep and service not in self.not_kept)


NO_SERVICES: Final[Mapping[str, ServiceTerms]] = MappingProxyType({})


def peer_terms(
    byte_limit: int = BYTE_LIMIT,
    *,
    channels: int = _DEFAULT_LIMITS.channels,
    keep: bool = True,
    services: Mapping[str, ServiceTerms] = NO_SERVICES,
) -> PeerTerms:
    """The terms of one port.

    Args:
        byte_limit: what may wait of one channel in one direction, cost units; at least one fragment passes.
        channels: open at once.
        keep: what waits for the peer while it is away is kept, up to the limit.
        services: what narrows this for single services.
    """
    most = max(byte_limit, MIN_WINDOW)
    limits = Limits(
        channels=channels,
        max_window_bytes=most,
        session_bytes=SESSION_WINDOWS * most,
        target_bytes={name: terms.byte_limit for name, terms in services.items()},
    )
    return PeerTerms(limits, keep, frozenset(name for name, terms in services.items() if not terms.keep))
