# SPDX-License-Identifier: LGPL-2.1-or-later
"""The name under which the cluster knows this guest: corosync's local node name, else the host name.

Found as Pacemaker finds it (the local entry of corosync's nodelist: `name`, else `ring0_addr` if that is no
address, else the host name), but without asking a name server: a guest may have no network.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from fence_vmchannel.messages import MAX_PLUG, Announce

CMAPCTL_TIMEOUT_S: Final = 2.0
_MAX_CONFIG_BYTES: Final = 1_048_576

_KEY_VALUE = re.compile(r"^\s*([^\s:]+)\s*:\s*(.*?)\s*$")
_CMAP = re.compile(r"^nodelist\.(?:node\.(\d+)\.(\w+)|(local_node_pos)) \(\w+\) = (.*)$")


@dataclass(frozen=True, slots=True)
class NodeSources:
    """Where the name comes from; `system_sources` in production."""

    root: str  # of the file system
    hostname: Callable[[], str]
    is_local: Callable[[str], bool]  # whether an IP address is this machine's
    cmap: Callable[[], str]  # corosync's own nodelist, as corosync-cmapctl prints it; "" if there is none


def system_sources() -> NodeSources:
    """This machine."""
    return NodeSources("/", socket.gethostname, is_local_address, read_cmap)


def find_announcement(sources: NodeSources) -> Announce | None:
    """What to announce now; None when this machine has no usable name. May block for two seconds.

    corosync.conf is read first. Only where it does not say which node is local is corosync asked.
    Where neither tells, the network is not up yet; the host name, announced then, would replace the node's.
    """
    nodes = parse_nodelist(_read(os.path.join(sources.root, "etc/corosync/corosync.conf")))
    hostname = sources.hostname()
    if nodes:
        local = _local_node(nodes, hostname, sources) or _node_of_cmap(sources.cmap())
        if local is None:
            return None
        name = _node_name(local)
        if _usable(name):
            return Announce(name, "corosync")
    return Announce(hostname, "hostname") if _usable(hostname) else None


def parse_nodelist(text: str) -> list[dict[str, str]]:
    """The `node` sections in `nodelist` of a corosync.conf. What is malformed is skipped."""
    nodes: list[dict[str, str]] = []
    path: list[str] = []
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("#"):
            continue
        if line.endswith("{"):
            path.append(line[:-1].strip())
            if path == ["nodelist", "node"]:
                nodes.append({})
        elif line == "}":
            del path[-1:]
        elif path == ["nodelist", "node"] and (found := _KEY_VALUE.match(line)):
            nodes[-1][found[1]] = found[2]
    return nodes


def is_local_address(address: str) -> bool:
    """Whether an IP address is this machine's: only such can be bound. Asks no name server, sends nothing."""
    try:
        version = ipaddress.ip_address(address).version
    except ValueError:
        return False
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def read_cmap() -> str:
    """corosync's own nodelist; "" when it does not run, or does not answer within two seconds."""
    try:
        done = subprocess.run(
            ["corosync-cmapctl", "nodelist."],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CMAPCTL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def _local_node(nodes: list[dict[str, str]], hostname: str, sources: NodeSources) -> Mapping[str, str] | None:
    """The one node whose address, or name, is this machine's; None when none or several fit."""
    hosts = _parse_hosts(_read(os.path.join(sources.root, "etc/hosts")))

    def by_address(node: Mapping[str, str]) -> bool:
        rings = [value for key, value in node.items() if re.fullmatch(r"ring\d+_addr", key)]
        addresses = [address for ring in rings for address in hosts.get(ring.lower(), [ring])]
        return any(sources.is_local(one) and not _is_loopback(one) for one in addresses)

    def by_name(node: Mapping[str, str]) -> bool:
        return hostname in (node.get("name"), node.get("ring0_addr"))

    for fits in (by_address, by_name):
        found = [node for node in nodes if fits(node)]
        if len(found) == 1:
            return found[0]
    return None


def _node_of_cmap(text: str) -> Mapping[str, str] | None:
    nodes: dict[str, dict[str, str]] = {}
    local = ""
    for line in text.splitlines():
        if found := _CMAP.match(line):
            number, key, position, value = found.groups()
            if position:
                local = value
            else:
                nodes.setdefault(number, {})[key] = value
    return nodes.get(local)


def _node_name(node: Mapping[str, str]) -> str:
    if name := node.get("name"):
        return name
    ring = node.get("ring0_addr", "")
    try:
        ipaddress.ip_address(ring)
    except ValueError:
        return ring
    return ""


def _parse_hosts(text: str) -> dict[str, list[str]]:
    hosts: dict[str, list[str]] = {}
    for line in text.splitlines():
        address, *names = line.split("#", 1)[0].split() or [""]
        for name in names:
            hosts.setdefault(name.lower(), []).append(address)
    return hosts


def _is_loopback(address: str) -> bool:
    """On Debian each machine's own name is 127.0.1.1 in its /etc/hosts, which is local everywhere."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False


def _usable(name: str) -> bool:
    return 0 < len(name) <= MAX_PLUG and name.isprintable() and name != "localhost"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_CONFIG_BYTES)
    except OSError:
        return ""
