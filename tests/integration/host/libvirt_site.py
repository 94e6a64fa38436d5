# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures of a daemon over a real libvirtd; a module imports them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import shared_rig_dir
from tests.rig.libvirtd import Libvirtd, running_libvirtd
from tests.system.site import Site, open_site

WAIT_S = 60


@pytest.fixture(scope="module")
def libvirtd(shared_rig_dir: Path) -> Iterator[Libvirtd]:
    """`qemu:///session`."""
    shared_rig_dir.chmod(0o755)
    folder = shared_rig_dir / "lv"
    folder.mkdir()
    with running_libvirtd(folder) as running:
        yield running


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path, libvirtd: Libvirtd) -> Iterator[Site]:
    """A host whose VMs are that libvirtd's domains."""
    with open_site(shared_rig_dir) as site:
        site.config = {"hypervisors": [libvirtd.entry]}
        site.serve()
        yield site


__all__ = ["WAIT_S", "libvirtd", "shared_rig_dir", "site"]
