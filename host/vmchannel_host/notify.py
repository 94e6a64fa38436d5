# SPDX-License-Identifier: LGPL-2.1-or-later
"""Telling the service manager how the daemon is: sd_notify(3) without libsystemd."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

from vmchannel_host.printable import printable

logger = logging.getLogger(__name__)

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_SEND_TIMEOUT_S = 0.5  # a manager that does not read must not hold up fencing


class Notifier:
    """Sends states to the socket that NOTIFY_SOCKET names; does nothing where there is none.

    No method raises or blocks for more than half a second: a manager that is away is logged once.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        pid: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the environment.

        Args:
            environment: usually `os.environ`.
            pid: this process, to see whether the watchdog is meant for it.
            monotonic: CLOCK_MONOTONIC, seconds; the manager compares it with its own.

        Raises:
            ValueError: NOTIFY_SOCKET or WATCHDOG_USEC is malformed.
        """
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._monotonic = monotonic
        self._away = False
        self.watchdog_interval_s = _watchdog(environment, os.getpid() if pid is None else pid)
        """How often to call `watchdog`, seconds (half of what the manager allows); None: it does not ask."""

    @property
    def present(self) -> bool:
        """Whether a service manager listens."""
        return self._address is not None

    def ready(self, status: str = "") -> None:
        """Started, or reloaded, and serving."""
        self._send("READY=1", *_status(status))

    def reloading(self) -> None:
        """Reading the configuration again; `ready` follows."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={int(self._monotonic() * 1e6)}")

    def stopping(self, status: str = "") -> None:
        """Ending in order."""
        self._send("STOPPING=1", *_status(status))

    def status(self, text: str) -> None:
        """One line for people (`systemctl status`)."""
        self._send(*_status(text))

    def watchdog(self) -> None:
        """Still alive."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._address is None or not lines:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(_SEND_TIMEOUT_S)
                sender.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError as error:
            if not self._away:
                logger.warning("the service manager does not listen: %s", error)
            self._away = True
        else:
            self._away = False


def without_notify(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for programs that the daemon starts: they must not speak for it."""
    return {name: value for name, value in environment.items() if name not in _VARIABLES}


def _status(text: str) -> list[str]:
    # A line break would begin another variable, and the text may hold names that guests chose.
    return [f"STATUS={printable(text, 500)}"] if text else []


def _address(text: str) -> str | None:
    if not text:
        return None
    if text.startswith("@") and len(text) > 1:
        return "\0" + text[1:]
    if text.startswith("/"):
        return text
    raise ValueError(f"NOTIFY_SOCKET is {text!r}, neither a path nor an abstract name")


def _watchdog(environment: Mapping[str, str], pid: int) -> float | None:
    text = environment.get("WATCHDOG_USEC", "")
    if not text or environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError(f"WATCHDOG_USEC is {text!r}, not a number of microseconds")
    return int(text) / 2e6
