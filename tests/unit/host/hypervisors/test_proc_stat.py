# SPDX-License-Identifier: LGPL-2.1-or-later
"""The line of /proc/PID/stat, whatever the command in it is called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.hypervisors.proc_stat import parse_stat


def stat_line(
    pid: int,
    start_time: int,
    *,
    command: str = "qemu-system-x86",
    state: str = "S",
    flags: int = 0,
    threads: int = 1,
) -> str:
    fields = [state, *["1"] * 5, str(flags), *["0"] * 10, str(threads), "0", str(start_time), *["0"] * 30]
    return f"{pid} ({command}) {' '.join(fields)}\n"


@pytest.mark.parametrize("command", ["qemu", "a) b", ") S 1 (", "x (y)", "", "\n) Z 9"])
def test_the_start_time_is_read_whatever_the_command_is_called(command: str) -> None:
    stat = parse_stat(stat_line(7, 4711, command=command))
    assert (stat.start_time, stat.command) == (4711, command)


@given(st.text(max_size=200))
def test_any_text_is_a_stat_line_or_refused(text: str) -> None:
    try:
        parse_stat(text)
    except ValueError:
        return


@pytest.mark.parametrize(
    ("state", "flags", "threads", "exiting", "zombie"),
    [
        ("S", 0, 1, False, False),
        ("R", 0x4, 1, True, False),  # it gives back its memory, then its files
        ("Z", 0x4, 1, True, True),
        ("Z", 0, 3, True, False),  # only its leader is gone
        ("I", 0x200000, 1, False, False),
    ],
)
def test_what_exits_is_told_from_what_has_ended(
    state: str, flags: int, threads: int, exiting: bool, zombie: bool
) -> None:
    stat = parse_stat(stat_line(7, 1, state=state, flags=flags, threads=threads))
    assert (stat.exiting, stat.zombie, stat.kernel_thread) == (exiting, zombie, flags == 0x200000)
