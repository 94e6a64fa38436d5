# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures of the hypervisor tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.hypervisors.qemu_rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Starts QEMUs; its directory has a short path, because a unix socket's is limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hv-") as directory:
        made = Rig(Path(directory))
        yield made
        made.close()
