# SPDX-License-Identifier: GPL-2.0-or-later
"""How old this process is: a caller's deadline runs from its start."""

from __future__ import annotations

from vmchannel_agents.alarm import age_s, process_age_s

STAT = "7 (a) name) S 1 7 7 0 -1 4194560 1 0 0 0 5 2 0 0 20 0 1 0 123400 1000 10 18446744073709551615"


def test_the_age_is_counted_from_the_start_whatever_the_process_is_called() -> None:
    assert age_s(STAT, 1240.5, 100) == 6.5


def test_an_age_is_never_negative() -> None:
    assert age_s(STAT, 1233.99, 100) == 0.0


def test_this_process_grows_older() -> None:
    first = process_age_s()
    assert 0 < first <= process_age_s()
