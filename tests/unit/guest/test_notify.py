# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager hears what it asked for, and nobody else is bothered."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vmchannel_guest.notify import Notifier


@pytest.mark.parametrize("abstract", [False, True])
def test_each_state_reaches_the_socket(tmp_path: Path, abstract: bool) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{path}" if abstract else path)
        manager.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": f"@{path}" if abstract else path}, pid=1)
        notifier.ready("serving")
        notifier.watchdog()
        notifier.stopping()
        states = [manager.recv(200) for _ in range(3)]
    assert states == [b"READY=1\nSTATUS=serving", b"WATCHDOG=1", b"STOPPING=1"]


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({}, pid=1)
    notifier.ready("serving")
    assert notifier.watchdog_s is None


def test_a_manager_that_is_away_is_no_failure(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}, pid=1).ready("serving")


@pytest.mark.parametrize(
    ("environment", "interval_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_asked_by_the_process_it_is_meant_for(
    environment: dict[str, str], interval_s: float | None
) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/n", **environment}, pid=7).watchdog_s == interval_s
