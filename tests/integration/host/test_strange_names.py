# SPDX-License-Identifier: LGPL-2.1-or-later
"""VM names with all that a shell, a path, a log or QEMU's options could trip over (S9: names are data)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fence_vmchannel.messages import MAX_PLUG
from tests.rig.fixtures import shared_rig_dir
from tests.rig.vm import Vm
from tests.system.site import Site, open_site

__all__ = ["shared_rig_dir"]

NAMES = {
    "comma": "vm,1,process=x",
    "newline": "vm\n2\x1b[2J\r",
    "slashes": "../../etc/vm/3",
    "300 characters": "x" * 300,
    "umlaut and quotes": "münchen \"'`$(id)",
    "dashes": "--help",
    "braces": "%s{}%n",
}


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir) as site:
        site.serve()
        yield site


@pytest.fixture(scope="module")
def neighbour(site: Site) -> Vm:
    return site.vm("neighbour")


@pytest.mark.parametrize("word", NAMES.values(), ids=NAMES.keys())
async def test_a_vm_of_any_name_is_seen_fenced_and_recorded(site: Site, neighbour: Vm, word: str) -> None:
    before = sorted(path.name for path in site.folder.iterdir())
    said = len(site.daemon.log)
    vm = site.vm(word)
    name, uuid = vm.spec.name, vm.spec.uuid
    await site.until_run_state(vm, "running")
    (seen,) = [one for one in await site.ask("vms") if one["uuid"] == uuid]
    assert seen["name"] == name
    plug = name if len(name) <= MAX_PLUG else uuid
    answer = await site.fence("off", plug) if not plug.startswith("-") else await site.fence("off", uuid)
    assert (answer["ok"], answer["state"], answer["vm_uuid"]) == (True, "off", uuid), answer
    assert not vm.running
    assert len(await site.operations(vm)) == 1
    listed = await site.ctl("vms")
    assert listed.code == 0
    assert all(line.isprintable() for line in listed.stdout.splitlines())
    assert all(line.isprintable() for line in site.daemon.log[said:].splitlines())
    made = {path.name for path in site.folder.iterdir()} - set(before)
    assert made == {vm.spec.folder.name}, "a name is never part of a path"
    assert await site.status(neighbour) == "on"


async def test_a_name_that_is_too_long_for_a_plug_is_refused_with_the_limit(site: Site) -> None:
    done = await site.ctl("fence", "off", "x" * 300, "--json")
    assert done.code != 0
    assert str(MAX_PLUG) in done.stdout + done.stderr
    assert "vm_uuid" not in (json.loads(done.stdout) if done.stdout.startswith("{") else {})
