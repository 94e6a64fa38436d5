# SPDX-License-Identifier: LGPL-2.1-or-later
"""A block device to which a process's writes take seconds: a loop device, throttled for a cgroup of its own.

What is written is seen in the file behind it only when it has landed. Needs root, loop devices and the blkio
controller of cgroup v1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

BYTES_PER_S = 8192
_BLKIO = Path("/sys/fs/cgroup/blkio")
_SIZE = 1 << 20


def why_not() -> str:
    """Why this machine has no such device; "" when it has."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("losetup") is None or not Path("/dev/loop-control").exists():
        return "needs loop devices"
    if not (_BLKIO / "blkio.throttle.write_bps_device").exists():
        return "needs the blkio controller of cgroup v1, throttling included"
    return ""


class SlowDisk:
    """One such device."""

    def __init__(self, device: str, file: Path, group: Path) -> None:
        self.device = device
        self._file = file
        self._group = group

    def slow_down(self, pid: int) -> None:
        """From now on the writes of that process take their time."""
        (self._group / "cgroup.procs").write_text(f"{pid}\n")

    def count(self, byte: int) -> int:
        """How often the byte has landed on the disk."""
        return self._file.read_bytes().count(bytes([byte]))

    def wipe(self) -> None:
        """Make it blank again. Nobody has it open."""
        with self._file.open("r+b") as file:
            file.write(bytes(_SIZE))


@contextmanager
def slow_disk(folder: Path) -> Generator[SlowDisk]:
    """Make one; whoever uses it has ended when this is left."""
    file = folder / "slow.img"
    file.touch()
    os.truncate(file, _SIZE)
    made = subprocess.run(["losetup", "-f", "--show", str(file)], check=True, capture_output=True, text=True)
    device = made.stdout.strip()
    group = _BLKIO / f"vmchannel-test-{os.getpid()}-{Path(device).name}"
    try:
        group.mkdir()
        number = os.stat(device).st_rdev
        rate = f"{os.major(number)}:{os.minor(number)} {BYTES_PER_S}"
        (group / "blkio.throttle.write_bps_device").write_text(rate)
        yield SlowDisk(device, file, group)
    finally:
        if group.exists():
            group.rmdir()
        subprocess.run(["losetup", "-d", device], check=True)
        file.unlink()
