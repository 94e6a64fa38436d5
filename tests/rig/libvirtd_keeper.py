# SPDX-License-Identifier: LGPL-2.1-or-later
"""Holds one libvirtd and all that it starts: `libvirtd_keeper.py COMMAND...`, told what to do by stdin.

`start` starts libvirtd, `kill` kills it; each answers with its pid. A process that lost its parent becomes
our child and is reaped at once, as an init would do (an init that is slow holds up libvirt's own `destroy`).
At the end of stdin everything is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    waker, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, _ignore)
    signal.set_wakeup_fd(wakes)
    libvirtd = 0
    while True:
        ready, _, _ = select.select([sys.stdin, waker], [], [])
        if waker in ready:
            os.read(waker, 4096)
        reap()
        if sys.stdin not in ready:
            continue
        match sys.stdin.readline().strip():
            case "start":
                libvirtd = os.posix_spawnp(command[0], command, os.environ)
            case "kill":
                os.kill(libvirtd, signal.SIGKILL)
            case _:
                break
        print(libvirtd, flush=True)
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        os.wait()


def _ignore(_number: int, _frame: object) -> None:
    """The wake-up descriptor tells."""


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


if __name__ == "__main__":
    main(sys.argv[1:])
