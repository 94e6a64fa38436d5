# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that runs a command whose mounts nobody else sees; also in a chroot, as build servers use.

There "/" is no mount point, and `unshare --mount` fails: it cannot say that mounts below "/" stay private. So
the way leads out of the chroot, into a mount namespace, and back in.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

_CLONE_NEWNS = 0x20000  # linux/sched.h
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18  # linux/mount.h


def command(*words: str) -> tuple[str, ...]:
    """The command line that runs `words` so."""
    return (sys.executable, __file__, *words)


def why_not() -> str:
    """Why that is not possible here; "" when it is. Blocks for a moment."""
    done = subprocess.run(command("true"), capture_output=True, text=True, timeout=60, check=False)
    return f"no mount namespace: {done.stderr.strip()}" if done.returncode else ""


def main() -> None:
    try:
        _enter()
    except OSError as error:
        sys.exit(f"{error}")
    os.execvp(sys.argv[1], sys.argv[1:])


def _enter() -> None:
    """Into a mount namespace, below the same root."""
    inside = None if _root_is_mounted() else os.open("/", os.O_PATH | os.O_CLOEXEC)
    if inside is not None:
        _leave_chroot(inside)
    libc = ctypes.CDLL(None, use_errno=True)
    _done(libc.unshare(_CLONE_NEWNS), "unshare")
    _done(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "make / private")
    if inside is not None:
        os.chroot(os.readlink(f"/proc/self/fd/{inside}"))
    os.chdir("/")


def _leave_chroot(root: int) -> None:
    """As chroot(2) says: what is above the root is out of reach only for whom it is below the root."""
    os.chroot("/proc")
    os.fchdir(root)
    while not os.path.samefile(".", ".."):
        os.chdir("..")
    os.chroot(".")


def _root_is_mounted() -> bool:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == "/" for line in mounts)


def _done(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
