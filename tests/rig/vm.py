# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU processes of the rig: start them, look at them, and leave none behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.rig.kernel import RigError
from tests.rig.qemu import VmSpec, qemu_command
from tests.rig.unix_sockets import all_listening

_END_S = 20


class Vm:
    """One VM's processes: the first, which is our child, and those that its start script makes.

    Synchronous and bound to no event loop, so that a fixture of any scope may own it. Start it in the main
    thread: the kernel kills QEMU when the thread that started it ends, so a killed test run leaves nothing.
    """

    def __init__(self, spec: VmSpec) -> None:
        self.spec = spec
        self._reapers: list[threading.Thread] = []

    def start(self, *, timeout_s: float = 20) -> None:
        """Start QEMU and wait until it listens on all its sockets.

        Raises:
            RigError: it ended, or does not listen in time; the message carries what it said.
        """
        self.spec.folder.mkdir(parents=True, exist_ok=True)
        wanted = (*self.spec.sockets, self.spec.pid_file)
        for path in wanted:
            path.unlink(missing_ok=True)
        with self.spec.qemu_log.open("ab") as log:
            command = ["setpriv", "--pdeathsig", "KILL", "--", *qemu_command(self.spec)]
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        # A dead QEMU is reaped at once, as libvirt or init would do; a zombie would still have a /proc entry.
        reaper = threading.Thread(target=child.wait, name=f"reap-{self.spec.name}", daemon=True)
        reaper.start()
        self._reapers.append(reaper)
        deadline = time.monotonic() + timeout_s
        while not (self.spec.pid_file.exists() and all_listening(self.spec.sockets)):
            if not reaper.is_alive() or time.monotonic() > deadline:
                raise RigError(f"{self.spec.name} did not start: {self.spec.qemu_log.read_text()[-2000:]}")
            time.sleep(0.005)

    @property
    def pid(self) -> int:
        """Of the QEMU that was started last.

        Raises:
            RigError: none runs.
        """
        found = self.pids()
        if not found:
            raise RigError(f"{self.spec.name} does not run")
        return found[-1]

    def pids(self) -> list[int]:
        """QEMU of this VM, oldest first: living processes whose command line names our folder and UUID."""
        return sorted(find_processes(str(self.spec.pid_file), self.spec.uuid), key=_start_time)

    @property
    def running(self) -> bool:
        """Whether any process of this VM lives, hung and stopped ones too."""
        return bool(self.pids())

    def signal(self, number: int) -> None:
        """Send a signal to QEMU: SIGSTOP hangs it, SIGKILL crashes it."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Kill all processes of this VM and wait for their end.

        Raises:
            RigError: one does not end.
        """
        for pid in self.pids():
            end_process(pid)
        for reaper in self._reapers:
            reaper.join(_END_S)


def find_processes(*words: str) -> list[int]:
    """Processes that have all these words as parts of their command line. Zombies have none."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue  # it ended while we looked
            if all(word in line for word in words) and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def _start_time(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def end_process(pid: int, *, timeout_s: float = _END_S) -> None:
    """SIGKILL one process and wait for its end.

    Raises:
        RigError: it lives on.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if not select.select([pidfd], [], [], timeout_s)[0]:
            raise RigError(f"process {pid} does not end")
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def stop_all(folder: Path) -> None:
    """Kill every QEMU whose command line names `folder`, started by us or by a start script."""
    while found := find_processes("qemu-system", f"{folder}/"):
        for pid in found:
            end_process(pid)


@contextmanager
def running(*specs: VmSpec) -> Generator[list[Vm], None, None]:
    """Start VMs, and end all their processes however the block is left."""
    with ExitStack() as stack:
        vms = [Vm(spec) for spec in specs]
        for vm in vms:
            stack.callback(vm.stop)
            vm.start()
        yield vms
