# SPDX-License-Identifier: GPL-2.0-or-later
"""How an action of the agent ends: its exit codes, its failure, its last line."""

from __future__ import annotations

from typing import Final

from vmchannel_guest.text import one_line

EC_OK: Final = 0
EC_GENERIC_ERROR: Final = 1
"""The library ends with it after every failure. 2 is `status` of a VM that is off."""


class AgentError(Exception):
    """The action failed. The text is the reason; `op` and `host` are what is known of them."""

    def __init__(self, reason: str, *, op: str = "", host: str = "") -> None:
        super().__init__(reason)
        self.op = op
        self.host = host


def reason_line(reason: str, op: str = "", host: str = "") -> str:
    """One line that says why, which operation, and which host; "-" where there is none."""
    return f"{one_line(reason.strip())} op={op or '-'} host={one_line(host) or '-'}"
