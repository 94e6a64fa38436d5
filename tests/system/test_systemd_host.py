# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchanneld under a real systemd, which a guest has, with the unit that we ship."""

from __future__ import annotations

import pytest

from tests.rig.fixtures import Attach, BootShared
from tests.rig.guest import Guest
from tests.rig.image import Image
from tests.rig.vm import Vm
from tests.system.channel_rig import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

UNIT = "vmchanneld.service"
CONFIG = "/etc/vmchannel/host.yaml"
PATIENT = "/etc/systemd/system/vmchanneld.service.d/patient.conf"
START_S = 300  # under TCG on a busy machine the start alone takes over a minute; the unit allows 90 s


@pytest.fixture(scope="module")
def vm(boot_shared: BootShared, debian: Image) -> Vm:
    return boot_shared("host", image=debian, ports=(), memory_mib=512, kernel_line="rig_start=systemd")


@pytest.fixture
async def machine(vm: Vm, attach: Attach) -> Guest:
    """The machine as a package would leave it, but for the start."""
    machine = await attach(vm)
    if (await machine.run("test", "-e", PATIENT)).code != 0:
        (await machine.run("systemd-sysusers")).check()
        await machine.push(PATIENT, f"[Service]\nTimeoutStartSec={START_S}\n".encode())
        (await machine.run("systemctl", "daemon-reload")).check()
    return machine


@pytest.fixture
async def serving(machine: Guest) -> Guest:
    """The machine with its daemon started."""
    (await machine.run("systemctl", "start", UNIT, timeout_s=START_S)).check()
    return machine


async def prop(machine: Guest, name: str) -> str:
    return (
        (await machine.run("systemctl", "show", "--value", f"--property={name}", UNIT)).check().stdout.strip()
    )


async def log(machine: Guest) -> str:
    return (await machine.run("journalctl", "--unit", UNIT, "--no-pager", "--output=cat")).check().stdout


async def test_it_is_ready_when_its_start_returns_and_its_hardening_leaves_it_what_it_needs(
    serving: Guest,
) -> None:
    assert await prop(serving, "ActiveState") == "active"
    status = await serving.run("vmchannelctl", "status")
    assert "Traceback" not in status.stderr
    assert status.code == 0, status
    sockets = (await serving.run("stat", "-c", "%n %a %G", "/run/vmchannel/admin.sock")).check().stdout
    assert sockets.split() == ["/run/vmchannel/admin.sock", "660", "vmchannel"]
    (await serving.run("vmchannelctl", "verify-journal")).check()
    assert "Operation not permitted" not in await log(serving)


async def test_reload_reads_the_configuration_again_and_keeps_the_process(serving: Guest) -> None:
    pid = await prop(serving, "MainPID")
    (await serving.run("systemctl", "reload", UNIT)).check()

    async def read() -> bool:
        return "configuration read again" in await log(serving)

    await until(read, "configuration read again")
    assert (await prop(serving, "MainPID"), await prop(serving, "ActiveState")) == (pid, "active")


async def test_a_daemon_that_hangs_is_killed_by_the_watchdog_and_begun_again(serving: Guest) -> None:
    pid = await prop(serving, "MainPID")
    await serving.run("systemctl", "kill", "--signal=STOP", "--kill-whom=main", UNIT)

    async def another() -> bool:
        return await prop(serving, "ActiveState") == "active" and await prop(serving, "MainPID") != pid

    await until(another, "second daemon", timeout_s=60 + START_S)
    assert "Watchdog timeout" in await log(serving)
    assert (await serving.run("vmchannelctl", "status")).code == 0


async def test_a_stop_is_clean(serving: Guest) -> None:
    (await serving.run("systemctl", "stop", UNIT, timeout_s=120)).check()
    assert (await prop(serving, "Result"), await prop(serving, "ExecMainStatus")) == ("success", "0")


async def test_a_wrong_configuration_fails_once_and_says_where(machine: Guest) -> None:
    (await machine.run("systemctl", "stop", UNIT, timeout_s=120)).check()
    right = await machine.pull(CONFIG)
    await machine.push(CONFIG, right + b"\nnonsense: 1\n")
    try:
        assert (await machine.run("systemctl", "start", UNIT, timeout_s=START_S)).code == 1
        assert (await prop(machine, "ExecMainStatus"), await prop(machine, "NRestarts")) == ("2", "0")
        assert f"{CONFIG}:{len(right.splitlines()) + 2}" in await log(machine)
    finally:
        await machine.push(CONFIG, right)
        await machine.run("systemctl", "reset-failed", UNIT)
