# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real QEMU processes without a guest, and hypervisors that watch them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from tests.fakes import qmp_server
from tests.rig.unix_sockets import all_listening
from vmchannel_host.hypervisors import BeforeKill, Ended, HypervisorEvent, Seen
from vmchannel_host.hypervisors.follower import Timings
from vmchannel_host.hypervisors.host import HostHypervisor
from vmchannel_host.hypervisors.launch import Launcher
from vmchannel_host.hypervisors.process import EXECUTABLES, ProcessTable, read_boot_id, read_pid_namespace
from vmchannel_host.hypervisors.process_watch import ProcessWatch
from vmchannel_host.hypervisors.qmp import QmpSettings, QmpSockets
from vmchannel_host.hypervisors.qmp_monitor import Monitor
from vmchannel_host.model import HostName, Instance, InstanceEnded, Look, ProcessIdentity, VmUuid

QEMU = "/usr/bin/qemu-system-x86_64"
HOST = HostName("hv-test")
FAKE = "qemu-system-scripted"
QUICK = Timings(connect_s=1.0, command_s=1.0, poll_s=5.0, last_retry_s=0.5)


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Qemu:
    """One QEMU process and its sockets. It is killed by its pid at the end."""

    def __init__(self, vm_uuid: VmUuid, process: subprocess.Popen[bytes], socket_path: Path) -> None:
        self.vm_uuid = vm_uuid
        self.process = process
        self.socket = socket_path

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()

    def wait_ready(self) -> None:
        """Wait until QEMU has opened its images: it answers commands only then."""
        held = HeldMonitor(self)
        held.ask("qmp_capabilities")
        held.ask("query-status")
        held.close()

    def kill_without_reaping(self) -> None:
        """Leave a zombie behind, as a parent does that is busy."""
        self.process.kill()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Rig:
    """Starts QEMUs in one directory; everything is gone after `close`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._started: list[Qemu] = []
        self._sessions: list[int] = []
        self._names = 0

    def qemu(
        self,
        *arguments: str,
        vm_uuid: VmUuid | None = None,
        name: str = "vm1",
        machine: str = "q35",
        with_uuid: bool = True,
        socket_name: str | None = None,
    ) -> Qemu:
        """Start a QEMU with its QMP socket in our directory. It runs no guest: its firmware finds none."""
        vm_uuid = vm_uuid or VmUuid(str(uuid.uuid4()))
        self._names += 1
        path = self.directory / (socket_name or f"{self._names}.qmp")
        command = [QEMU, "-accel", "tcg", "-machine", machine, "-nodefaults", "-display", "none", "-m", "32"]
        command += ["-qmp", f"unix:{path},server=on,wait=off", "-name", name]
        command += ["-uuid", vm_uuid] if with_uuid else []
        return self._start([*command, *arguments], vm_uuid, path)

    def scripted(self, script: str, *, vm_uuid: VmUuid | None = None) -> Qemu:
        """Start a program that calls itself a QEMU and plays a script of `tests.fakes.qmp_server`."""
        program = self.directory / FAKE
        if not program.exists():
            shutil.copy(os.path.realpath(sys.executable), program)
        vm_uuid = vm_uuid or VmUuid(str(uuid.uuid4()))
        self._names += 1
        path = self.directory / f"{self._names}.qmp"
        command = [
            str(program),
            qmp_server.__file__,
            str(path),
            script,
            "-uuid",
            vm_uuid,
            "-name",
            "scripted",
        ]
        return self._start(command, vm_uuid, path)

    def background(self, code: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Run Python code that leaves a child behind; the child ends with the rig."""
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], start_new_session=True)
        process.wait(20)
        self._sessions.append(process.pid)
        return process

    def _start(self, command: list[str], vm_uuid: VmUuid, path: Path) -> Qemu:
        environment = {"PATH": "/usr/bin:/bin", "PYTHONHOME": sys.base_prefix}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=sys.stderr, cwd=self.directory, env=environment
        )
        started = Qemu(vm_uuid, process, path)
        self._started.append(started)
        deadline = time.monotonic() + 30
        ports = [Path(found) for word in command for found in re.findall(r"path=([^,]+),server=on", word)]
        while not all_listening([path, *ports]):  # QEMU opens them in no order of ours
            assert process.poll() is None, f"QEMU ended at once: {command}"
            assert time.monotonic() < deadline, "QEMU opened no monitor in 30 s"
            time.sleep(0.01)
        return started

    def close(self) -> None:
        for qemu in self._started:
            qemu.close()
        for session in self._sessions:
            os.killpg(session, signal.SIGKILL)


class Host:
    """A hypervisor under test, with what it has reported."""

    def __init__(self, hypervisor: HostHypervisor) -> None:
        self.hypervisor = hypervisor
        self.seen: list[HypervisorEvent] = []
        self._changed = asyncio.Event()

    async def collect(self) -> None:
        async for event in self.hypervisor.events():
            self.seen.append(event)
            self._changed.set()

    async def until(
        self, qemu: Qemu, wanted: Callable[[Instance], bool], *, timeout_s: float = 20.0
    ) -> Instance:
        """Wait until the newest state of a QEMU is the wanted one."""

        def found() -> Instance | None:
            states = [
                e.instance for e in self.seen if isinstance(e, Seen) and e.instance.identity.pid == qemu.pid
            ]
            return states[-1] if states and wanted(states[-1]) else None

        async with asyncio.timeout(timeout_s):
            while (instance := found()) is None:
                self._changed.clear()
                await self._changed.wait()
        return instance

    async def until_ended(self, qemu: Qemu, *, timeout_s: float = 20.0) -> InstanceEnded:
        """Wait until the end of a QEMU is reported."""
        async with asyncio.timeout(timeout_s):
            while True:
                for event in self.seen:
                    if isinstance(event, Ended) and event.evidence.identity.pid == qemu.pid:
                        return event.evidence
                self._changed.clear()
                await self._changed.wait()

    async def look(self, *, timeout_s: float = 10.0, vm: VmUuid | None = None) -> Look:
        return await self.hypervisor.look(timeout_s=timeout_s, vm=vm)

    async def off(
        self,
        identity: ProcessIdentity,
        *,
        quit_timeout_s: float = 5.0,
        timeout_s: float = 20.0,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        return await self.hypervisor.off(
            identity, quit_timeout_s=quit_timeout_s, timeout_s=timeout_s, before_kill=before_kill
        )


def of(look: Look, qemu: Qemu) -> list[Instance]:
    """The instances of that QEMU's VM: others may run on this machine."""
    return [instance for instance in look.instances if instance.vm_uuid == qemu.vm_uuid]


@asynccontextmanager
async def watching(
    directory: Path,
    *,
    sockets: str = "*.qmp",
    start: dict[str, tuple[str, ...]] | None = None,
    executables: tuple[str, ...] = EXECUTABLES,
    timings: Timings = QUICK,
    processes: ProcessTable | None = None,
) -> AsyncGenerator[Host, None]:
    """Run a hypervisor over the sockets of a directory."""
    host = make_host(
        directory,
        sockets=sockets,
        start=start,
        executables=executables,
        timings=timings,
        processes=processes,
    )
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(host.hypervisor.run(), name="hypervisor")
        collecting = tasks.create_task(host.collect(), name="collect")
        try:
            yield host
        finally:
            running.cancel()
            collecting.cancel()


def make_host(
    directory: Path,
    *,
    sockets: str = "*.qmp",
    start: dict[str, tuple[str, ...]] | None = None,
    executables: tuple[str, ...] = EXECUTABLES,
    timings: Timings = QUICK,
    processes: ProcessTable | None = None,
) -> Host:
    settings = QmpSettings(
        sockets=(str(directory / sockets),),
        ask_s=1.0,
        timings=timings,
    )
    processes = processes or ProcessTable(
        boot_id=read_boot_id(), pid_namespace=read_pid_namespace(), executables=executables
    )
    launcher = Launcher(start or {}, systemd=directory / "no-systemd", patience_s=1.0)
    watch = ProcessWatch(processes, host=HOST, clock=boottime)
    sources = (QmpSockets(settings, watch),)
    return Host(
        HostHypervisor(
            watch, sources, (launcher,), host=HOST, clock=boottime, ports=str(directory / "ports"), scan_s=0.2
        )
    )


async def command(monitor_path: Path, *commands: str) -> None:
    """Give commands through a second monitor."""
    monitor = await Monitor.connect(str(monitor_path), timeout_s=10)
    try:
        for one in commands:
            await monitor.execute(one, timeout_s=10)
    finally:
        await monitor.close()


async def migrate_away(monitor_path: Path, memory: Path) -> None:
    """Migrate a QEMU into a file through a second monitor; it is the source of a migration then."""
    monitor = await Monitor.connect(str(monitor_path), timeout_s=10)
    try:
        await monitor.execute("migrate", {"uri": f"exec:cat > '{memory}'"}, timeout_s=10)
        status: object = "setup"
        async with asyncio.timeout(30):
            while status not in ("completed", "failed"):
                await asyncio.sleep(0.02)
                info = await monitor.execute("query-migrate", timeout_s=10)
                assert isinstance(info, dict)
                status = cast(dict[str, object], info).get("status")
    finally:
        await monitor.close()
    assert status == "completed", f"migration {status}"


class SecondMonitor:
    """A monitor of a QEMU that the daemon does not look for; the test asks it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "mine"

    @property
    def arguments(self) -> tuple[str, ...]:
        """What QEMU is started with."""
        return ("-qmp", f"unix:{self.path},server=on,wait=off")

    async def ask(self, command_name: str, **arguments: object) -> Any:
        """Give one command; gives its `return`."""
        monitor = await Monitor.connect(str(self.path), timeout_s=20)
        try:
            return await monitor.execute(command_name, arguments or None, timeout_s=20)
        finally:
            await monitor.close()


class HeldMonitor:
    """Another client that holds a QMP monitor, as a management program does; it can give commands."""

    def __init__(self, qemu: Qemu) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(20)
        self._socket.connect(str(qemu.socket))
        self._file = self._socket.makefile("rb")

    def ask(self, command_name: str) -> None:
        """Give a command and wait for an answer."""
        self._socket.sendall(json.dumps({"execute": command_name}).encode())
        while b'"return"' not in self._file.readline():
            pass

    def close(self) -> None:
        self._file.close()
        self._socket.close()
