# SPDX-License-Identifier: LGPL-2.1-or-later
"""The metrics of a real daemon: all that are promised, and no label that a guest could choose."""

from __future__ import annotations

import asyncio
import http.client
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fence_vmchannel.core.tally import Refusal
from tests.rig.fixtures import shared_rig_dir
from tests.system.site import Site, open_site
from vmchannel_host.admin.metrics import HOST_KINDS

__all__ = ["shared_rig_dir"]

DOCS = Path(__file__).parents[3] / "docs" / "operations.md"
LABELS = {"action", "code", "power", "vm", "port", "how", "direction", "kind", "le"}


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir) as site:
        site.serve()
        yield site


class _Unix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("host", timeout=30)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def scrape(site: Site) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample by name and labels."""
    connection = _Unix(site.admin_socket)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def test_a_daemon_tells_operations_vms_ports_refusals_and_the_journal(site: Site) -> None:
    vm = site.vm("measured", machine="q35", ports=("org.vmchannel.0",))
    await site.until_run_state(vm, "running")
    before = await asyncio.to_thread(scrape, site)
    assert before["vmchannel_vms_without_port"][()] == 1
    assert (await site.fence("off", vm))["ok"]
    assert (await site.ctl("fence", "off", "no-such-vm")).code == 1
    metrics = await asyncio.to_thread(scrape, site)
    operations = metrics["vmchannel_operations_total"]
    assert operations[("action", "off"), ("code", "done")] == 1
    assert operations[("action", "off"), ("code", "unknown_plug")] == 1
    assert metrics["vmchannel_operation_seconds_count"][("action", "off"),] == 2
    assert metrics["vmchannel_vms_without_port"][()] == 0
    assert metrics["vmchannel_journal_ok"][()] == 1
    assert metrics["vmchannel_journal_seq"][()] > before["vmchannel_journal_seq"][()]
    kinds = {value for labels in metrics["vmchannel_refused_input_total"] for _, value in labels}
    assert kinds == {kind.value for kind in Refusal} | set(HOST_KINDS)


async def test_every_metric_and_every_kind_of_refusal_is_in_the_manual_and_has_fixed_labels(
    site: Site,
) -> None:
    metrics = await asyncio.to_thread(scrape, site)
    manual = DOCS.read_text("utf-8")
    names = {re.sub("_(bucket|count|sum|created)$", "", name) for name in metrics}
    missing = [name for name in names if name not in manual and f"{name}_total" not in manual]
    assert missing == []
    assert [
        kind for kind in (*(one.value for one in Refusal), *HOST_KINDS) if f"`{kind}`" not in manual
    ] == []
    assert {name for samples in metrics.values() for labels in samples for name, _ in labels} <= LABELS
