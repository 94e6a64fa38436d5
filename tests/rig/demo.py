# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make demo`: three real guests without a network card; one fences another through its host, with proof.

It stands in the rig because the rig is what builds and drives guests. Everything it makes lies in one
temporary folder. It ends with exit code 0 when each step went as it should.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.rig.accel import accelerator
from tests.rig.guest import Guest
from tests.rig.image import Image, build_image, default_cache, require_tools
from tests.rig.kernel import RigError
from tests.rig.narrate import Narrator, terminal_narrator
from tests.rig.programs import daemon, run_program
from tests.rig.qemu import VmSpec, write_start_script
from tests.rig.vm import find_processes, running, stop_all

AGENT_S = 60  # the agent's own deadline is 40 s

_UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
_LOG_PREFIX = re.compile(r"^\S+ (?:info )?(?:\w+\.)?(?=\w)")  # time, usual level, package: known here

_CONFIG = """\
host: demo-host
hypervisors:
  - type: qmp
    sockets: {folder}/vm*/qmp.sock
    start:
{start}
policy:
  groups:
    demo: {{members: [{members}], actions: [off, on, reboot, status, list]}}
cluster: {{bus: local, standalone: true}}
paths: {{state: {folder}/state, run: {folder}/run}}
"""


@dataclass(slots=True)
class Stage:
    """What the scenes of the demo share."""

    folder: Path
    say: Narrator
    guests: list[Guest] = field(default_factory=list[Guest])
    failures: int = 0

    @property
    def admin(self) -> str:
        return str(self.folder / "run" / "admin.sock")

    def expect(self, right: bool, text: str) -> None:
        """Tell whether something is as it should be."""
        if right:
            self.say.good(text)
        else:
            self.failures += 1
            self.say.bad(text)


async def play(stage: Stage) -> None:
    """The whole demo; raises `RigError` when it cannot go on."""
    say = stage.say
    say.title("fence-vmchannel: fencing over a virtio-serial port, with proof")
    image = build_image(default_cache(), stage.folder)
    wanted = os.environ.get("VMCHANNEL_ACCEL", "auto")
    accel = accelerator(default_cache(), image, wanted=wanted)
    say.tell(
        f"guest image: Debian's kernel and Python, {image.initrd.stat().st_size >> 20} MiB, under {accel}"
    )
    specs = [_spec(stage.folder, number, image, accel) for number in (1, 2, 3)]
    config = _write_config(stage.folder, specs)
    with running(*specs) as vms:
        pids = ", ".join(f"{vm.spec.name} (pid {vm.pid})" for vm in vms)
        say.tell(f"three guests boot, -nic none, one port each: {pids}")
        stage.guests = [Guest(vm) for vm in vms]
        say.command("host", f"vmchanneld --config {config}")
        on_line = _host_lines(say, {spec.uuid: spec.name for spec in specs})
        async with daemon("vmchanneld", "--config", str(config), on_line=on_line) as vmchanneld:
            try:
                await vmchanneld.wait_for(Path(stage.admin))
                await _scenes(stage)
            finally:
                for guest in stage.guests:
                    await guest.disconnect()


def _spec(folder: Path, number: int, image: Image, accel: str) -> VmSpec:
    home = folder / f"vm{number}"
    return VmSpec(f"vm{number}", home, image=image, accel=accel, guestd=True, hostname=f"node{number}")


def _write_config(folder: Path, specs: list[VmSpec]) -> Path:
    lines: list[str] = []
    for spec in specs:
        spec.folder.mkdir()
        lines.append(f"      {spec.uuid}: [{write_start_script(spec)}]")
    path = folder / "host.yaml"
    # UUIDs: the host sees every QEMU of this machine, and another run may call its VMs vm1 too
    members = ", ".join(spec.uuid for spec in specs)
    path.write_text(_CONFIG.format(folder=folder, start="\n".join(lines), members=members))
    return path


def _host_lines(say: Narrator, names: Mapping[str, str]) -> Callable[[str], None]:
    """Show the daemon's log: shortened, UUIDs as names, and nothing of other VMs of this machine."""

    def tell(line: str) -> None:
        for uuid, name in names.items():
            line = line.replace(uuid, name)
        if not _UUID.search(line):
            say.host(_LOG_PREFIX.sub("", line))

    return tell


async def _scenes(stage: Stage) -> None:
    first, second, _ = stage.guests
    for guest in stage.guests:
        await guest.wait_ready()
        stage.say.tell(f"{guest.spec.name} is up: kernel and Python answered as {guest.spec.hostname}")
    await _wait_for_hubs(stage)
    cards = await first.sh("ls /sys/class/net")
    stage.expect(cards.stdout.split() == ["lo"], "vm1 has no network card: its only interface is lo")

    listed = await agent(stage, "list", "", code=0)
    stage.expect("vm2" in listed or "node2" in listed, "the host names what this guest may fence")
    await agent(stage, "status", "node2", code=0)
    await _off(stage, second)
    await agent(stage, "status", "node2", code=2)
    await _on(stage, second)
    await _reboot(stage, second)
    await _journal(stage)


async def _wait_for_hubs(stage: Stage) -> None:
    """Wait until each guest's hub has met the host, so that node names are known."""
    for guest in stage.guests:
        seen = await guest.run("vmchannel", "status")
        for _ in range(60):
            if seen.code == 0:
                break
            await asyncio.sleep(0.5)
            seen = await guest.run("vmchannel", "status")
        else:
            raise RigError(f"{guest.spec.name}: no session with the host: {seen.stdout} {seen.stderr}")
    stage.say.tell("each guest's hub has a session with the host")


async def agent(stage: Stage, action: str, plug: str, *, code: int) -> str:
    """Run the fence agent in the first guest; give all that it wrote."""
    options = [f"--action={action}", *([f"--plug={plug}"] if plug else [])]
    stage.say.command("node1", " ".join(["fence_vmchannel", *options]))
    began_s = stage.say.elapsed_s
    done = await stage.guests[0].run("fence_vmchannel", *options, timeout_s=AGENT_S)
    stage.say.output(done.stdout)
    stage.say.output(done.stderr)
    took_s = stage.say.elapsed_s - began_s
    stage.expect(done.code == code, f"{action}: exit code {done.code}, {took_s:.1f} s")
    return done.stdout + done.stderr


async def _off(stage: Stage, target: Guest) -> None:
    pid = target.vm.pid
    with _watched(pid) as ended:
        said = await agent(stage, "off", "node2", code=0)
        stage.expect(ended(), f"QEMU of vm2 (pid {pid}) has ended: the demo's own pidfd says so too")
    await _evidence(stage, said)


async def _on(stage: Stage, target: Guest) -> None:
    await agent(stage, "on", "node2", code=0)
    stage.expect(target.vm.running, "vm2 has a new process")
    if target.vm.running:
        await target.wait_ready()
        stage.expect(True, f"vm2 (pid {target.vm.pid}) has booted again")


async def _reboot(stage: Stage, target: Guest) -> None:
    before = await target.boot_id()
    said = await agent(stage, "reboot", "node2", code=0)
    await target.wait_ready()
    after = await target.boot_id()
    stage.expect(before != after, "vm2 runs another boot of its kernel: its boot id has changed")
    await _evidence(stage, said)


async def _evidence(stage: Stage, said: str) -> None:
    operation = re.search(r"\bop=(\w\S*)", said)
    await _ctl(stage, "ops", *([operation[1]] if operation else []))


async def _journal(stage: Stage) -> None:
    await _ctl(stage, "ops")
    await _ctl(stage, "verify-journal")


async def _ctl(stage: Stage, *arguments: str) -> None:
    stage.say.command("host", " ".join(["vmchannelctl", *arguments]))
    done = await run_program("vmchannelctl", "--socket", stage.admin, *arguments)
    stage.say.output(done.stdout)
    stage.say.output(done.stderr)
    stage.expect(done.code == 0, f"{arguments[0]}: exit code {done.code}")


class _Ended:
    """Whether a process has ended, by a pidfd that was opened while it ran."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd

    def __call__(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])


@contextmanager
def _watched(pid: int) -> Generator[_Ended, None, None]:
    pidfd = os.pidfd_open(pid)
    try:
        yield _Ended(pidfd)
    finally:
        os.close(pidfd)


async def _main(say: Narrator) -> int:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with ExitStack() as clean:
        stage = Stage(Path(tempfile.mkdtemp(prefix="vmc-demo-", dir="/tmp")), say)
        clean.callback(_clear, stage)
        try:
            await play(stage)
        except RigError as error:
            stage.expect(False, "cannot go on")
            say.output(str(error))
    return 1 if stage.failures else 0


def _clear(stage: Stage) -> None:
    """End whatever still runs, remove the folder, and say so."""
    stop_all(stage.folder)
    shutil.rmtree(stage.folder)
    stage.say.title("cleaning up")
    left = find_processes(f"{stage.folder}/")
    stage.expect(not left, f"processes left: {left or 'none'}; files left: none")


def main() -> int:
    """Run the demo. Exit codes: 0 all went well, 1 something did not, 130 interrupted."""
    say = terminal_narrator()
    try:
        require_tools()
        code = asyncio.run(_main(say))
    except RigError as error:
        say.bad(str(error))
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        say.bad("interrupted")
        return 130
    say.title(f"{'done' if code == 0 else 'FAILED'} in {say.elapsed_s:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
