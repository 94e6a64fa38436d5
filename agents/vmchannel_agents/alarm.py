# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of the whole process: by its own deadline or by SIGTERM, but never without a reason."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType


class OutOfTime(BaseException):
    """The process has outlived its deadline. Nothing may catch it but `main`."""


class Terminated(BaseException):
    """SIGTERM. Nothing may catch it but `main`."""


class Alarm:
    """While the context lasts, raise `OutOfTime` after `seconds`, and `Terminated` at SIGTERM.

    The client keeps its own deadlines; this is for what it cannot see, such as a syslog that blocks.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.signal(signal.SIGTERM, _terminated)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _out_of_time(_: int, __: FrameType | None) -> None:
    raise OutOfTime("the agent's own deadline has passed")


def _terminated(_: int, __: FrameType | None) -> None:
    raise Terminated("terminated by a signal before the host answered")


def process_age_s() -> float:
    """Seconds since this process began: a caller's deadline runs from there. 0 if that cannot be read."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            return age_s(file.read(), time.clock_gettime(time.CLOCK_BOOTTIME), os.sysconf("SC_CLK_TCK"))
    except OSError:
        return 0.0


def age_s(stat: str, now_s: float, ticks: int) -> float:
    """The age that `/proc/PID/stat` tells, at `now_s` on CLOCK_BOOTTIME. See proc(5), field 22."""
    started = int(stat.rpartition(")")[2].split()[19])
    return max(0.0, now_s - started / ticks)
