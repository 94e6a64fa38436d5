# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannel-guestd: the guest's hub. Owns the ports, serves local applications, announces the node's name.

Needs no configuration file, no udev and no service manager.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import grp
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fence_vmchannel import __version__
from fence_vmchannel.access import guest_rules
from fence_vmchannel.core.events import PeerIdentity, Role
from fence_vmchannel.discovery import SYSTEM_PATHS, PortPaths
from fence_vmchannel.errors import LinkError
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.hub.ports import PortConnector
from fence_vmchannel.links.local import GUEST_SOCKET, sessions_path
from fence_vmchannel.peers import HOST_PEER, PeerInfo, PeerKind
from fence_vmchannel.supervisor import Supervisor
from vmchannel_guest.announce import NodeSources, find_announcement, system_sources
from vmchannel_guest.naming import NodeNaming
from vmchannel_guest.notify import Notifier

log = logging.getLogger("vmchannel_guest")

FENCE_GROUP: Final = "haclient"
"""Pacemaker's group: its members may use the fence service, besides root."""

SOCKET_MODE: Final = 0o666
"""Anybody may connect; what he may open there, the access rules say."""

EXIT_FAILED: Final = 1


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """What the command line says."""

    socket: str = GUEST_SOCKET
    ports: tuple[str, ...] = ()  # none: every port whose name begins with org.vmchannel.
    log_level: str = "info"


def parse_options(arguments: Sequence[str]) -> GuestOptions:
    """Read the command line; exits with 2 on misuse."""
    parser = argparse.ArgumentParser(
        prog="vmchannel-guestd", description="The hub of a guest: channels to its host over virtio-serial."
    )
    parser.add_argument(
        "--port",
        action="append",
        default=[],
        metavar="NAME",
        help="serve this port only; may be repeated (default: every port named org.vmchannel.*)",
    )
    parser.add_argument("--socket", default=GUEST_SOCKET, metavar="PATH", help="default: %(default)s")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    found = parser.parse_args(arguments)
    if not all(found.port):
        parser.error("--port: a port's name is not empty")
    return GuestOptions(found.socket, tuple(dict.fromkeys(found.port)), found.log_level)


def main() -> int:
    """The command `vmchannel-guestd`: runs until SIGTERM or SIGINT."""
    options = parse_options(sys.argv[1:])
    _configure_log(options.log_level, for_journald="JOURNAL_STREAM" in os.environ)
    try:
        asyncio.run(serve(options, Notifier(os.environ, pid=os.getpid()), system_sources()))
    except LinkError as error:
        log.error("%s", error)
        return EXIT_FAILED
    return 0


async def serve(
    options: GuestOptions,
    notifier: Notifier,
    sources: NodeSources,
    *,
    paths: PortPaths = SYSTEM_PATHS,
    stop: asyncio.Event | None = None,
) -> None:
    """Run the hub until a signal comes or `stop` is set.

    Args:
        options: what to serve.
        notifier: the service manager.
        sources: of the node's name.
        paths: where the system shows its ports.
        stop: for tests; None waits for SIGTERM or SIGINT.

    Raises:
        LinkError: the socket cannot be served, because another hub does for instance.
    """
    stop = _stop_on_signals() if stop is None else stop
    os.makedirs(os.path.dirname(options.socket) or ".", mode=0o755, exist_ok=True)
    identity = PeerIdentity(_boot_id(paths.proc), f"vmchannel-guestd {__version__}")
    sessions = sessions_path(options.socket)
    access = guest_rules(_fence_gids())
    async with Hub(identity, access=access, default_peer=HOST_PEER, sessions=sessions) as hub:
        _serve_ports(hub, options.ports, paths)  # first, so that applications that come back find their peer
        hub.serve(options.socket, mode=SOCKET_MODE)
        log.info("serving %s", options.socket)
        notifier.ready(f"serving {options.socket}")
        await _run(hub, notifier, sources, stop)
        notifier.stopping()
    log.info("stopped")


async def _run(hub: Hub, notifier: Notifier, sources: NodeSources, stop: asyncio.Event) -> None:
    naming = NodeNaming(hub, functools.partial(find_announcement, sources))
    async with Supervisor() as tasks:  # a failure in there is logged; the hub goes on
        tasks.start(naming.run(), "node names")
        if notifier.watchdog_s is not None:
            tasks.start(_watchdog(notifier, notifier.watchdog_s), "watchdog")
        await stop.wait()


async def _watchdog(notifier: Notifier, interval_s: float) -> None:
    while True:
        notifier.watchdog()
        await asyncio.sleep(interval_s)


def _serve_ports(hub: Hub, names: tuple[str, ...], paths: PortPaths) -> None:
    if not names:
        hub.serve_ports(paths=paths)
    for name in names:
        hub.attach(PeerInfo(HOST_PEER, PeerKind.HOST, name), PortConnector(name, paths), role=Role.GUEST)


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def _fence_gids() -> frozenset[int]:
    with contextlib.suppress(KeyError):
        return frozenset({grp.getgrnam(FENCE_GROUP).gr_gid})
    return frozenset()


def _boot_id(proc: str) -> str:
    try:
        with open(f"{proc}/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError as error:
        raise LinkError(f"this kernel's boot id cannot be read: {error.strerror}") from error


class _JournalFormatter(logging.Formatter):
    """sd-daemon(3): the journal reads the priority from a prefix."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        return f"<{priority if record.levelno >= logging.INFO else 7}>{super().format(record)}"


def _configure_log(level: str, *, for_journald: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if for_journald:
        handler.setFormatter(_JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("vmchannel_guest", "fence_vmchannel"):
        logging.getLogger(name).setLevel(level.upper())


if __name__ == "__main__":
    sys.exit(main())
