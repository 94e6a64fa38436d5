# SPDX-License-Identifier: LGPL-2.1-or-later
"""sd_notify(3) without libsystemd; does nothing where no service manager listens."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from typing import Final

log = logging.getLogger(__name__)

_SEND_TIMEOUT_S: Final = 0.5


class Notifier:
    """Tells the service manager that NOTIFY_SOCKET names how the daemon is. Blocks for 0.5 s at most."""

    def __init__(self, environment: Mapping[str, str], *, pid: int) -> None:
        """Read `environment`; `pid` is this process, to see whether the watchdog is meant for it."""
        self._address = environment.get("NOTIFY_SOCKET", "")
        self.watchdog_s = self._watchdog_interval(environment, pid)
        """How often to call `watchdog`, in seconds; None when nobody asks for it."""

    def ready(self, status: str) -> None:
        """It serves; `status` is one line for people."""
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """It ends in order."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """It is alive."""
        self._send("WATCHDOG=1")

    def _watchdog_interval(self, environment: Mapping[str, str], pid: int) -> float | None:
        text = environment.get("WATCHDOG_USEC", "")
        if not self._address or environment.get("WATCHDOG_PID", str(pid)) != str(pid):
            return None
        return int(text) / 2e6 if text.isascii() and text.isdigit() and int(text) else None

    def _send(self, state: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(_SEND_TIMEOUT_S)
                sender.sendto(state.encode(), address)
        except OSError as error:
            log.warning("the service manager does not listen: %s", error)
