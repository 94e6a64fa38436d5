# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fence agent as Pacemaker runs it, start to exit, beside the bare import of the library it is built on.

The hubs and a fence service that answers at once run in this process, the agent in its own. Runs take turns,
so that both meet the same load.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure, figure, ratio
from tests.fakes.fence_service import PaperVm
from tests.integration.agents.agent_rig import site
from vmchannel_agents.launcher import SYSTEM_PYTHON
from vmchannel_agents.library import FENCE_LIBRARY

_BARE = f"import sys; sys.path.insert(0, {FENCE_LIBRARY!r}); import fencing"


def starts(count: int) -> Iterator[Figure]:
    """Milliseconds from the start of the process to its end."""
    with tempfile.TemporaryDirectory(prefix="vmc-bench-", dir="/tmp") as folder:
        bare, status = asyncio.run(_measure(Path(folder), count))
    yield bare
    yield status
    yield ratio("fence agent, status to import fencing", status, bare)


async def _measure(folder: Path, count: int) -> tuple[Figure, Figure]:
    bare: list[float] = []
    status: list[float] = []
    async with site(folder) as rig:
        rig.service.vms.append(PaperVm("vm1"))
        for _ in range(count):
            began = time.perf_counter()
            process = await asyncio.create_subprocess_exec(SYSTEM_PYTHON, "-I", "-c", _BARE)
            assert await process.wait() == 0
            bare.append((time.perf_counter() - began) * 1e3)
            done = await rig.agent.options("--action=status", "--plug=vm1")
            if done.code:
                print(done.err, file=sys.stderr)
                raise AssertionError(f"the agent ended with {done.code}")
            status.append(done.took_s * 1e3)
    return figure("bare import fencing, start to exit", "ms", bare), figure(
        "fence agent, status, start to exit", "ms", status
    )
