# SPDX-License-Identifier: LGPL-2.1-or-later
"""A request acts once, in time, alone (S5, S6, S12): guests ask, and the daemon is killed meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig.fixtures import Attach
from tests.rig.guest import Guest, Job
from tests.rig.image import Image
from tests.rig.vm import Vm
from tests.system.site import Site, open_site

WAIT_S = 60
QUIT_S = 5
"""How long an `off` waits for a hung QEMU before it kills it: time for a second request."""

ASK = """
import json, os, time
from fence_vmchannel.messages import FenceAction
from vmchannel_guest.fencing import FencingClient
from vmchannel_guest.reach import GuestReach
with FencingClient(GuestReach()) as client:
    if {go!r}:
        client.ask(FenceAction.LIST, deadline=time.monotonic() + 60)
        print("ready", flush=True)
        while not os.path.exists({go!r}):
            time.sleep(0.05)
    answer = client.ask(FenceAction[{action!r}], {plug!r}, deadline=time.monotonic() + 60,
                        request_id=bytes.fromhex({request_id!r}))
print(json.dumps([answer.ok, answer.code.name, answer.reason, answer.operation]))
"""

RAW = """
import json, os, time
from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceGreeting, FenceRequest
from fence_vmchannel.messages import decode_message, encode_message
from fence_vmchannel.tlv import decode
from vmchannel_guest.reach import GuestReach
deadline = time.monotonic() + 60
line = GuestReach()(deadline=deadline)
said = decode(FenceGreeting, line.greeting)
request = FenceRequest(os.urandom(16), FenceAction.OFF, {plug!r}, {boot_id} or said.boot_id,
                       said.tick_ms - {age_ms}, 10_000)
line.send(encode_message(request), deadline=deadline)
while not isinstance(answer := decode_message(line.receive(deadline=deadline)), FenceAnswer):
    pass
print(json.dumps([answer.ok, answer.code.name, answer.reason, answer.operation]))
"""


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    """Two guests that ask, one VM without a guest that is fenced."""
    with open_site(shared_rig_dir, image, accel) as site:
        for word in ("db1", "db2"):
            site.vm(word)
        site.vm("db3", image=None, machine="none", ports=())
        site.group("db", *site.vms)
        site.config["fencing"] = {"quit_timeout": f"{QUIT_S}s"}
        site.serve()
        yield site


@pytest.fixture
async def db1(site: Site, attach: Attach) -> Guest:
    guest = await attach(site.vms[0])
    await site.until_connected(guest.vm)
    return guest


@pytest.fixture
async def db3(site: Site) -> AsyncIterator[Vm]:
    """The VM that is fenced; it runs, and has no start command."""
    vm = site.vms[2]
    if not vm.running:
        vm.start()
    await site.until_run_state(vm, "running")
    yield vm
    site.start.clear()
    if vm.running:
        vm.signal(signal.SIGCONT)


def new_id() -> str:
    return os.urandom(16).hex()


async def begin(guest: Guest, action: str, vm: Vm, *, request_id: str = "", go: str = "") -> Job:
    """Let a program in the guest ask for `action` with the fencing client."""
    source = ASK.format(action=action, plug=vm.spec.name, request_id=request_id or new_id(), go=go)
    return await guest.start_python(source, timeout_s=90)


async def answer_of(job: Job) -> tuple[bool, str, str, str]:
    """(ok, code, reason, operation) of what the program was answered."""
    done = (await job.wait(90)).check()
    ok, code, reason, operation = json.loads(done.stdout.splitlines()[-1])
    return ok, code, reason, operation


async def begun(site: Site, said: int, action: str, vm: Vm) -> None:
    """Wait until the daemon, which has said `said` characters before, has begun that action."""
    line = f"vm={vm.spec.uuid} name={vm.spec.name!r} action={action} "
    await site.until(lambda: line in site.daemon.log[said:], f"begin of {action}")


async def in_the_journal(site: Site, vm: Vm, before: int) -> None:
    """Wait until it is durable that an operation on the VM, after `before` others, has begun."""
    async with asyncio.timeout(WAIT_S):
        while len(found := await site.operations(vm)) <= before:
            await asyncio.sleep(0.05)
        path = f"ops/{found[before]['id']}"
        while not any(step["text"].startswith("phase: ") for step in (await site.ask(path))["steps"]):
            await asyncio.sleep(0.05)


async def assert_acted_once(site: Site, vm: Vm, before: list[dict[str, Any]]) -> dict[str, Any]:
    """Exactly one more operation on the VM is in the journal; return it."""
    new = (await site.operations(vm))[len(before) :]
    assert len(new) == 1, new
    return new[0]


async def test_s5_the_same_request_id_acts_once_and_gets_its_first_result(
    site: Site, db1: Guest, db3: Vm
) -> None:
    before, request_id = await site.operations(db3), new_id()
    first = await answer_of(await begin(db1, "OFF", db3, request_id=request_id))
    assert first[:2] == (True, "DONE"), first
    db3.start()
    await site.until_run_state(db3, "running")
    assert await answer_of(await begin(db1, "OFF", db3, request_id=request_id)) == first
    assert db3.running
    operation = await assert_acted_once(site, db3, before)
    assert operation["id"] == first[3]


async def test_s5_it_is_so_after_the_daemon_was_killed(site: Site, db1: Guest, db3: Vm) -> None:
    before, request_id = await site.operations(db3), new_id()
    first = await answer_of(await begin(db1, "OFF", db3, request_id=request_id))
    assert first[:2] == (True, "DONE"), first
    site.daemon.restart(signal.SIGKILL)
    db3.start()
    await site.until_run_state(db3, "running")
    assert await answer_of(await begin(db1, "OFF", db3, request_id=request_id)) == first
    assert db3.running
    await assert_acted_once(site, db3, before)


async def test_s5_a_request_survives_the_daemons_death_in_the_middle_of_its_operation(
    site: Site, db1: Guest, db3: Vm
) -> None:
    before, said = await site.operations(db3), len(site.daemon.log)
    db3.signal(signal.SIGSTOP)
    job = await begin(db1, "OFF", db3)
    await begun(site, said, "off", db3)
    await in_the_journal(site, db3, len(before))
    site.daemon.restart(signal.SIGKILL)
    ok, code, reason, operation = await answer_of(job)
    assert (ok, code, db3.running) == (True, "DONE", False), reason
    assert (await assert_acted_once(site, db3, before))["id"] == operation
    assert "taken up again after a restart" in site.daemon.log[said:]


async def test_s5_the_result_goes_to_no_other_requester(
    site: Site, db1: Guest, db3: Vm, attach: Attach
) -> None:
    request_id = new_id()
    assert (await answer_of(await begin(db1, "OFF", db3, request_id=request_id)))[0]
    db2 = await attach(site.vms[1])
    await site.until_connected(db2.vm)
    ok, code, reason, _ = await answer_of(await begin(db2, "OFF", db3, request_id=request_id))
    assert (ok, code) == (False, "BAD_REQUEST"), reason


@pytest.mark.parametrize(
    ("boot_id", "age_ms"),
    [("''", 11_000), ("'4f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11'", 0), ("''", -5_000)],
    ids=["past its deadline", "of another boot", "from the future"],
)
async def test_s6_a_stale_request_is_refused_and_nothing_acts(
    site: Site, db1: Guest, db3: Vm, boot_id: str, age_ms: int
) -> None:
    before = await site.operations(db3)
    source = RAW.format(plug=db3.spec.name, boot_id=boot_id, age_ms=age_ms)
    ok, code, reason, operation = await answer_of(await db1.start_python(source, timeout_s=90))
    assert (ok, code, operation) == (False, "STALE", ""), reason
    assert db3.running
    assert await site.operations(db3) == before


async def test_s12_the_same_action_joins_the_one_that_runs(site: Site, db1: Guest, db3: Vm) -> None:
    said = len(site.daemon.log)
    db3.signal(signal.SIGSTOP)
    job = await begin(db1, "OFF", db3)
    await begun(site, said, "off", db3)
    joined = await site.fence("off", db3)
    ok, code, reason, operation = await answer_of(job)
    assert (ok, code, db3.running) == (True, "DONE", False), reason
    assert (joined["ok"], joined["code"], joined["state"]) == (True, "done", "off"), joined
    assert joined["reason"].endswith(f"(joined op={operation})")
    assert site.daemon.log[said:].count(f"instance ended vm={db3.spec.uuid}") == 1
    assert site.daemon.log[said:].count("action=off requester=") == 1


async def test_s12_another_action_is_refused_while_one_runs(site: Site, db1: Guest, db3: Vm) -> None:
    said = len(site.daemon.log)
    db3.signal(signal.SIGSTOP)
    job = await begin(db1, "OFF", db3)
    await begun(site, said, "off", db3)
    for action in ("on", "reboot"):
        answer = await site.fence(action, db3)
        assert (answer["ok"], answer["code"]) == (False, "busy"), answer
        assert "busy op=" in answer["reason"]
        assert "off of this VM runs" in answer["reason"]
    ok, _, reason, operation = await answer_of(job)
    assert ok, reason
    assert f"busy op={operation}" in answer["reason"]


@pytest.mark.parametrize("action", ["on", "reboot"])
async def test_s12_off_takes_over_and_nothing_is_started_afterwards(
    site: Site, db1: Guest, db3: Vm, action: str
) -> None:
    site.restartable(db3, "/bin/true")  # it starts nothing, so that the first action goes on waiting
    await site.reload()
    if action == "on":
        assert (await site.fence("off", db3))["ok"]
    else:
        db3.signal(signal.SIGSTOP)
    said = len(site.daemon.log)
    job = await begin(db1, action.upper(), db3)
    await begun(site, said, action, db3)
    off = await site.fence("off", db3)
    assert (off["ok"], off["state"], db3.running) == (True, "off", False), off
    ok, code, reason, _ = await answer_of(job)
    assert (ok, code) == (False, "FAILED"), reason
    assert reason == f"taken over by off op={off['operation']}"
    assert await site.status(db3) == "off"


async def test_s12_a_request_is_void_when_an_operation_on_its_requester_came_after_it(
    site: Site, db1: Guest, db3: Vm
) -> None:
    job = await begin(db1, "OFF", db3, go="/run/go")
    async with asyncio.timeout(60):
        while "ready" not in (await job.peek()).stdout:
            await asyncio.sleep(0.05)
    answer = await site.fence("on", db1.vm)  # the operator's intent on the requester
    assert answer["ok"], answer
    await db1.sh("touch /run/go")
    ok, code, reason, _ = await answer_of(job)
    assert (ok, code, db3.running) == (False, "VOID", True), reason
    assert f"the requester is itself the target of op={answer['operation']}" in reason


async def test_s12_fencing_oneself_needs_the_groups_leave(site: Site, db1: Guest) -> None:
    ok, code, reason, _ = await answer_of(await begin(db1, "OFF", db1.vm))
    assert (ok, code, db1.vm.running) == (False, "REFUSED", True), reason
    assert "self: true" in reason
