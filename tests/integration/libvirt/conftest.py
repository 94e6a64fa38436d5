# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures of the libvirt tests: real libvirtds, shared by the tests of a module that do not harm them."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.hypervisors.qemu_rig import Rig
from tests.rig import own_mounts
from tests.rig.libvirtd import Libvirtd, running_libvirtd


@contextmanager
def a_libvirtd(*, system: bool = False) -> Generator[Libvirtd]:
    """See `running_libvirtd`; in a directory of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="lv-") as directory,
        running_libvirtd(Path(directory), system=system) as libvirtd,
    ):
        yield libvirtd


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    """`qemu:///session`, shared by the tests of a module."""
    with a_libvirtd() as made:
        yield made


@pytest.fixture(scope="module")
def system_libvirtd() -> Iterator[Libvirtd]:
    """`qemu:///system`, shared by the tests of a module."""
    if reason := own_mounts.why_not():
        pytest.skip(reason)
    with a_libvirtd(system=True) as made:
        yield made


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Starts bare QEMUs."""
    with tempfile.TemporaryDirectory(prefix="hv-") as directory:
        made = Rig(Path(directory))
        yield made
        made.close()
