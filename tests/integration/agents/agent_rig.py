# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the agent as Pacemaker does: a program of the system's Python with the system's library."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fence_vmchannel.messages import FENCE_SERVICE
from tests.fakes.fence_service import FakeFenceService
from tests.fakes.hub_pair import HubPair, hub_pair
from vmchannel_agents.launcher import install, package_roots

_END_S = 60


@dataclass(frozen=True)
class Ran:
    """The agent has ended."""

    code: int
    out: str
    err: str
    took_s: float

    @property
    def reason(self) -> str:
        """The last line on stderr."""
        lines = self.err.splitlines()
        return lines[-1] if lines else ""


@dataclass(frozen=True)
class Agent:
    """The agent, installed into a folder of its own, and the hub that it talks to."""

    path: str
    socket: str

    async def options(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Ran:
        """Run it with a command line; the hub's socket is added."""
        return await self.run(*arguments, f"--socket={self.socket}", environment=environment)

    async def lines(self, *lines: str, environment: Mapping[str, str] | None = None) -> Ran:
        """Run it with `key=value` lines on stdin; the hub's socket is added."""
        text = "\n".join((*lines, f"socket={self.socket}", ""))
        return await self.run(stdin=os.fsencode(text), environment=environment)

    async def run(
        self, *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] | None = None
    ) -> Ran:
        """Run it as it is."""
        began = time.monotonic()
        async with self.started(*arguments, environment=environment) as process, asyncio.timeout(_END_S):
            out, err = await process.communicate(stdin)
        took_s = time.monotonic() - began
        assert process.returncode is not None
        text, words = out.decode(errors="replace"), err.decode(errors="replace")
        assert "Traceback" not in words, words
        return Ran(process.returncode, text, words, took_s)

    @contextlib.asynccontextmanager
    async def started(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> AsyncGenerator[asyncio.subprocess.Process]:
        """Start it; it is killed if it still runs at the end."""
        process = await asyncio.create_subprocess_exec(
            self.path,
            *arguments,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **(environment or {})},
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def install_agent(folder: Path, socket: str) -> Agent:
    """The agent of this checkout, as a file that Pacemaker would run."""
    home = folder / "sbin"
    home.mkdir()
    return Agent(str(install(str(home), package_roots())), socket)


@dataclass(frozen=True)
class Site:
    """A guest with its hub, a host with a fence service, and the agent in the guest."""

    agent: Agent
    service: FakeFenceService
    hubs: HubPair


@contextlib.asynccontextmanager
async def site(folder: Path) -> AsyncGenerator[Site]:
    """Run both hubs in this process."""
    service = FakeFenceService()
    async with hub_pair(folder) as hubs:
        hubs.host.offer(FENCE_SERVICE, service.serve)
        yield Site(install_agent(folder, hubs.guest_path), service, hubs)
