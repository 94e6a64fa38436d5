# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses of services: `[PEER/][PORT:]SERVICE`.

PEER is a VM (name or UUID) for an application on a host; a guest has one peer, its host, and leaves it out.
PORT is the virtio-serial port whose session carries the channel. SERVICE is a reverse-DNS name; a name that
begins with "." is the hub itself. VM names are data and may hold slashes and colons, so an address is read
from its right end.
"""

from __future__ import annotations

import re
from typing import Final

from fence_vmchannel.errors import LocalProtocolError
from fence_vmchannel.records import Record

HUB_SERVICE: Final = ".hub"
"""The hub's own service: status, watch, offer. For local applications only."""

DEFAULT_PORT: Final = "org.vmchannel.0"
PORT_PREFIX: Final = "org.vmchannel."
"""Every port whose name begins so is served by a hub."""

MAX_ADDRESS = 1024
"""Longest address, in characters."""

_SERVICE = re.compile(r"\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)
_MAX_SERVICE = 255


class Address(Record):
    """Where a channel shall go; "" stands for the hub's default."""

    service: str
    peer: str = ""
    port: str = ""

    def __str__(self) -> str:
        peer = f"{self.peer}/" if self.peer else ""
        port = f"{self.port}:" if self.port else ""
        return f"{peer}{port}{self.service}"


def parse_address(text: str) -> Address:
    """Read `[PEER/][PORT:]SERVICE`.

    Raises:
        LocalProtocolError: it is no address; the text says what is wrong.
    """
    if len(text) > MAX_ADDRESS:
        raise LocalProtocolError(f"an address has at most {MAX_ADDRESS} characters, this one {len(text)}")
    peer, slash, rest = text.rpartition("/")
    port, colon, service = rest.rpartition(":")
    if slash and not peer:
        raise LocalProtocolError(f"{text!r} is no address: nothing stands before '/'")
    if colon and not port:
        raise LocalProtocolError(f"{text!r} is no address: nothing stands before ':'")
    check_service(service)
    return Address(service, peer, port)


def check_service(name: str) -> None:
    """Raise `LocalProtocolError` unless `name` can name a service (letters, digits, `_`, `-`, dots)."""
    if len(name) > _MAX_SERVICE or not _SERVICE.fullmatch(name):
        raise LocalProtocolError(f"{name[:64]!r} is no service name such as 'org.example.clipboard'")
