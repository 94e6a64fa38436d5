# SPDX-License-Identifier: LGPL-2.1-or-later
"""A journal that could not be opened: every call fails with the reason, and nothing is claimed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from vmchannel_host.journal.journal import Journal
from vmchannel_host.journal.restored import Restored
from vmchannel_host.journal.store import JournalStore
from vmchannel_host.journal.types import JournalError, VerifyResult
from vmchannel_host.model import BootId

T = TypeVar("T")


class UnusableJournal(Journal):
    """Stands for the journal until it is mended and the daemon started again."""

    def __init__(self, error: JournalError) -> None:
        self._error = error
        self._wall_clock = time.time
        self._boot_id = BootId("")

    @property
    def last_seq(self) -> int:
        """None is known."""
        return 0

    @property
    def problem(self) -> str:
        """Why it could not be opened."""
        return str(self._error)

    @property
    def short(self) -> str:
        """Room is not what is missing."""
        return ""

    @property
    def restored(self) -> Restored | None:
        """Nothing is known."""
        return None

    async def close(self, *, timeout_s: float = 0.0) -> None:
        """There is nothing to close."""

    async def verify(self) -> VerifyResult:
        """Fail."""
        raise self._refusal()

    async def _call(self, call: Callable[[JournalStore], T], timeout_s: float, if_room: bool = False) -> T:
        raise self._refusal()

    def _refusal(self) -> JournalError:
        return type(self._error)(str(self._error))
