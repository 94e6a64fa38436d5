# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was refused, counted by a few fixed kinds: for metrics, never for a decision.

Counted where the refusal happens and nowhere else, so that a good frame costs nothing.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum


class Refusal(Enum):
    """A kind of input that was refused. The values are labels of metrics: they do not change."""

    GARBAGE = "garbage"  # bytes that are no frame, after the greeting; or so many that the link ended
    MISFIT = "misfit"  # numbers or acknowledgements that do not fit: the greeting began anew
    PROTOCOL = "protocol"  # a rule of the protocol was broken: the link ended
    VERSION = "version"  # no common version: the link ended
    UNKNOWN_FRAME = "unknown-frame"  # a frame that may not be ignored: the link ended
    CHANNEL = "channel"  # a rule of one channel was broken (credit, size): the channel ended
    CHANNEL_LIMIT = "channel-limit"  # one channel, or window, too many
    SERVICE = "service"  # a service that is not offered, or not to this peer
    CLIENT_LIMIT = "client-limit"  # one local application too many


Tally = Counter[Refusal]
"""How often, by kind. A hub shares one among all its connections."""
