# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree of errors: one base, and below it one class for each thing that a caller can do about it.

::

    ChannelError
    ├── LocalProtocolError      the caller misused the API: a bug on this side, mend the call
    │   ├── MessageTooLarge     cut the message, or ask the reader for a larger window
    │   └── CreditExceeded      wait for credit before sending
    ├── RemoteProtocolError     the peer broke the protocol: its link or session is dead
    ├── LinkError               no byte connection to the peer
    │   ├── PortNotFound        no port of that name: add it to the VM, or wait for it
    │   ├── PortBusy            another program holds the port: stop it, or use its hub
    │   └── HubUnreachable      nothing serves the hub's socket: start the hub
    ├── ChannelClosed           the channel ended; `code` and `reason` say why
    │   └── ServiceRefused      it never opened: unknown service, no permission, limit
    ├── SessionReset            the session ended; what was not delivered may be lost
    ├── PeerMoved               the peer moved to another host; the outcome of a request is unknown
    └── DeadlineExceeded        the caller's time is over; the outcome is unknown
"""

from __future__ import annotations

from enum import IntEnum


class CloseCode(IntEnum):
    """Why a channel ended; on the wire in CLOSE frames, so values never change."""

    NORMAL = 0  # the application closed it
    UNKNOWN_SERVICE = 1  # nobody offers the service there
    NOT_PERMITTED = 2  # the access rule of the service refuses the caller
    LIMIT = 3  # a limit (channels, clients, rate) is reached
    PEER_GONE = 4  # the other end is not connected
    SESSION_RESET = 5  # the session that carried it was reset
    PROTOCOL = 6  # a channel rule was broken (credit, size)
    SHUTDOWN = 7  # the hub stops in order
    INTERNAL = 8  # an unexpected error at the other end; its log says more
    MOVED = 9  # the peer migrated to another host


class ChannelError(Exception):
    """Base of all errors of this library."""


class LocalProtocolError(ChannelError):
    """The caller misused the API."""


class MessageTooLarge(LocalProtocolError):
    """A message is larger than the reader's window could ever take."""


class CreditExceeded(LocalProtocolError):
    """More was sent than the reader has granted."""


class RemoteProtocolError(ChannelError):
    """The peer broke the protocol. What raises it is dead, and raises it again on each later call."""


class LinkError(ChannelError):
    """There is no byte connection to the peer."""


class PortNotFound(LinkError):
    """The machine has no virtio-serial port of that name."""


class PortBusy(LinkError):
    """Another program has the port open (a port can be opened once at a time)."""


class HubUnreachable(LinkError):
    """Nothing answers on the hub's socket."""


class ChannelClosed(ChannelError):
    """The channel has ended.

    Attributes:
        code: why, as a `CloseCode`.
        reason: the other end's words; untrusted text, at most 1,000 characters.
    """

    def __init__(self, code: CloseCode, reason: str = "") -> None:
        super().__init__(
            f"channel closed: {code.name.lower().replace('_', ' ')}{': ' + reason if reason else ''}"
        )
        self.code = code
        self.reason = reason


class ServiceRefused(ChannelClosed):
    """The channel was refused before it opened."""


class SessionReset(ChannelError):
    """The session ended; messages that the other application had not confirmed may be lost."""


class PeerMoved(ChannelError):
    """The peer moved to another host while a request was open; the outcome is unknown."""


class DeadlineExceeded(ChannelError):
    """The deadline passed before an answer came. The outcome is unknown; treat it as failed."""
