# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one line that moves while an operation runs: on a terminal only, on stderr."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TextIO

from vmchannel_host.cli.table import cut
from vmchannel_host.printable import printable

_TICK_S = 0.2
_CLEAR = "\r\x1b[K"


class ProgressLine:
    """Shows what runs and for how long, as a context manager; nothing where `stream` is no terminal."""

    def __init__(
        self, stream: TextIO, what: str, *, width: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._what = printable(what, 80)
        self._width = width
        self._clock = clock
        self._began = clock()
        self._text = "asked"
        self._shown = stream.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> ProgressLine:
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._stop.set()
            self._thread.join()
            self._stream.write(_CLEAR)
            self._stream.flush()

    def update(self, text: str) -> None:
        """Show this from now on."""
        self._text = printable(text, 200)

    def _tick(self) -> None:
        while True:
            elapsed = self._clock() - self._began
            line = cut(f"{elapsed:5.1f}s  {self._what}  {self._text}", self._width - 1)
            self._stream.write(_CLEAR + line)
            self._stream.flush()
            if self._stop.wait(_TICK_S):
                return
