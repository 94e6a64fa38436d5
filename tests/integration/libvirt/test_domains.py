# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains of real libvirtds: seen as instances, with their state, their ports and their names."""

from __future__ import annotations

import pytest

from tests.integration.libvirt.libvirt_rig import PORT, a_domain, silent_of, vm_of, watching
from tests.rig.libvirtd import Libvirtd
from vmchannel_host.model import EndCause, EndProof, IoState, Migration


@pytest.mark.parametrize("which", ["libvirtd", "system_libvirtd"])
async def test_a_domain_is_seen_ended_and_booted_again(which: str, request: pytest.FixtureRequest) -> None:
    libvirtd: Libvirtd = request.getfixturevalue(which)
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        before = await host.until_running(domain)
        assert before.monitor == libvirtd.uri
        assert (before.name, before.migration, before.configured) == (domain.name, Migration.NONE, True)
        assert [(port.name, port.chardev_path) for port in before.ports] == [(PORT, str(domain.ports[0][1]))]

        end = await host.off(before.identity)
        assert (end.proof, end.cause, end.io, end.departed) == (
            EndProof.PIDFD,
            EndCause.TERM,
            IoState.DRAINED,
            False,
        )
        look = await host.look(vm=vm_of(domain))
        assert not [one for one in look.instances if one.vm_uuid == domain.uuid]
        assert silent_of(look, domain) == []

        assert host.hypervisor.can_start(vm_of(domain), domain.name)
        await host.hypervisor.start(vm_of(domain), domain.name, timeout_s=60)
        after = await host.until_running(domain)
        assert after.identity != before.identity
