# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon comes and goes, VMs come and go, the configuration changes: what was proven stays proven."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import shared_rig_dir
from tests.rig.programs import run_program
from tests.rig.qemu import new_uuid
from tests.rig.vm import Vm
from tests.system.site import Site, open_site

__all__ = ["shared_rig_dir"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir) as site:
        site.serve()
        yield site


async def running(site: Site, word: str) -> Vm:
    vm = site.vm(word)
    await site.until_run_state(vm, "running")
    return vm


async def assert_already_off(site: Site, vm: Vm) -> None:
    assert await site.status(vm) == "off"
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "already", "off"), answer
    assert any("look by hv1: no instance" in line for line in answer["evidence"]), answer


# already off


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_vm_that_was_fenced_is_off_after_a_restart_of_the_daemon(
    site: Site, number: signal.Signals
) -> None:
    vm = await running(site, f"fenced{number.value}")
    pid = vm.pid
    assert (await site.fence("off", vm))["ok"]
    site.daemon.restart(number)
    await assert_already_off(site, vm)
    answer = await site.fence("off", vm)
    assert any(
        f"pid {pid} on hv1 gone after" in line and "pidfd, by quit" in line for line in answer["evidence"]
    )


async def test_a_qemu_that_crashed_while_the_daemon_was_down_is_off(site: Site) -> None:
    vm = await running(site, "downcrash")
    site.daemon.end()
    pid = vm.pid
    vm.stop()
    site.daemon.start()
    await assert_already_off(site, vm)
    answer = await site.fence("off", vm)
    assert any(
        f"pid {pid} on hv1 gone before we acted: no such process" in line for line in answer["evidence"]
    ), answer


async def test_a_qemu_that_outlived_the_daemon_is_not_off_and_is_fenced(site: Site) -> None:
    vm = await running(site, "outlives")
    site.daemon.kill()
    vm.signal(signal.SIGSTOP)
    site.daemon.start()
    assert await site.status(vm) == "on"
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"], vm.running) == (True, "done", False), answer


async def test_another_start_of_the_vm_while_the_daemon_was_down_is_seen(site: Site) -> None:
    vm = await running(site, "downstart")
    site.daemon.kill()
    first = vm.pid
    vm.stop()
    vm.start()
    site.daemon.start()
    assert await site.status(vm) == "on"
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"], vm.running) == (True, "done", False), answer
    assert not any(f"pid {first} " in line and "running" in line for line in answer["evidence"])


async def test_a_vm_never_seen_is_off_when_the_policy_names_its_uuid_and_unknown_otherwise(
    site: Site,
) -> None:
    uuid = new_uuid()
    answer = await site.fence("off", uuid)
    assert (answer["ok"], answer["code"], answer["state"]) == (False, "unknown_plug", "unknown"), answer
    site.group("named", uuid)
    await site.reload()
    answer = await site.fence("off", uuid)
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "already", "off"), answer
    assert await site.status(uuid) == "off"


# a journal that cannot be used


async def test_a_daemon_without_a_usable_journal_runs_refuses_everything_and_says_why(site: Site) -> None:
    vm = await running(site, "nojournal")
    site.daemon.end()
    journal = Path(f"{site.folder}/state/journal.db")
    whole = journal.read_bytes()
    journal.write_bytes(b"garbage" * 1000)
    try:
        site.daemon.start()
        answer = await site.fence("off", vm)
        assert (answer["ok"], answer["code"], vm.running) == (False, "unavailable", True), answer
        assert "damaged" in answer["reason"], answer
        told = await run_program("vmchannelctl", "--socket", str(site.admin_socket), "doctor")
        assert (told.code, "damaged" in told.stdout) == (1, True), told
        site.daemon.end()
    finally:
        journal.write_bytes(whole)
    site.daemon.start()
    assert (await site.fence("off", vm))["ok"]


async def test_s11_after_a_restore_a_vm_that_was_off_is_not_until_it_is_seen_again(site: Site) -> None:
    vm, here = await running(site, "restored"), await running(site, "stays")
    assert (await site.fence("off", vm))["ok"]
    state, copy = f"{site.folder}/state", f"{site.folder}/copy.db"
    assert (await run_program("vmchannelctl", "journal", "backup", copy, "--state", state)).code == 0
    site.daemon.end()
    assert (await run_program("vmchannelctl", "journal", "restore", copy, "--state", state)).code == 0
    site.daemon.start()
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"]) == (False, "migrated_away"), answer
    assert "restored from a backup" in answer["reason"], answer
    assert await site.status(vm) == "unknown"
    assert (await site.fence("off", here))["ok"]
    vm.start()
    await site.until_run_state(vm, "running")
    assert (await site.fence("off", vm))["ok"]
    await assert_already_off(site, vm)


# VMs come and go


async def test_a_vm_that_starts_again_on_the_same_socket_path_is_followed_and_fenced_again(
    site: Site,
) -> None:
    vm = await running(site, "again")
    daemon = site.daemon.pid
    for _ in range(2):
        vm.stop()
        vm.start()
        await site.until_run_state(vm, "running")
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"], vm.running) == (True, "done", False), answer
    assert site.daemon.pid == daemon


async def test_another_vm_on_a_socket_path_that_was_used_before_is_told_apart(site: Site) -> None:
    first = await running(site, "firstuser")
    first.stop()
    second = Vm(site.spec("seconduser"))
    os.rename(first.spec.folder, second.spec.folder)
    second.start()
    site.vms.append(second)
    await site.until_run_state(second, "running")
    await assert_already_off(site, first)
    assert second.running


async def test_a_monitor_that_vanishes_and_returns_is_followed(site: Site) -> None:
    vm = site.vm("vanishes")
    await site.until_run_state(vm, "running")
    aside = vm.spec.folder / "aside"
    os.rename(vm.spec.qmp, aside)
    site.daemon.restart()  # it must find the monitor anew, and cannot
    await site.until_run_state(vm, "unknown")
    assert await site.status(vm) == "on"
    os.rename(aside, vm.spec.qmp)
    await site.until_run_state(vm, "running")


async def test_a_socket_that_nobody_serves_disturbs_nothing(site: Site) -> None:
    folder = site.folder / "vmdead"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "qmp.sock"))
    (site.folder / "vmfile").mkdir()
    (site.folder / "vmfile" / "qmp.sock").write_text("no socket")
    vm = await running(site, "lives")
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"]) == (True, "done"), answer


# configuration and signals


async def test_a_reload_changes_what_the_policy_allows(site: Site) -> None:
    asker, target = await running(site, "asker"), await running(site, "target")
    for allowed in ([], ["off", "status"], ["status"]):
        site.group("reload", asker, target, actions=allowed)
        await site.reload()
        done = await site.ctl("can", asker.spec.name, "off", target.spec.name)
        assert done.code == (0 if "off" in allowed else 3), done


async def test_a_broken_file_is_refused_and_the_old_policy_stays_in_force(site: Site) -> None:
    asker, target = await running(site, "asker2"), await running(site, "target2")
    site.group("stays", asker, target)
    await site.reload()
    whole = site.config_file.read_text()
    site.config_file.write_text(whole.replace('"stays": {', '"stays": {\n"membres": [],'))
    said = await site.hang_up()
    site.config_file.write_text(whole)
    assert "configuration not taken over" in said
    assert "membres" in said
    done = await site.ctl("can", asker.spec.name, "off", target.spec.name)
    assert done.code == 0, done


async def test_check_config_names_file_line_and_key_and_exits_with_2(site: Site) -> None:
    path = site.folder / "wrong.yaml"
    path.write_text("host: hv1\npolicy:\n  groups:\n    web: {members: [vm1], actions: [off, explode]}\n")
    done = await run_program("vmchanneld", "--check-config", str(path))
    assert (done.code, done.stdout) == (2, ""), done
    assert done.stderr.startswith(f"{path}:4:"), done.stderr
    assert "policy.groups.web.actions" in done.stderr
    assert "explode" in done.stderr
    done = await run_program("vmchanneld", "--config", str(path))
    assert (done.code, done.stdout) == (2, ""), done
    assert f"{path}:4:" in done.stderr
    site.write_config()
    done = await run_program("vmchanneld", "--check-config", str(site.config_file))
    assert (done.code, done.stderr) == (0, ""), done


async def test_a_second_daemon_with_the_same_paths_does_not_start(site: Site) -> None:
    done = await run_program("vmchanneld", "--config", str(site.config_file))
    assert done.code == 1, done
    assert "cannot start" in done.stderr
    assert await site.ctl_json("status")


async def test_a_stop_in_order_removes_the_sockets_and_a_start_after_a_kill_replaces_them(
    site: Site,
) -> None:
    sockets = [site.admin_socket, site.folder / "run" / "host.sock"]
    assert site.daemon.end() == 0
    assert not any(path.exists() for path in sockets)
    done = await site.ctl("status")
    assert done.code == 4, done
    site.daemon.start()
    site.daemon.restart(signal.SIGKILL)
    assert (await site.ctl("status")).code == 0


async def test_a_stop_waits_for_the_operation_that_runs(site: Site) -> None:
    site.config["fencing"] = {"quit_timeout": "2s"}
    await site.reload()
    vm = await running(site, "stopwaits")
    vm.signal(signal.SIGSTOP)
    said = len(site.daemon.log)
    async with site.ctl_running("fence", "off", vm.spec.name):
        await site.until(lambda: "action=off" in site.daemon.log[said:], "begin of off")
        assert site.daemon.end() == 0
    assert "ok done" in site.daemon.log[said:]
    assert not vm.running
    del site.config["fencing"]
    site.serve()
    await assert_already_off(site, vm)
