# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bus of a single host: the order in which messages were published."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final, Generic

from vmchannel_host.bus import BusError, Delivered, M, Token
from vmchannel_host.model import HostName

MAX_WAITING: Final = 4096
"""Messages that may wait while a handler publishes more; beyond it something loops, and publish refuses."""

_log = logging.getLogger(__name__)


class LocalBus(Generic[M]):
    """A `Bus` with one member and one view that is always valid."""

    def __init__(self, host: HostName) -> None:
        self._host = host
        self._sequence = 0
        self._waiting: deque[Delivered[M]] = deque()
        self._handlers: list[Callable[[Delivered[M]], None]] = []
        self._delivering = False

    @property
    def host(self) -> HostName:
        return self._host

    def hosts(self) -> frozenset[HostName]:
        return frozenset((self._host,))

    def current(self, token: Token) -> bool:
        return token.view == 1 and token.sequence <= self._sequence

    def subscribe(self, handler: Callable[[Delivered[M]], None]) -> None:
        self._handlers.append(handler)

    def publish(self, message: M) -> None:
        """Deliver to all handlers; a message published by a handler is delivered after the present one.

        Raises:
            BusError: MAX_WAITING messages wait already.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise BusError(f"{MAX_WAITING} messages wait for delivery")
        self._sequence += 1
        self._waiting.append(Delivered(Token(1, self._sequence), self._host, True, message))
        if self._delivering:
            return
        self._delivering = True
        try:
            while self._waiting:
                self._deliver(self._waiting.popleft())
        finally:
            self._delivering = False

    def _deliver(self, delivered: Delivered[M]) -> None:
        for handler in self._handlers:
            try:
                handler(delivered)
            except Exception:  # noqa: BLE001 - one handler's mistake must not keep a message from the others
                _log.exception("a handler failed on %s", type(delivered.message).__name__)
