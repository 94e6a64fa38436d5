# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's channels as its XML has them, and the XML of one of ours (pure).

A port's name is data (S9): it becomes XML through a serialiser only. libvirt makes it part of the socket's
path, so names that would be more than the last part of one, or too long, are refused here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from vmchannel_host.hypervisors.libvirt.words import parse_domain
from vmchannel_host.hypervisors.plug_words import MAX_PATH, digest
from vmchannel_host.model import PortName

ALIAS: Final = "ua-vmchannel-port-"
"""How the aliases of what we attach begin: by them it is found again. libvirt keeps those with `ua-`."""

_SHORT_NAME: Final = 20
"""Characters of a domain's name in its directory (virDomainDefGetShortName in domain_conf.c)."""

_LONGEST_ID: Final = 7
"""Digits of a domain's number for which there is to be room: it grows with each start."""


@dataclass(frozen=True, slots=True)
class VirtioChannel:
    """A virtio channel of a domain."""

    name: str  # of the port; untrusted text
    alias: str
    xml: str  # by which libvirt finds it
    usable: bool  # it is, or will be, a unix socket

    @property
    def ours(self) -> bool:
        """Whether we have attached it."""
        return self.alias.startswith(ALIAS)


@dataclass(frozen=True, slots=True)
class Devices:
    """What is needed of a running domain, or of a definition."""

    channels: tuple[VirtioChannel, ...]
    has_controller: bool  # a virtio-serial controller

    def named(self, port: PortName) -> tuple[VirtioChannel, ...]:
        """The channels of a port's name."""
        return tuple(one for one in self.channels if one.name == port)


def read_devices(text: str) -> Devices:
    """Read a domain's XML.

    Raises:
        HypervisorError: it is not what libvirt writes.
    """
    root = parse_domain(text)
    found = (_channel(element) for element in root.iterfind("./devices/channel"))
    controller = root.find("./devices/controller[@type='virtio-serial']")
    return Devices(tuple(one for one in found if one is not None), controller is not None)


def channel_xml(port: PortName) -> str:
    """A channel of ours; libvirt chooses where its socket is."""
    channel = ElementTree.Element("channel", type="unix")
    ElementTree.SubElement(channel, "target", type="virtio", name=port)
    ElementTree.SubElement(channel, "alias", name=ALIAS + digest(port))
    return ElementTree.tostring(channel, encoding="unicode")


def channel_directory(saves: Path) -> Path:
    """Where a libvirt keeps the sockets of channels, told by where it keeps managed saves.

    Newer ones keep them below /run, with a shorter path.
    """
    return saves.parent / "channel" / "target"


def name_problem(port: PortName, domain: str, directory: str) -> str:
    """Why a domain could not be started with a port of that name; "" when it could.

    Args:
        port: the name.
        domain: the domain's name.
        directory: where this libvirt keeps the sockets of channels.
    """
    if "/" in port or not port.isprintable():
        return "libvirt makes the port's name the name of a socket: no `/` and no control characters"
    path = f"{directory}/domain-{'9' * _LONGEST_ID}-{domain[:_SHORT_NAME]}/{port}"
    over = len(os.fsencode(path)) - MAX_PATH
    if over > 0:
        return f"libvirt makes the port's name part of a socket's path, for which it is {over} bytes too long"
    return ""


def _channel(element: ElementTree.Element) -> VirtioChannel | None:
    target, alias, source = element.find("target"), element.find("alias"), element.find("source")
    if target is None or target.get("type") != "virtio":
        return None
    listens = source is None or source.get("mode", "bind") == "bind"
    connects = source is not None and source.get("mode") == "connect" and source.get("path", "") != ""
    target.attrib.pop("state", None)  # of the guest, at this moment
    return VirtioChannel(
        name=target.get("name", ""),
        alias="" if alias is None else alias.get("name", ""),
        xml=ElementTree.tostring(element, encoding="unicode"),
        usable=element.get("type") == "unix" and (listens or connects),
    )
