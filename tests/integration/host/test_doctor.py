# SPDX-License-Identifier: LGPL-2.1-or-later
"""doctor against a real daemon with real QEMUs, and without a daemon."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.rig.fixtures import shared_rig_dir
from tests.rig.vm import Vm
from tests.system.channel_rig import until
from tests.system.site import Site, open_site
from vmchannel_host.config.loading import load_config
from vmchannel_host.doctor.facts import Program
from vmchannel_host.doctor.machine import collect, lock_holder
from vmchannel_host.doctor.unix_sockets import SocketTable, list_sockets, owners
from vmchannel_host.hypervisors.process import HOST_PID_NAMESPACE
from vmchannel_host.model import PidNamespace

__all__ = ["shared_rig_dir"]

HOLD = """
import socket, sys
held = socket.socket(socket.AF_UNIX)
held.connect(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir) as site:
        site.group("web", "no-such-vm", "8f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
        site.serve()
        yield site


@contextmanager
def holding(path: Path) -> Generator[int]:
    """A program that has connected to a socket; its pid."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        program.stdout.readline()
        try:
            yield program.pid
        finally:
            program.kill()


async def findings(site: Site) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", await site.ctl_json("doctor"))


def about(found: list[dict[str, Any]], *words: str) -> list[dict[str, Any]]:
    """The findings that have all these words in subject or text."""
    return [one for one in found if all(word in f"{one['subject']} {one['text']}" for word in words)]


async def is_listened_for(site: Site, vm: Vm) -> bool:
    """Whether doctor names nothing that is in the way of the VM's connection."""
    return not about(await findings(site), f"VM {vm.spec.name}", "cannot listen")


async def test_who_holds_a_monitor_is_named(site: Site) -> None:
    site.daemon.kill()
    vm = site.vm("held")
    with holding(vm.spec.qmp) as pid:
        site.daemon.start()
        found = about(await findings(site), f"VM {vm.spec.name}", str(vm.spec.qmp), f"pid {pid} (")
        assert [one["level"] for one in found] == ["error"]
        assert (await site.ctl("doctor")).code == 1
    await site.until_run_state(vm, "running")
    assert about(await findings(site), str(vm.spec.qmp)) == []


async def test_who_holds_a_port_is_named(site: Site) -> None:
    vm = site.vm("port", machine="q35", ports=("org.vmchannel.0",))
    await site.until_run_state(vm, "running")
    [path] = {port["path"] for port in await site.ask("ports") if port["vm_uuid"] == vm.spec.uuid}
    site.daemon.kill()
    with holding(Path(path)) as pid:
        site.daemon.start()
        await site.until_run_state(vm, "running")
        found = about(await findings(site), f"VM {vm.spec.name}", path, f"pid {pid} (")
        assert [one["level"] for one in found] == ["error"]


async def test_a_port_whose_qemu_connects_where_another_program_listens_is_told(site: Site) -> None:
    folder = site.spec("next").folder
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(folder / "port0.sock"))
        foreign.listen(8)
        vm = site.vm("dials", machine="q35", ports=("org.vmchannel.0",), connects=True)
        await site.until_run_state(vm, "running")
        found = about(await findings(site), f"VM {vm.spec.name}", "cannot listen", f"(pid {os.getpid()})")
        assert [one["level"] for one in found] == ["error"]
        assert "another path" in found[0]["remedy"]
    await until(lambda: is_listened_for(site, vm), "end of the finding")
    [port] = [port for port in await site.ask("ports") if port["vm_uuid"] == vm.spec.uuid]
    assert port["path"] == str(vm.spec.port_socket())


async def test_a_departed_vm_a_wrong_file_and_a_wrong_member_are_told(site: Site) -> None:
    vm: Vm = site.vm("left", machine="q35")
    await site.until_run_state(vm, "running")
    await site.migrate_away(vm)
    await site.fence("off", vm)
    site.config_file.write_text(site.config_file.read_text().replace('"standalone"', '"standalon"'))
    found = await findings(site)
    assert about(found, f"VM {vm.spec.name}", "cannot be called off")
    assert "confirm-off" in about(found, f"VM {vm.spec.name}")[0]["remedy"]
    assert about(found, "configuration", "standalon")
    assert about(found, "policy", "'no-such-vm'")
    assert not about(found, "8f1c1f9e")
    site.write_config()
    assert (await site.ctl("confirm-off", vm.spec.name, "--yes")).code == 0
    assert not about(await findings(site), f"VM {vm.spec.name}")


async def test_without_a_daemon_doctor_says_so_and_looks_at_what_it_can(site: Site) -> None:
    vm = site.vm("alone")
    await site.until_run_state(vm, "running")
    site.daemon.kill()
    with holding(vm.spec.qmp) as pid:
        done = await site.ctl("doctor", "--json", "--config", str(site.config_file))
        assert done.code == 4
        found = json.loads(done.stdout)
        assert (found[0]["level"], found[0]["subject"]) == ("error", "daemon")
        assert "systemctl start" in found[0]["remedy"]
        assert about(found, str(vm.spec.qmp), f"pid {pid} (")
    bad = site.folder / "bad.yaml"
    bad.write_text("hots: hv1\n")
    done = await site.ctl("doctor", "--config", str(bad))
    assert (done.code, "bad.yaml:1:1: hots" in done.stdout) == (4, True)
    done = await site.ctl("doctor", "--config", "/no/such/host.yaml")
    assert (done.code, "/no/such/host.yaml" in done.stdout) == (4, True)
    site.daemon.start()


def test_a_socket_that_is_served_and_one_that_waits_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as waits:
        server.bind(str(path))
        server.listen(2)
        with holding(path) as pid:
            served, _ = server.accept()
            with served:
                waits.connect(str(path))
                sockets = list_sockets(timeout_s=10)
                assert sockets is not None, "this kernel does not tell of unix sockets"
                listeners, clients = SocketTable(sockets).ends_at(str(path))
                holders = owners((*listeners, *clients), expired=lambda: False)
    assert (len(listeners), len(clients)) == (1, 1)
    assert [program.pid for program in holders[clients[0]]] == [pid]
    assert os.getpid() in [program.pid for program in holders[listeners[0]]]
    [who] = holders[clients[0]]
    assert sys.executable in who.command


def test_no_process_is_looked_at_when_the_time_is_over(tmp_path: Path) -> None:
    assert owners([1, 2, 3], expired=lambda: True) == {}
    config = tmp_path / "host.yaml"
    config.write_text("{}")
    assert collect(load_config(config), daemon=None, timeout_s=0.0).late


def test_directories_and_sockets_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    state, run, fake = tmp_path / "state", tmp_path / "run", tmp_path / "vm" / "qmp.sock"
    for folder in (run, fake.parent):
        folder.mkdir()
    run.chmod(0o777)
    fake.write_text("")
    config = tmp_path / "host.yaml"
    config.write_text(
        f"paths: {{state: {state}, run: {run}}}\nhypervisors: [{{type: qmp, sockets: {tmp_path}/*/qmp.sock}}]"
    )
    facts = collect(load_config(config), daemon=None, timeout_s=10.0)
    assert [one.problem for one in facts.directories] == [
        "No such file or directory",
        "others may write in it (mode 0777)",
    ]
    assert [(one.path, one.problem) for one in facts.sockets] == [(str(fake), "it is no socket")]


@pytest.mark.parametrize(
    ("namespace", "first"), [(HOST_PID_NAMESPACE, True), (PidNamespace(4026532178), False)]
)
def test_the_pid_namespace_is_the_daemons(tmp_path: Path, namespace: PidNamespace, first: bool) -> None:
    config = tmp_path / "host.yaml"
    config.write_text(f"hypervisors: [{{type: qmp, sockets: {tmp_path}/*/qmp.sock}}]")
    facts = collect(load_config(config), daemon=None, timeout_s=0.0, pid_namespace=namespace)
    assert facts.first_pid_namespace is first


def test_who_holds_the_lock_of_a_journal_is_told_without_taking_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.db.lock"
    assert lock_holder(path) is None
    with path.open("w") as file:
        assert lock_holder(path) is None
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = lock_holder(path)
    assert isinstance(holder, Program)
    assert holder.pid == os.getpid()
