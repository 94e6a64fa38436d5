# SPDX-License-Identifier: LGPL-2.1-or-later
"""Log lines about what others sent: cut and quoted, and not more of them than a disk can bear."""

from __future__ import annotations

import logging
from collections.abc import Callable


def quoted(text: str, limit: int = 200) -> str:
    """Untrusted text for a log line or a reason: one line, cut."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


class RateLimitedLog:
    """At most `burst` lines in `period_s` seconds; the next one that passes tells how many were left out."""

    def __init__(
        self, logger: logging.Logger, *, clock: Callable[[], float], burst: int = 10, period_s: float = 10.0
    ) -> None:
        self._logger = logger
        self._clock = clock
        self._burst = burst
        self._period_s = period_s
        self._since = clock()
        self._written = 0
        self._left_out = 0

    def warning(self, message: str, *args: object) -> None:
        """Log at level warning, if the rate allows it."""
        self._write(logging.WARNING, message, *args)

    def info(self, message: str, *args: object) -> None:
        """Log at level info, if the rate allows it."""
        self._write(logging.INFO, message, *args)

    def error(self, message: str, *args: object) -> None:
        """Log at level error, if the rate allows it."""
        self._write(logging.ERROR, message, *args)

    def exception(self, message: str, *args: object) -> None:
        """Log at level error with the exception that is being handled, if the rate allows it."""
        self._write(logging.ERROR, message, *args, traceback=True)

    def _write(self, level: int, message: str, *args: object, traceback: bool = False) -> None:
        now = self._clock()
        if now - self._since >= self._period_s:
            self._since, self._written = now, 0
        if self._written >= self._burst:
            self._left_out += 1
            return
        self._written += 1
        if self._left_out:
            message += f" ({self._left_out} earlier lines left out)"
            self._left_out = 0
        self._logger.log(level, message, *args, exc_info=traceback)
