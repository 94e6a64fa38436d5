# SPDX-License-Identifier: LGPL-2.1-or-later
"""From the configured limits of a port and of services to what the guest at that port may have. Pure."""

from __future__ import annotations

from fence_vmchannel.hub.terms import PeerTerms, ServiceTerms, peer_terms
from vmchannel_host.config.model import HostConfig
from vmchannel_host.model import PortName


def terms_of_port(config: HostConfig, port: PortName) -> PeerTerms:
    """What the guest at a port of that name may have."""
    limits = config.ports.limits_of(port)
    services = config.ports.services
    return peer_terms(
        limits.window,
        channels=config.limits.channels,
        keep=limits.cache_buffers,
        services={name: ServiceTerms(one.window, one.cache_buffers) for name, one in services.items()},
    )
