# SPDX-License-Identifier: LGPL-2.1-or-later
"""Channels between guests and their hosts over named virtio-serial ports.

::

    import fence_vmchannel

    async with fence_vmchannel.connect() as client:            # this machine's hub
        answer = await client.request("org.example.echo", b"hello", timeout_s=5)

Programs that must start fast use `BlockingClient`, which imports no asyncio. Names are loaded when they are
first used, so `import fence_vmchannel` costs next to nothing. What is not in `__all__` may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fence_vmchannel.blocking.channel import BlockingChannel
    from fence_vmchannel.blocking.client import BlockingClient
    from fence_vmchannel.channel import Channel
    from fence_vmchannel.client import Client, connect
    from fence_vmchannel.errors import (
        ChannelClosed,
        ChannelError,
        CloseCode,
        CreditExceeded,
        DeadlineExceeded,
        HubUnreachable,
        LinkError,
        LocalProtocolError,
        MessageTooLarge,
        PeerMoved,
        PortBusy,
        PortNotFound,
        RemoteProtocolError,
        ServiceRefused,
        SessionReset,
    )
    from fence_vmchannel.hub.events import (
        HubEvent,
        HubStatus,
        Overflow,
        PeerConnected,
        PeerDisconnected,
        PeerStatus,
        PortAdded,
        PortRemoved,
        PortUnusable,
        ServiceOffered,
        ServiceWithdrawn,
        SessionWasReset,
        Synced,
    )
    from fence_vmchannel.hub.hub import Hub
    from fence_vmchannel.links.local import GUEST_SOCKET, HOST_SOCKET
    from fence_vmchannel.peers import PeerInfo, PeerKind

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (most important first)
    "connect",
    "Client",
    "Channel",
    "BlockingClient",
    "BlockingChannel",
    "ChannelError",
    "ServiceRefused",
    "ChannelClosed",
    "CloseCode",
    "DeadlineExceeded",
    "SessionReset",
    "PeerMoved",
    "LinkError",
    "HubUnreachable",
    "PortNotFound",
    "PortBusy",
    "RemoteProtocolError",
    "LocalProtocolError",
    "MessageTooLarge",
    "CreditExceeded",
    "HubEvent",
    "PeerConnected",
    "PeerDisconnected",
    "SessionWasReset",
    "PortAdded",
    "PortRemoved",
    "PortUnusable",
    "ServiceOffered",
    "ServiceWithdrawn",
    "Synced",
    "Overflow",
    "HubStatus",
    "PeerStatus",
    "PeerInfo",
    "PeerKind",
    "Hub",
    "GUEST_SOCKET",
    "HOST_SOCKET",
    "__version__",
]

_MODULES = {
    "blocking.client": ("BlockingClient",),
    "blocking.channel": ("BlockingChannel",),
    "channel": ("Channel",),
    "client": ("Client", "connect"),
    "errors": (
        "ChannelClosed",
        "ChannelError",
        "CloseCode",
        "CreditExceeded",
        "DeadlineExceeded",
        "HubUnreachable",
        "LinkError",
        "LocalProtocolError",
        "MessageTooLarge",
        "PeerMoved",
        "PortBusy",
        "PortNotFound",
        "RemoteProtocolError",
        "ServiceRefused",
        "SessionReset",
    ),
    "hub.hub": ("Hub",),
    "hub.events": (
        "HubEvent",
        "HubStatus",
        "Overflow",
        "PeerConnected",
        "PeerDisconnected",
        "PeerStatus",
        "PortAdded",
        "PortRemoved",
        "PortUnusable",
        "ServiceOffered",
        "ServiceWithdrawn",
        "SessionWasReset",
        "Synced",
    ),
    "links.local": ("GUEST_SOCKET", "HOST_SOCKET"),
    "peers": ("PeerInfo", "PeerKind"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
