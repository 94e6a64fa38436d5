# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon counts for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fence_vmchannel.messages import FenceAction, FenceCode
from vmchannel_host.admin.view import AdminView
from vmchannel_host.printable import printable

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

HostKind = Literal["fence-message", "admin-request", "port-connection"]
"""Input that the host daemon itself refuses: a message on a fence channel, a request to the admin API, a
connection to a socket for QEMUs."""

HOST_KINDS: Final[tuple[HostKind, ...]] = ("fence-message", "admin-request", "port-connection")

SessionBegin = Literal["new", "resumed", "reset"]

_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0)


class Metrics:
    """Counters that the daemon's parts feed, and gauges that are read from the view at each scrape."""

    def __init__(self) -> None:
        self.registry: Final = CollectorRegistry()
        self._operations = Counter(
            "vmchannel_operations",
            "Fence requests answered, by action and code.",
            ("action", "code"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "vmchannel_operation_seconds",
            "From request to answer, by action.",
            ("action",),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._sessions = Counter(
            "vmchannel_sessions_begun",
            "Sessions with guests, by how they began.",
            ("how",),
            registry=self.registry,
        )
        self._refused = dict.fromkeys(HOST_KINDS, 0)

    def operation_answered(self, action: FenceAction, code: FenceCode, elapsed_s: float) -> None:
        """A fence request, of a guest or of the operator, got its answer."""
        self._operations.labels(action.name.lower(), code.name.lower()).inc()
        self._seconds.labels(action.name.lower()).observe(elapsed_s)

    def session_begun(self, how: SessionBegin) -> None:
        """A session with a guest was opened, resumed, or reset."""
        self._sessions.labels(how).inc()

    def input_refused(self, kind: HostKind) -> None:
        """Input was refused in the host daemon; what its hub refuses is in `AdminView.traffic`."""
        self._refused[kind] += 1

    def follow(self, view: AdminView) -> None:
        """Read the gauges from this view; once."""
        self.registry.register(_ViewCollector(view, self._refused))

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _ViewCollector(Collector):
    """Turns the view's snapshots into metrics."""

    def __init__(self, view: AdminView, refused: Mapping[HostKind, int]) -> None:
        self._view = view
        self._host_refused = refused

    def collect(self) -> Iterable[Metric]:
        """Called at each scrape (`prometheus_client.registry.Collector`)."""
        status = self._view.status()
        yield _gauge("vmchannel_operations_running", "Operations that run now.", status.operations_running)
        yield _gauge("vmchannel_journal_ok", "1 when the journal can be written.", status.journal == "ok")
        yield _gauge("vmchannel_journal_seq", "Number of the last journal record.", status.journal_seq)
        yield _gauge("vmchannel_problems", "Problems that stop fencing now.", len(status.problems))
        yield self._power()
        yield from self._ports()
        yield from self._traffic()

    def _power(self) -> Metric:
        vms = self._view.vms()
        tally = Tally(vm.power for vm in vms)
        family = GaugeMetricFamily("vmchannel_vms", "VMs that are known, by power state.", labels=["power"])
        for power in sorted({"on", "off", "unknown", *tally}):
            family.add_metric([power], tally[power])
        return family

    def _traffic(self) -> Iterable[Metric]:
        traffic = self._view.traffic()
        refused = CounterMetricFamily(
            "vmchannel_refused_input", "Input that was refused, by kind.", labels=["kind"]
        )
        for kind, count in sorted((*traffic.refused.items(), *self._host_refused.items())):
            refused.add_metric([kind], count)
        yield refused
        full = GaugeMetricFamily(
            "vmchannel_channels_at_limit",
            "Channels whose reader has no room left, so that their writer waits.",
            labels=["direction"],
        )
        full.add_metric(["to-guest"], traffic.full_to_guests)
        full.add_metric(["from-guest"], traffic.full_from_guests)
        yield full
        yield _gauge(
            "vmchannel_unsent_bytes", "Bytes queued for guests, or not acknowledged.", traffic.unsent_bytes
        )

    def _ports(self) -> Iterable[Metric]:
        ports = self._view.ports()
        connected = {port.vm_uuid for port in ports if port.connected}
        silent = sum(1 for vm in self._view.vms() if vm.power == "on" and vm.uuid not in connected)
        yield _gauge("vmchannel_ports", "Ports that are served.", len(ports))
        yield _gauge(
            "vmchannel_ports_connected", "Ports with an open session.", sum(p.connected for p in ports)
        )
        yield _gauge("vmchannel_vms_without_port", "Running VMs without a connected port.", silent)
        yield _gauge("vmchannel_channels", "Open channels.", sum(port.channels for port in ports))
        received = CounterMetricFamily(
            "vmchannel_port_received_bytes", "Bytes from the guest.", labels=["vm", "port"]
        )
        sent = CounterMetricFamily("vmchannel_port_sent_bytes", "Bytes to the guest.", labels=["vm", "port"])
        for port in ports:
            labels = [port.vm_uuid, printable(port.name, 100)]
            received.add_metric(labels, port.received_bytes)
            sent.add_metric(labels, port.sent_bytes)
        yield received
        yield sent


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=float(value))
