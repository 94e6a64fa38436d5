# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which error a caller gets when a channel has ended: by what he can do about it."""

from __future__ import annotations

from fence_vmchannel.errors import (
    ChannelClosed,
    ChannelError,
    CloseCode,
    PeerMoved,
    ServiceRefused,
    SessionReset,
)


def closing_error(code: CloseCode, reason: str, *, accepted: bool) -> ChannelClosed:
    """The error of a channel that has ended."""
    return ChannelClosed(code, reason) if accepted else ServiceRefused(code, reason)


def request_error(error: ChannelClosed) -> ChannelError:
    """The error of a request whose channel ended before its answer came."""
    match error.code:
        case CloseCode.SESSION_RESET:
            return SessionReset(f"whether the request was acted on is unknown: {error.reason}")
        case CloseCode.MOVED:
            return PeerMoved(f"whether the request was acted on is unknown: {error.reason}")
        case _:
            return error
