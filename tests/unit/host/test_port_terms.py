# SPDX-License-Identifier: LGPL-2.1-or-later
"""From the configured limits to what the guest at a port may have."""

from __future__ import annotations

from fence_vmchannel.core.channel_state import MIN_WINDOW
from fence_vmchannel.hub.terms import SESSION_WINDOWS
from fence_vmchannel.messages import FENCE_SERVICE
from vmchannel_host.config.model import WIDEST, HostConfig, LimitsConfig, PortLimits, PortsConfig
from vmchannel_host.model import HostName, PortName
from vmchannel_host.port_terms import terms_of_port

KIB = 1024
PORT = PortName("org.vmchannel.0")
OTHER = PortName("org.vmchannel.1")


def configured(ports: PortsConfig) -> HostConfig:
    return HostConfig(HostName("hv1"), ports=ports, limits=LimitsConfig(channels=64))


def test_the_smaller_side_bounds_a_channel_and_so_many_of_it_the_session() -> None:
    config = configured(PortsConfig(limits=PortLimits(256 * KIB, 64 * KIB)))
    limits = terms_of_port(config, PORT).limits
    assert limits.max_window_bytes == 64 * KIB
    assert limits.session_bytes == SESSION_WINDOWS * 64 * KIB
    assert limits.channels == 64


def test_a_limit_under_one_fragment_is_raised_to_it() -> None:
    config = configured(PortsConfig(limits=PortLimits(32 * KIB, 32 * KIB)))
    limits = terms_of_port(config, PORT).limits
    assert (limits.max_window_bytes, limits.session_bytes) == (MIN_WINDOW, SESSION_WINDOWS * MIN_WINDOW)


def test_an_override_holds_for_its_port_only() -> None:
    ports = PortsConfig(overrides={OTHER: PortLimits(64 * KIB, 64 * KIB, cache_buffers=False)})
    config = configured(ports)
    plain, other = terms_of_port(config, PORT), terms_of_port(config, OTHER)
    assert (plain.limits.max_window_bytes, plain.keeps("org.example.x")) == (1024 * KIB, True)
    assert (other.limits.max_window_bytes, other.keeps("org.example.x")) == (64 * KIB, False)


def test_a_service_narrows_its_channels_on_all_ports_and_fencing_is_always_kept() -> None:
    small = PortLimits(WIDEST.byte_limit, 64 * KIB, cache_buffers=False)
    ports = PortsConfig(services={"org.example.log": small}, limits=PortLimits(cache_buffers=True))
    terms = terms_of_port(configured(ports), PORT)
    assert terms.limits.target_bytes == {"org.example.log": 64 * KIB}
    assert not terms.keeps("org.example.log")
    assert terms.keeps("org.example.x")
    away = terms_of_port(configured(PortsConfig(limits=PortLimits(cache_buffers=False))), PORT)
    assert away.keeps(FENCE_SERVICE)
