# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start commands run outside the daemon, and a new instance is seen, not believed."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from pathlib import Path

import pytest

from tests.integration.hypervisors.qemu_rig import QEMU, Host, Rig, boottime, watching
from vmchannel_host.hypervisors import CannotStart, Seen
from vmchannel_host.hypervisors.launch import MAX_OUTPUT_BYTES, Launcher
from vmchannel_host.model import Instance, RunState, VmUuid

UUID = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")


def script(directory: Path, *lines: str, name: str = "start-vm") -> tuple[str, ...]:
    path = directory / name
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return (str(path),)


def launcher(directory: Path, command: tuple[str, ...], *, patience_s: float = 5.0) -> Launcher:
    return Launcher({"vm1": command}, systemd=directory / "none", patience_s=patience_s)


def runs(instance: Instance, vm_uuid: VmUuid) -> bool:
    return instance.vm_uuid == vm_uuid and instance.run_state is RunState.RUNNING


async def seen_running(host: Host, vm_uuid: VmUuid) -> Instance:
    async with asyncio.timeout(20):
        while True:
            for event in host.seen:
                if isinstance(event, Seen) and runs(event.instance, vm_uuid):
                    return event.instance
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("way", ["-daemonize", ""])
async def test_a_started_vm_is_seen_running_whether_it_daemonizes_or_not(rig: Rig, way: str) -> None:
    vm_uuid = VmUuid(str(uuid.uuid4()))
    qmp = f"unix:{rig.directory}/started.qmp,server=on,wait=off"
    machine = "-accel tcg -machine q35 -nodefaults -display none -m 32"
    command = script(rig.directory, f"exec {QEMU} {machine} -uuid {vm_uuid} -name vm1 -qmp {qmp} {way}")
    async with watching(rig.directory, start={"vm1": command}) as host:
        assert host.hypervisor.can_start(vm_uuid, "vm1")
        await host.hypervisor.start(vm_uuid, "vm1", timeout_s=10)
        instance = await seen_running(host, vm_uuid)
        assert os.getsid(instance.identity.pid) != os.getsid(0)
        await host.off(instance.identity)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_vm_without_a_command_cannot_be_started(rig: Rig) -> None:
    start = launcher(rig.directory, ("/bin/true",))
    assert not start.can_start(UUID, "other")
    with pytest.raises(CannotStart, match="no start command"):
        await start.start(UUID, "other", timeout_s=5)


async def test_a_uuid_decides_over_a_name() -> None:
    start = Launcher({UUID.upper(): ("/bin/false",), "vm1": ("/bin/true",)}, systemd=Path("/none"))
    with pytest.raises(CannotStart, match="exit status 1"):
        await start.start(UUID, "vm1", timeout_s=5)


async def test_a_vm_without_a_name_is_not_started_by_an_empty_key() -> None:
    assert not Launcher({"": ("/bin/true",)}, systemd=Path("/none")).can_start(UUID, "")


async def test_a_failing_command_is_reported_with_its_last_line(rig: Rig) -> None:
    command = script(rig.directory, "echo first", "echo 'no such disk' >&2", "exit 3")
    with pytest.raises(CannotStart, match=r"exit status 3: 'no such disk'"):
        await launcher(rig.directory, command).start(UUID, "vm1", timeout_s=5)


async def test_a_silent_failure_a_signal_and_a_missing_program_are_told_apart(rig: Rig) -> None:
    for line, words in (("exit 1", "it said nothing"), ("kill -9 $$", "signal 9")):
        with pytest.raises(CannotStart, match=words):
            await launcher(rig.directory, script(rig.directory, line)).start(UUID, "vm1", timeout_s=5)
    with pytest.raises(CannotStart, match="cannot run"):
        await launcher(rig.directory, ("/no/such/program",)).start(UUID, "vm1", timeout_s=5)


async def test_a_command_is_not_given_to_a_shell(rig: Rig) -> None:
    command = (*script(rig.directory, 'printf %s "$1" > "$0.argument"'), "$(touch /x); a 'b'")
    await launcher(rig.directory, command).start(UUID, "vm1", timeout_s=5)
    assert (rig.directory / "start-vm.argument").read_text() == "$(touch /x); a 'b'"


async def test_a_chatty_command_is_bounded_and_goes_on(rig: Rig) -> None:
    command = script(
        rig.directory,
        "trap '' PIPE",
        f"head -c {4 * MAX_OUTPUT_BYTES} /dev/zero | tr '\\0' x",
        'touch "$0.done"',
        "exit 0",
    )
    await launcher(rig.directory, command).start(UUID, "vm1", timeout_s=10)
    assert (rig.directory / "start-vm.done").exists()


async def test_a_command_that_goes_on_running_is_left_alone_and_reaped_later(rig: Rig) -> None:
    command = script(rig.directory, 'echo $$ > "$0.pid"', "exec sleep 60")
    began = boottime()
    await launcher(rig.directory, command, patience_s=0.5).start(UUID, "vm1", timeout_s=30)
    assert boottime() - began < 20
    pid = int((rig.directory / "start-vm.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    async with asyncio.timeout(10):
        while exists(pid):
            await asyncio.sleep(0.02)


async def test_signals_that_python_ignores_reach_the_command(rig: Rig) -> None:
    command = script(rig.directory, "grep -E 'SigIgn|SigBlk' /proc/self/status > \"$0.signals\"")
    await launcher(rig.directory, command).start(UUID, "vm1", timeout_s=5)
    text = (rig.directory / "start-vm.signals").read_text().split()
    blocked, ignored = int(text[1], 16), int(text[3], 16)
    assert blocked == 0
    assert ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0


async def test_where_systemd_runs_the_command_becomes_a_unit_of_its_own(rig: Rig) -> None:
    (rig.directory / "systemd").mkdir()
    wrapper = script(rig.directory, 'echo "$@" > "$0.arguments"', name="systemd-run")
    start = Launcher(
        {"vm1": ("/usr/local/sbin/start-vm", "vm1")},
        systemd=rig.directory / "systemd",
        systemd_run=(*wrapper, "--collect", "--quiet", "--"),
    )
    await start.start(UUID, "vm1", timeout_s=5)
    arguments = (rig.directory / "systemd-run.arguments").read_text()
    assert arguments == "--collect --quiet -- /usr/local/sbin/start-vm vm1\n"
