# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the product's own programs on this machine, from this checkout, installed or not."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.rig.image import CHECKOUT
from tests.rig.kernel import RigError

MODULES = {
    "vmchanneld": "vmchannel_host.main",
    "vmchannelctl": "vmchannel_host.cli.main",
    "vmchannel-guestd": "vmchannel_guest.main",
    "vmchannel": "vmchannel_guest.cli",
    "fence_vmchannel": "vmchannel_agents.entry",
}
_STOP_S = 10
_LINE_LIMIT = 1 << 20


def program(name: str, *arguments: str) -> list[str]:
    """The command line of one of our programs. Use it with `environment()`."""
    code = f"import sys; from {MODULES[name]} import main; sys.argv[0] = {name!r}; sys.exit(main())"
    return [sys.executable, "-c", code, *arguments]


def environment() -> dict[str, str]:
    """This process's environment, with the checkout's packages first on the path."""
    roots = [str(CHECKOUT / root) for root in (".", "host", "guest", "agents")]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")])}


@dataclass(frozen=True, slots=True)
class Result:
    """One of our programs has ended."""

    code: int
    stdout: str
    stderr: str


async def run_program(name: str, *arguments: str, timeout_s: float = 60) -> Result:
    """Run one of our programs to its end.

    Raises:
        RigError: it did not end in time; it was killed.
    """
    process = await _spawn(program(name, *arguments), stderr=PIPE)
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError as error:
        raise RigError(f"{name} {' '.join(arguments)}: no end in {timeout_s} s") from error
    finally:
        await _end(process)
    return Result(process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace"))


class Daemon:
    """A running daemon of ours; its lines are kept and handed on as they come."""

    def __init__(self, process: Process, on_line: Callable[[str], None]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._on_line = on_line

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    async def read(self) -> None:
        """Read its lines until it ends."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            text = line.decode(errors="replace").rstrip("\n")
            self.lines.append(text)
            self._on_line(text)

    async def wait_for(self, path: Path, *, timeout_s: float = 20) -> None:
        """Wait until it has made its socket.

        Raises:
            RigError: it ended, or has not; the message carries its last lines.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not path.exists():
            if not self.running or asyncio.get_running_loop().time() > deadline:
                raise RigError("the daemon did not come up:\n" + "\n".join(self.lines[-20:]))
            await asyncio.sleep(0.02)


@asynccontextmanager
async def daemon(
    name: str, *arguments: str, on_line: Callable[[str], None] = lambda _: None
) -> AsyncGenerator[Daemon, None]:
    """Run a daemon of ours; it gets SIGTERM at the block's end, and SIGKILL after 10 s."""
    process = await _spawn(program(name, *arguments), stderr=STDOUT)
    running = Daemon(process, on_line)
    # not a TaskGroup: it would wrap the errors of the caller's block
    reader = asyncio.create_task(running.read(), name=f"lines of {name}")
    try:
        yield running
    finally:
        await _end(process)
        await reader


async def _spawn(command: list[str], *, stderr: int) -> Process:
    # its own session: Ctrl-C is ours to handle. pdeathsig: a killed run leaves no process.
    return await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", "--", *command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=stderr,
        env=environment(),
        start_new_session=True,
        limit=_LINE_LIMIT,
    )


async def _end(process: Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
