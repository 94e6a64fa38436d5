# SPDX-License-Identifier: LGPL-2.1-or-later
"""A /proc of which parts are made up: real processes, and some whose command line blocks its reader."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.hypervisors.qemu_rig import Qemu
from vmchannel_host.hypervisors.process import ProcessTable, read_boot_id, read_pid_namespace

_AS_THEY_ARE = ("stat", "fd", "fdinfo", "net", "task", "mountinfo", "status", "ns")
_LINKS = ("exe", "cwd")


class MadeUpProc:
    """Shows process 1 and the QEMUs that a test adds; of some the command line blocks."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._hung: dict[int, Path] = {}
        root.mkdir()
        (root / "1").symlink_to("/proc/1")

    def table(self) -> ProcessTable:
        return ProcessTable(boot_id=read_boot_id(), pid_namespace=read_pid_namespace(), proc=self._root)

    def show(self, qemu: Qemu) -> None:
        """It is a process like any other."""
        (self._root / str(qemu.pid)).symlink_to(f"/proc/{qemu.pid}")

    def hide(self, qemu: Qemu) -> None:
        """It has been reaped."""
        (self._root / str(qemu.pid)).unlink()

    def hang(self, qemu: Qemu) -> None:
        """Its memory map is held: whoever reads its command line waits. All else is what the kernel shows."""
        made = self._root / f"{qemu.pid}.new"
        made.mkdir()
        for name in _AS_THEY_ARE:
            (made / name).symlink_to(f"/proc/{qemu.pid}/{name}")
        for name in _LINKS:
            (made / name).symlink_to(os.readlink(f"/proc/{qemu.pid}/{name}"))
        os.mkfifo(made / "cmdline")
        made.rename(self._root / str(qemu.pid))
        self._hung[qemu.pid] = self._root / str(qemu.pid)

    def wake(self, qemu: Qemu) -> None:
        """Its memory map is free again."""
        self._wake(qemu.pid)

    def close(self) -> None:
        for pid in list(self._hung):
            self._wake(pid)

    def _wake(self, pid: int) -> None:
        made = self._hung.pop(pid)
        fifo = made.with_name(f"{pid}.fifo")
        (made / "cmdline").rename(fifo)
        (made / "cmdline").symlink_to(f"/proc/{pid}/cmdline")
        try:
            writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return  # nobody reads
        try:
            os.write(writer, Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:
            pass  # it has ended
        finally:
            os.close(writer)


@contextmanager
def made_up_proc(directory: Path) -> Generator[MadeUpProc]:
    """One below a directory; all that blocks is let go at the end."""
    proc = MadeUpProc(directory / "proc")
    try:
        yield proc
    finally:
        proc.close()
        shutil.rmtree(directory / "proc")
