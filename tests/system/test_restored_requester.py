# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest whose memory goes back (`loadvm`) is another requester (S5): earlier results are not for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import Attach
from tests.rig.guest import Guest, qmp_client
from tests.rig.image import Image
from tests.rig.vm import Vm
from tests.system.site import Site, open_site

ASK = """
import json, time
from fence_vmchannel.messages import FenceAction
from vmchannel_guest.fencing import FencingClient
from vmchannel_guest.reach import GuestReach
with FencingClient(GuestReach()) as client:
    answer = client.ask(FenceAction.OFF, {plug!r}, deadline=time.monotonic() + 50,
                        request_id=bytes.fromhex({request_id!r}))
print(json.dumps([answer.ok, answer.code.name, answer.reason, answer.operation]))
"""

SNAPSHOT = "before-the-request"


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    """A guest that asks, with a disk for its snapshots, and a VM without a guest that is fenced."""
    with open_site(shared_rig_dir, image, accel) as site:
        disk = shared_rig_dir / "snapshots.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1G"], check=True)
        site.vm("db1", extra=("-drive", f"file={disk},if=none,id=snapshots,format=qcow2"))
        site.vm("db2", image=None, machine="none", ports=())
        site.group("db", *site.vms)
        site.config["fencing"] = {"quit_timeout": "3s"}
        site.serve()
        yield site


@pytest.fixture
async def asker(site: Site, attach: Attach) -> Guest:
    """The guest that asks, with a snapshot of it as it was before."""
    guest = await attach(site.vms[0])
    await site.until_connected(guest.vm)
    await human(guest.vm, f"savevm {SNAPSHOT}")
    return guest


@pytest.fixture
async def target(site: Site) -> Vm:
    """The VM that is fenced; it runs."""
    vm = site.vms[1]
    if not vm.running:
        vm.start()
    await site.until_run_state(vm, "running")
    return vm


async def human(vm: Vm, line: str) -> None:
    """A command of QEMU's human monitor; what it prints is an error."""
    async with qmp_client(vm.spec) as monitor:
        said = await monitor.execute("human-monitor-command", {"command-line": line})
        assert said == "", said


async def ask(guest: Guest, vm: Vm, request_id: str) -> tuple[bool, str, str, str]:
    """(ok, code, reason, operation) of an `off` that the fencing client asks for in the guest."""
    source = ASK.format(plug=vm.spec.name, request_id=request_id)
    done = (await (await guest.start_python(source, timeout_s=90)).wait(90)).check()
    ok, code, reason, operation = json.loads(done.stdout.splitlines()[-1])
    return ok, code, reason, operation


async def test_s5_a_restored_guest_gets_no_result_of_the_request_it_had_made(
    site: Site, asker: Guest, target: Vm
) -> None:
    request_id = os.urandom(16).hex()
    first = await ask(asker, target, request_id)
    assert first[:2] == (True, "DONE"), first
    assert await ask(asker, target, request_id) == first
    target.start()
    await site.until_run_state(target, "running")
    await human(asker.vm, f"loadvm {SNAPSHOT}")
    ok, code, reason, _ = await ask(asker, target, request_id)
    assert (ok, code, target.running) == (False, "BAD_REQUEST", True), reason
    assert (await ask(asker, target, os.urandom(16).hex()))[:2] == (True, "DONE")


async def test_s5_a_guest_restored_while_its_request_runs_is_told_of_the_reset_and_nothing_old(
    site: Site, asker: Guest, target: Vm
) -> None:
    said, before, request_id = len(site.daemon.log), await site.operations(target), os.urandom(16).hex()
    target.signal(signal.SIGSTOP)
    await asker.start_python(ASK.format(plug=target.spec.name, request_id=request_id), timeout_s=90)
    line = f"vm={target.spec.uuid} name={target.spec.name!r} action=off "
    await site.until(lambda: line in site.daemon.log[said:], "begin of the off")
    await human(asker.vm, f"loadvm {SNAPSHOT}")
    ok, code, reason, _ = await ask(asker, target, request_id)
    assert (ok, code) == (False, "BAD_REQUEST"), reason
    await site.until(lambda: not target.running, "end of the off that was an intent")
    assert len(await site.operations(target)) == len(before) + 1
    assert "session reset" in site.daemon.log[said:]
