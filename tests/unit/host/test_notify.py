# SPDX-License-Identifier: LGPL-2.1-or-later
"""sd_notify over a real datagram socket."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmchannel_host.notify import Notifier, without_notify


class Manager:
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(5)

    def heard(self) -> list[str]:
        return self._socket.recv(4096).decode().split("\n")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.close()


@pytest.fixture
def notifier(tmp_path: Path, manager: Manager) -> Notifier:
    return Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}, monotonic=lambda: 12.5)


def test_each_state_is_sent_as_the_manual_says(notifier: Notifier, manager: Manager) -> None:
    assert notifier.present
    notifier.ready("2 VMs")
    assert manager.heard() == ["READY=1", "STATUS=2 VMs"]
    notifier.reloading()
    assert manager.heard() == ["RELOADING=1", "MONOTONIC_USEC=12500000"]
    notifier.stopping()
    assert manager.heard() == ["STOPPING=1"]
    notifier.watchdog()
    assert manager.heard() == ["WATCHDOG=1"]


def test_a_name_in_the_status_cannot_set_another_variable(notifier: Notifier, manager: Manager) -> None:
    notifier.status("fencing vm\nMAINPID=1")
    assert manager.heard() == ["STATUS=fencing vm\\x0aMAINPID=1"]


def test_an_abstract_socket_is_spoken_to() -> None:
    name = f"vmchannel-test-{os.getpid()}"
    manager = Manager("\0" + name)
    Notifier({"NOTIFY_SOCKET": "@" + name}).ready()
    assert manager.heard() == ["READY=1"]
    manager.close()


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({})
    assert not notifier.present
    assert notifier.watchdog_interval_s is None
    notifier.ready()


def test_a_manager_that_is_away_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    with caplog.at_level(logging.WARNING):
        notifier.ready()
        notifier.watchdog()
    assert len(caplog.records) == 1


def test_a_manager_that_does_not_read_holds_nothing_up(notifier: Notifier, manager: Manager) -> None:
    queue = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    for _ in range(queue + 2):  # the last ones would wait for ever without a time-out
        notifier.watchdog()
    assert manager.heard() == ["WATCHDOG=1"]


@pytest.mark.parametrize("address", ["relative", "vsock:2:1", "@"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="NOTIFY_SOCKET"):
        Notifier({"NOTIFY_SOCKET": address})


@pytest.mark.parametrize(
    ("environment", "interval_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_PID": "42"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_the_time_allowed(
    environment: dict[str, str], interval_s: float | None
) -> None:
    assert Notifier(environment, pid=42).watchdog_interval_s == interval_s


@pytest.mark.parametrize("text", ["0", "-1", "soon", "²"])
def test_a_malformed_watchdog_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="WATCHDOG_USEC"):
        Notifier({"WATCHDOG_USEC": text})


def test_started_programs_do_not_inherit_the_manager() -> None:
    environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "2", "PATH": "/bin"}
    assert without_notify(environment) == {"PATH": "/bin"}
