# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirtds that hang, die and come back; memory that they keep. No fence waits, and none is false."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.libvirt import hammer
from tests.integration.libvirt.conftest import a_libvirtd
from tests.integration.libvirt.libvirt_rig import (
    LibvirtHost,
    a_domain,
    off_loop,
    silent_of,
    vm_of,
    watching,
)
from tests.rig.libvirtd import Domain, Libvirtd
from vmchannel_host.hypervisors import CannotStart
from vmchannel_host.hypervisors.libvirt.connection import Patience
from vmchannel_host.hypervisors.libvirt.link import LibvirtError, Link, Sink
from vmchannel_host.model import EndCause, EndProof, IoState, Migration, RunState


@pytest.fixture
def own() -> Iterator[Libvirtd]:
    """A libvirtd that the test may harm."""
    with a_libvirtd() as made:
        yield made


async def is_silent(host: LibvirtHost, domain: Domain, words: str) -> None:
    """Look until the look proves nothing of the domain, for that reason."""
    await host.until_look(domain, lambda look: any(words in text for text in silent_of(look, domain)) or None)


async def proves_off(host: LibvirtHost, domain: Domain) -> None:
    """Look until nothing is left of the domain and nothing is in doubt."""

    await host.until_look(
        domain,
        lambda look: (
            (not silent_of(look, domain) and all(one.vm_uuid != domain.uuid for one in look.instances))
            or None
        ),
    )


async def test_a_libvirtd_that_hangs_stops_no_fence_and_is_followed_again(own: Libvirtd) -> None:
    first, second = a_domain(own), a_domain(own)
    for one in (first, second):
        own.create(one)
    async with watching(own) as host:
        instance, other = await host.until_running(first), await host.until_running(second)
        own.pause()
        end = await host.off(instance.identity)
        assert (end.proof, end.cause, end.io, end.departed) == (
            EndProof.PIDFD,
            EndCause.TERM,
            IoState.DRAINED,
            False,
        )
        await proves_off(host, first)
        mute = await host.until_state(second, lambda one: one.run_state is RunState.UNKNOWN)
        assert mute.identity == other.identity
        own.resume()
        again = await host.until_running(second)
        assert again.identity == other.identity
        await proves_off(host, first)


def test_many_calls_to_a_libvirtd_that_hangs_do_not_end_the_process(own: Libvirtd) -> None:
    """libvirt's client does that to a process whose threads share a connection (CVE-2024-4418)."""
    done = subprocess.run(
        [sys.executable, "-m", hammer.__name__, own.uri, str(own.pid)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


async def test_a_libvirtd_that_hangs_with_saved_memory_keeps_its_vm_from_being_off(own: Libvirtd) -> None:
    domain = a_domain(own)
    own.create(domain)
    async with watching(own) as host:
        await host.until_running(domain)
        await off_loop(lambda: own.virsh("managedsave", domain.uuid))
        own.pause()
        await is_silent(host, domain, "does not answer, and keeps a managed save of it")
        own.resume()
        await is_silent(host, domain, "keeps a managed save of it, from which it could be continued")
        own.pause()
        assert await host.hypervisor.discard_memory(vm_of(domain), timeout_s=0.5) == ()
        own.resume()  # and what was asked of it takes effect


async def test_where_saved_memory_cannot_be_seen_a_mute_libvirt_is_silent_about_its_vms_only(
    own: Libvirtd,
) -> None:
    domain, stranger = a_domain(own), a_domain(own)
    own.define(domain)
    async with watching(own, saves=Path("/nonexistent/save")) as host:
        await proves_off(host, domain)
        own.pause()
        await is_silent(host, domain, "whether it has saved memory is not known")
        await proves_off(host, stranger)
        own.resume()


async def test_a_libvirt_that_was_never_reached_may_have_any_vm(own: Libvirtd) -> None:
    domain = a_domain(own)
    own.kill()
    async with watching(own, saves=Path("/nonexistent/save")) as host:
        await is_silent(host, domain, "whether it has saved memory is not known")
    (own.saves).mkdir(parents=True, exist_ok=True)
    async with watching(own) as host:
        await proves_off(host, domain)


async def test_a_libvirtd_that_is_killed_and_started_again_is_followed(own: Libvirtd) -> None:
    first, second = a_domain(own), a_domain(own)
    for one in (first, second):
        own.create(one)
    async with watching(own) as host:
        instance, other = await host.until_running(first), await host.until_running(second)
        await off_loop(own.kill)
        await host.until_state(first, lambda one: one.run_state is RunState.UNKNOWN)
        end = await host.off(instance.identity)
        assert (end.proof, end.cause, end.io) == (EndProof.PIDFD, EndCause.TERM, IoState.DRAINED)
        await proves_off(host, first)
        await off_loop(own.start)
        again = await host.until_running(second)
        assert again.identity == other.identity
        assert again.interruptions > other.interruptions  # what happened meanwhile nobody heard
        await proves_off(host, first)


async def test_what_a_restarted_libvirtd_starts_by_itself_is_seen(own: Libvirtd) -> None:
    domain = a_domain(own)
    own.define(domain)
    own.virsh("autostart", domain.uuid)
    async with watching(own) as host:
        await proves_off(host, domain)
        await off_loop(own.kill)
        shutil.rmtree(own.directory / "run/libvirt/qemu/run", ignore_errors=True)  # autostart is once a boot
        (own.directory / "run/libvirt/qemu/autostarted").unlink(missing_ok=True)
        await off_loop(own.start)
        instance = await host.until_running(domain)
        assert instance.name == domain.name
        assert (await host.off(instance.identity)).proof is EndProof.PIDFD


async def test_a_managed_save_is_removed_before_anything_is_off(libvirtd: Libvirtd) -> None:
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        await host.until_running(domain)
        await off_loop(lambda: libvirtd.virsh("managedsave", domain.uuid))
        await is_silent(host, domain, "keeps a managed save of it, from which it could be continued")
        with pytest.raises(CannotStart, match="keeps a managed save"):
            await host.hypervisor.start(vm_of(domain), domain.name, timeout_s=60)
        (line,) = await host.hypervisor.discard_memory(vm_of(domain), timeout_s=60)
        assert "managed save removed" in line
        await proves_off(host, domain)
        assert not list(libvirtd.saves.glob(f"{domain.name}*"))
        assert await host.hypervisor.discard_memory(vm_of(domain), timeout_s=60) == ()


@pytest.mark.parametrize("managed", [True, False])
async def test_memory_that_was_saved_elsewhere_is_a_departure(libvirtd: Libvirtd, managed: bool) -> None:
    """What libvirt keeps itself it can remove; a file may be anywhere, and be continued on any host."""
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    command = ("managedsave",) if managed else ("save",)
    file = () if managed else (str(libvirtd.directory / "config" / f"{domain.uuid}.memory"),)
    async with watching(libvirtd) as host:
        instance = await host.until_running(domain)
        await off_loop(lambda: libvirtd.virsh(*command, domain.uuid, *file))
        end = await host.off(instance.identity)
        assert (end.proof, end.cause, end.departed) == (EndProof.PIDFD, EndCause.NONE, not managed)


async def test_a_restored_domain_is_seen_to_live(libvirtd: Libvirtd) -> None:
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    file = str(libvirtd.directory / "config" / f"{domain.uuid}.memory")
    async with watching(libvirtd) as host:
        before = await host.until_running(domain)
        await off_loop(lambda: libvirtd.virsh("save", domain.uuid, file))
        await off_loop(lambda: libvirtd.virsh("restore", file))
        after = await host.until_running(domain)
        assert after.identity != before.identity
        assert after.migration is Migration.NONE
        assert not (await host.off(after.identity)).departed


async def test_a_domain_that_is_to_be_restarted_when_it_crashes_stays_off(libvirtd: Libvirtd) -> None:
    domain = a_domain(
        libvirtd,
        extra="<on_poweroff>restart</on_poweroff><on_reboot>restart</on_reboot><on_crash>restart</on_crash>",
    )
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        instance = await host.until_running(domain)
        assert (await host.off(instance.identity)).cause is EndCause.TERM
        await host.until_look(
            domain, lambda _: libvirtd.virsh("domstate", domain.uuid).startswith("shut off") or None
        )
        await proves_off(host, domain)
        await host.hypervisor.start(vm_of(domain), domain.name, timeout_s=60)
        again = await host.until_running(domain)
        killed = await host.off(again.identity, quit_timeout_s=0)
        assert killed.proof is EndProof.PIDFD
        await proves_off(host, domain)


async def test_a_libvirt_that_cannot_be_used_is_said_once_and_stops_nothing(
    own: Libvirtd, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(uri: str, sink: Sink) -> Link:
        raise LibvirtError(f"{uri}: libvirt's Python module is missing: No module named 'libvirt'")

    domain = a_domain(own)
    own.create(domain)
    eager = Patience(first_retry_s=0.01, last_retry_s=0.01)
    async with watching(own, open_libvirt=refuse, patience=eager) as host:
        (instance,) = await host.instances(domain)
        assert (instance.run_state, instance.configured) == (RunState.UNKNOWN, False)
        for _ in range(3):
            await host.look()
        end = await host.off(instance.identity)
        assert (end.proof, end.cause) == (EndProof.PIDFD, EndCause.TERM)
    told = [record for record in caplog.records if "Python module is missing" in record.getMessage()]
    assert len(told) == 1
