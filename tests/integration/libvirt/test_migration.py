# SPDX-License-Identifier: LGPL-2.1-or-later
"""Live migration between two real libvirtds of one machine: both ends are instances, a fence ends both."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.libvirt.conftest import a_libvirtd
from tests.integration.libvirt.libvirt_rig import (
    PORT,
    LibvirtHost,
    a_domain,
    off_loop,
    watching,
)
from tests.rig.libvirtd import Domain, Libvirtd
from vmchannel_host.model import EndProof, Instance, Look, Migration

MIGRATION_PORT = 49999


@pytest.fixture
def there() -> Iterator[Libvirtd]:
    """The other libvirtd."""
    with a_libvirtd() as made:
        yield made


def a_slow_domain(libvirtd: Libvirtd) -> Domain:
    """One that has something to send: 8 MiB of flash memory that is not zero, which takes 8 s at 1 MiB/s."""
    bios = Path("/usr/share/seabios/bios-256k.bin").read_bytes()
    firmware = libvirtd.directory / "firmware"
    firmware.write_bytes(os.urandom(8 * 1024 * 1024 - len(bios)) + bios)
    firmware.chmod(0o444)
    return replace(a_domain(libvirtd, extra="<features><acpi/></features>"), firmware=firmware)


def destination_of(domain: Domain, there: Libvirtd) -> Domain:
    return replace(domain, ports=((PORT, there.sockets / "there.sock"),))


@contextmanager
def migrating(here: Libvirtd, there: Libvirtd, domain: Domain, *options: str) -> Generator[None]:
    """`virsh migrate` beside the block. What becomes of it does not matter."""
    file = here.directory / f"{domain.uuid}-there.xml"
    file.write_text(destination_of(domain, there).xml, "utf-8")
    command = ["virsh", "-q", "-c", here.uri, "migrate", "--live", domain.uuid, there.uri]
    command += ["--migrateuri", f"tcp://127.0.0.1:{MIGRATION_PORT}", "--xml", str(file), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def both(look: Look, domain: Domain) -> dict[Migration, Instance] | None:
    """The two ends by their parts, once libvirt tells them."""
    parts = {one.migration: one for one in look.instances if one.vm_uuid == domain.uuid}
    return parts if parts.keys() == {Migration.OUTGOING, Migration.INCOMING} else None


async def test_both_ends_of_a_migration_are_instances_and_a_fence_ends_both(
    libvirtd: Libvirtd, there: Libvirtd
) -> None:
    domain = a_slow_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd, there) as host:
        await host.until_running(domain)
        with migrating(libvirtd, there, domain, "--bandwidth", "1"):
            ends = await host.until_look(domain, lambda look: both(look, domain))
            source, destination = ends[Migration.OUTGOING], ends[Migration.INCOMING]
            assert (source.monitor, destination.monitor) == (libvirtd.uri, there.uri)
            for one in (source, destination):
                end = await host.off(one.identity)
                assert end.proof is EndProof.PIDFD
        assert await host.instances(domain) == []


async def test_a_domain_that_has_migrated_runs_at_its_destination_and_has_left_its_source(
    libvirtd: Libvirtd, there: Libvirtd
) -> None:
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd, there) as host:
        source = await host.until_running(domain)
        with migrating(libvirtd, there, domain):
            await until_moved(host, domain, source)
        left = await host.off(source.identity)
        assert (left.proof, left.departed) == (EndProof.PIDFD, True)
        arrived = await host.until_running(domain)
        assert (arrived.monitor, arrived.migration) == (there.uri, Migration.NONE)
        end = await host.off(arrived.identity)
        assert (end.proof, end.departed) == (EndProof.PIDFD, False)
        assert not await host.instances(domain)


async def until_moved(host: LibvirtHost, domain: Domain, source: Instance) -> None:
    await host.until_state(
        domain, lambda one: one.identity != source.identity and one.migration is Migration.NONE
    )


async def test_a_migration_that_is_cancelled_leaves_the_source_as_it_was(
    libvirtd: Libvirtd, there: Libvirtd
) -> None:
    domain = a_slow_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd, there) as host:
        source = await host.until_running(domain)
        with migrating(libvirtd, there, domain, "--bandwidth", "1"):
            await host.until_look(domain, lambda look: both(look, domain))
            await off_loop(lambda: libvirtd.virsh("domjobabort", domain.uuid))
            back = await host.until_state(domain, lambda one: one.migration is Migration.NONE)
        assert back.identity == source.identity
        assert not (await host.off(source.identity)).departed
