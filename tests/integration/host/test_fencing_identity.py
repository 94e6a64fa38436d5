# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU without a UUID is reported and never fenced, and spoils no fence but of its own name (S9)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import shared_rig_dir
from tests.system.site import Site, open_site
from vmchannel_host.model import NIL_UUID

__all__ = ["shared_rig_dir"]


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir) as site:
        site.serve()
        yield site


async def test_s9_a_qemu_without_a_uuid_is_refused_by_name_and_not_touched(site: Site) -> None:
    nameless, other = site.vm("nameless", uuid=NIL_UUID), site.vm("other")
    await site.until_run_state(other, "running")
    answer = await site.fence("off", nameless)
    assert (answer["ok"], answer["state"]) == (False, "unknown"), answer
    assert (await site.fence("off", NIL_UUID))["ok"] is False
    assert nameless.running
    assert (await site.fence("off", other))["ok"]


async def test_s9_a_vm_whose_name_a_qemu_without_a_uuid_bears_too_is_never_called_off(site: Site) -> None:
    vm = site.vm("double")
    await site.until_run_state(vm, "running")
    nameless = site.vm("double", uuid=NIL_UUID)  # maybe no scan has seen it yet: the fence looks itself
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (False, "ambiguous", "unknown"), answer
    assert f"pid {nameless.pid} " in answer["reason"]
    assert nameless.running
    assert vm.running
