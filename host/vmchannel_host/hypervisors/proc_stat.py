# SPDX-License-Identifier: LGPL-2.1-or-later
"""What /proc/PID/stat tells of a process; readable by everybody, and without a lock of its memory."""

from __future__ import annotations

from dataclasses import dataclass

STAT_BYTES = 4096
"""More than /proc/PID/stat has: 52 numbers, and a name of at most 64 bytes."""

COMMAND_LENGTH = 15
"""To this the kernel cuts a command's name (TASK_COMM_LEN of linux/sched.h, less the end)."""

_EXITING = 0x4  # PF_EXITING of linux/sched.h
_KERNEL_THREAD = 0x200000  # PF_KTHREAD


@dataclass(frozen=True, slots=True)
class Stat:
    """Five fields of /proc/PID/stat."""

    command: (
        str  # the program's file name, cut to 15 bytes, unless the process has changed it; untrusted text
    )
    state: str  # one letter; Z also for a leader that has exited while its threads live
    flags: int
    threads: int
    start_time: int  # clock ticks after boot

    @property
    def exiting(self) -> bool:
        """Whether it, or its leader, exits or has exited. It shows no program before its state is Z."""
        return self.state in "ZX" or bool(self.flags & _EXITING)

    @property
    def zombie(self) -> bool:
        """Whether nothing of it lives any more."""
        return self.state in "ZX" and self.threads <= 1

    @property
    def kernel_thread(self) -> bool:
        return bool(self.flags & _KERNEL_THREAD)


def parse_stat(text: str) -> Stat:
    """Read /proc/PID/stat. The command in it may hold blanks and parentheses; the last one ends it.

    Raises:
        ValueError: it is not the line of a process.
    """
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    if len(fields) < 20:
        raise ValueError("not the stat line of a process")
    return Stat(  # proc(5): fields 2, 3, 9, 20, 22
        command=head.partition("(")[2],
        state=fields[0],
        flags=int(fields[6]),
        threads=int(fields[17]),
        start_time=int(fields[19]),
    )
