# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon in another pid namespace than the one that recorded a process knows nothing of its end (S1)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig.fixtures import shared_rig_dir
from tests.rig.programs import environment, program
from tests.rig.qemu import new_uuid
from tests.rig.vm import Vm
from tests.system.site import Site, open_site

__all__ = ["shared_rig_dir"]

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def _may_unshare() -> bool:
    done = subprocess.run([*UNSHARE, "true"], check=False, capture_output=True)
    return os.geteuid() == 0 and done.returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _may_unshare(), reason="needs root to make a pid namespace"),
]


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir) as site:
        site.serve()
        yield site


@contextmanager
def daemon_in_a_namespace(site: Site) -> Generator[Path]:
    """Instead of the site's daemon one runs in a pid namespace of its own, with its files. Gives its log."""
    site.daemon.end()
    path = site.folder / "namespace.log"
    command = program("vmchanneld", "--config", str(site.config_file))
    with path.open("wb") as log:
        other = subprocess.Popen(
            [*UNSHARE, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
        )
    try:
        yield path
    finally:
        child = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text()
        os.kill(int(child), signal.SIGTERM)  # the first process of the namespace: the daemon itself
        other.wait(30)
        site.daemon.start()


async def served(log: Path) -> None:
    async with asyncio.timeout(60):
        while "ready host=" not in log.read_text():
            await asyncio.sleep(0.05)


async def assert_not_claimed(site: Site, vm: Vm, reason: str) -> None:
    assert await site.status(vm) == "unknown"
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["state"]) == (False, "unknown"), answer
    assert reason in answer["reason"], (answer["reason"], answer["evidence"])


async def test_s1_a_vm_that_only_the_other_namespace_shows_is_not_called_off(site: Site) -> None:
    vm = site.vm("hidden")
    await site.until_run_state(vm, "running")
    with daemon_in_a_namespace(site) as log:
        await served(log)
        await assert_not_claimed(site, vm, "outside this daemon's pid namespace")
        vm.spec.qmp.unlink()  # no monitor tells of it any more
        await assert_not_claimed(site, vm, "run it in the host's pid namespace")
        assert "not in the host's" in log.read_text()
        assert vm.running
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"], vm.running) == (True, "done", False), answer


async def test_s1_a_vm_that_ended_meanwhile_is_off_only_where_its_pid_means_something(site: Site) -> None:
    vm = site.vm("ended")
    await site.until_run_state(vm, "running")
    with daemon_in_a_namespace(site) as log:
        await served(log)
        vm.stop()
        await assert_not_claimed(site, vm, "pid namespace")  # of its monitor, as long as that is remembered
    assert await site.status(vm) == "off"


INSIDE = """
import subprocess, sys
from vmchannel_host.hypervisors.process import HOST_PID_NAMESPACE, ProcessTable
from vmchannel_host.hypervisors.process import read_boot_id, read_pid_namespace
namespace = read_pid_namespace()
assert namespace != HOST_PID_NAMESPACE
table = ProcessTable(boot_id=read_boot_id(), pid_namespace=namespace)
qemu = subprocess.Popen(["qemu-system-x86_64", "-machine", "none", "-display", "none", "-uuid", sys.argv[1]])
while not (candidates := table.sieve(frozenset()).candidates):
    pass
process = table.open(candidates[0].pid)
assert process.identity.vm_uuid == sys.argv[1]
assert table.absence(process.identity) is None
process.kill()
qemu.wait()
print(process.ended(), table.absence(process.identity))
"""


async def test_a_namespace_that_holds_daemon_and_vm_is_a_host_of_its_own() -> None:
    """As in a container in which somebody tries things."""
    command = [*UNSHARE, sys.executable, "-c", INSIDE, new_uuid()]
    done = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment())
    async with asyncio.timeout(60):
        out, _ = await done.communicate()
    assert out.decode().split() == ["True", "EndProof.ABSENT"]
