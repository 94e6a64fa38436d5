# SPDX-License-Identifier: LGPL-2.1-or-later
"""Log lines with fields: `level module: message vm=... port=...`; one grep tells the story of a VM."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from typing import Any, TextIO

from vmchannel_host.printable import printable

Value = str | int | float | bool | None

_LONGEST_VALUE = 120  # characters
_LONGEST_MESSAGE = 2000

# sd-daemon(3): the prefix that the system's journal reads the priority from.
_PRIORITIES = (
    (logging.ERROR, "<3>"),
    (logging.WARNING, "<4>"),
    (logging.INFO, "<6>"),
    (logging.NOTSET, "<7>"),
)


class BoundLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose every line carries the same fields.

    Untrusted text belongs into fields, or through `%r`: fields are escaped and cut.
    """

    def __init__(self, logger: logging.Logger, fields: Mapping[str, Value]) -> None:
        super().__init__(logger, dict(fields))
        self.fields = dict(fields)

    def bind(self, **fields: Value) -> BoundLogger:
        """The same logger with more fields."""
        return BoundLogger(self.logger, {**self.fields, **fields})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Hand the fields to the formatter (`logging.LoggerAdapter`)."""
        kwargs["extra"] = {**(kwargs.get("extra") or {}), "fields": self.fields}
        return msg, kwargs

    def limited(self, limiter: RateLimiter, level: int, key: Hashable, msg: str, *args: object) -> None:
        """Log a line that bad input can cause at any rate; what was left out is counted in the next line."""
        left_out = limiter.allow((self.logger.name, key))
        if left_out is None:
            return
        (self.bind(repeated=left_out) if left_out else self).log(level, msg, *args)


class RateLimiter:
    """At most `burst` lines of one key in `interval_s` seconds; bounded memory for any number of keys."""

    def __init__(
        self,
        *,
        burst: int = 5,
        interval_s: float = 10.0,
        max_keys: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = burst
        self._interval_s = interval_s
        self._max_keys = max_keys
        self._clock = clock
        self._keys: OrderedDict[Hashable, list[float]] = OrderedDict()  # key: window's start, used, left out

    def allow(self, key: Hashable) -> int | None:
        """None: leave this line out. Otherwise how many of the key were left out since its last line."""
        now = self._clock()
        window = self._keys.get(key)
        if window is None or now - window[0] >= self._interval_s:
            left_out = int(window[2]) if window else 0
            self._keys[key] = [now, 1, 0]
            self._keys.move_to_end(key)
            while len(self._keys) > self._max_keys:
                self._keys.popitem(last=False)
            return left_out
        if window[1] < self._burst:
            window[1] += 1
            return 0
        window[2] += 1
        return None


class LineFormatter(logging.Formatter):
    """One line for each record; a traceback follows it, indented by its own lines."""

    def __init__(self, *, for_journald: bool = False) -> None:
        """`for_journald`: begin with a priority instead of the time, which the journal adds itself."""
        super().__init__()
        self._for_journald = for_journald

    def format(self, record: logging.LogRecord) -> str:
        """The record's line (`logging.Formatter`)."""
        message = printable(record.getMessage(), _LONGEST_MESSAGE)
        fields: Mapping[str, Value] = getattr(record, "fields", {})
        words = [f"{record.levelname.lower()} {record.name}: {message}"]
        words += [f"{name}={field_text(value)}" for name, value in fields.items()]
        line = " ".join(words)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return f"{_start(record, self, for_journald=self._for_journald)}{line}"


def field_text(value: Value) -> str:
    """A field's value: bare where it is one plain word, in double quotes otherwise."""
    if not isinstance(value, str):
        return "-" if value is None else str(value)
    text = printable(value, _LONGEST_VALUE)
    if text and not any(character in ' "=\\' for character in text):
        return text
    return '"' + text.replace('"', '\\"') + '"'


def configure(level: str, stream: TextIO, *, for_journald: bool) -> None:
    """Send the product's log lines to a stream; call it once, from `main`.

    Args:
        level: "debug", "info", "warning" or "error".
        for_journald: the stream is the system's journal (JOURNAL_STREAM is set in the environment).
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(for_journald=for_journald))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)  # other libraries: what they warn of
    for name in ("vmchannel_host", "fence_vmchannel"):
        logging.getLogger(name).setLevel(level.upper())


def _start(record: logging.LogRecord, formatter: logging.Formatter, *, for_journald: bool) -> str:
    if for_journald:
        return next(prefix for level, prefix in _PRIORITIES if record.levelno >= level)
    return f"{formatter.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d} "
