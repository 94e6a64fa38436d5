# SPDX-License-Identifier: GPL-2.0-or-later
"""A site for each test; without the fence-agents library there is nothing to test."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.integration.agents.agent_rig import Site, site
from vmchannel_agents.launcher import SYSTEM_PYTHON
from vmchannel_agents.library import FENCE_LIBRARY


@pytest.fixture(scope="session", autouse=True)
def _library() -> None:  # pyright: ignore[reportUnusedFunction]
    for needed, package in ((f"{FENCE_LIBRARY}/fencing.py", "fence-agents"), (SYSTEM_PYTHON, "python3")):
        if not Path(needed).exists():
            pytest.skip(f"{needed} is missing: install {package} (`make deps` does)")


@pytest_asyncio.fixture
async def place(tmp_path: Path) -> AsyncGenerator[Site]:
    """See `site`."""
    async with site(tmp_path) as made:
        yield made
