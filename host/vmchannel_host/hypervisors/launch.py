# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start commands: how `on` starts a VM that bare QEMU has no memory of.

The command runs outside the daemon's unit, so that stopping or upgrading the daemon leaves the VM alone: as a
transient systemd service where systemd runs, else in a session of its own. Its exit proves nothing; whether
the VM runs is seen by looking for the instance.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vmchannel_host.hypervisors import CannotStart
from vmchannel_host.model import VmUuid

log = logging.getLogger(__name__)

MAX_OUTPUT_BYTES = 64 * 1024
"""What is kept of a start command's output; writes beyond it fail, the command goes on."""

DEFAULT_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}
)

SYSTEMD_RUN = (
    "systemd-run",
    "--collect",  # no trace of a failed unit is left to be in the way of the next start
    "--quiet",
    "--pipe",  # output and exit status come back to us
    "--service-type=exec",
    "--property=KillMode=process",  # a QEMU that daemonized outlives the command that started it
    "--",
)
"""A transient service, not a scope: a scope would inherit the sandbox of the daemon's unit."""


class Launcher:
    """Runs the configured start commands."""

    def __init__(
        self,
        commands: Mapping[str, tuple[str, ...]],
        *,
        systemd: Path = Path("/run/systemd/system"),
        systemd_run: tuple[str, ...] = SYSTEMD_RUN,
        environment: Mapping[str, str] = DEFAULT_ENVIRONMENT,
        patience_s: float = 2.0,
    ) -> None:
        """
        Args:
            commands: VM name or UUID to program and arguments; never a shell line.
            systemd: exists where systemd is pid 1 (sd_booted(3)).
            systemd_run: the program, with its options, that runs a command as a transient unit.
            environment: of the command.
            patience_s: a command that still runs after this many seconds is the VM itself, or takes its time.
        """
        self.replace(commands)
        self._systemd = systemd
        self._systemd_run = systemd_run
        self._environment = dict(environment)
        self._patience_s = patience_s
        self._running: dict[VmUuid, set[asyncio.Future[int]]] = {}

    def replace(self, commands: Mapping[str, tuple[str, ...]]) -> None:
        """Take the commands of a reloaded configuration."""
        self._commands = {key.lower() if _is_uuid(key) else key: value for key, value in commands.items()}

    def can_start(self, vm: VmUuid, name: str) -> bool:
        return self._command(vm, name) is not None

    def running(self) -> frozenset[VmUuid]:
        """VMs with a start command that has not ended: it may bring an instance at any time."""
        return frozenset(self._running)

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        """Run the VM's start command; return when it has exited with 0, or still runs after a while.

        Raises:
            CannotStart: there is none, or it failed. The message carries the last line of its output.
        """
        command = self._command(vm, name)
        if not command:
            raise CannotStart(f"no start command is configured for VM {vm} ({name[:100]!r})")
        if self._systemd.exists():
            command = (*self._systemd_run, *command)
        output = _output_file()
        try:
            status = await self._run(vm, command, output, min(self._patience_s, timeout_s))
            if status is None:
                log.info("start command still runs vm=%s", vm)
            elif status != 0:
                raise CannotStart(
                    f"start command of VM {vm} ended with {_in_words(status)}: {_last_line(output)}"
                )
        finally:
            os.close(output)

    def _command(self, vm: VmUuid, name: str) -> tuple[str, ...] | None:
        # A UUID decides: a name may have passed to another VM.
        return self._commands.get(vm) or (self._commands.get(name) if name else None)

    async def _run(self, vm: VmUuid, command: tuple[str, ...], output: int, patience_s: float) -> int | None:
        """Returns the exit status, or None when it still runs; it is then reaped when it ends."""
        try:
            child = _spawn(command, self._environment, output)
        except (OSError, ValueError) as error:
            raise CannotStart(f"cannot run {command[0]!r}: {error}") from error
        exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        pidfd = os.pidfd_open(child)  # cannot be another's: only we can reap it
        asyncio.get_running_loop().add_reader(pidfd, _reap, pidfd, exited)
        self._running.setdefault(vm, set()).add(exited)
        exited.add_done_callback(lambda done: self._ended(vm, done))
        try:
            async with asyncio.timeout(patience_s):
                return await asyncio.shield(exited)
        except TimeoutError:
            return None

    def _ended(self, vm: VmUuid, done: asyncio.Future[int]) -> None:
        self._running[vm].discard(done)
        if not self._running[vm]:
            del self._running[vm]


def _spawn(command: tuple[str, ...], environment: dict[str, str], output: int) -> int:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, output, 2),
    ]
    # Python ignores the first two, and what is ignored is inherited.
    defaults = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    return os.posix_spawnp(
        command[0],
        command,
        environment,
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=defaults,
    )


def _reap(pidfd: int, exited: asyncio.Future[int]) -> None:
    asyncio.get_running_loop().remove_reader(pidfd)
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        result = None  # somebody else has reaped our child: its status is lost
    os.close(pidfd)
    if exited.done():
        return
    if result is None:
        exited.set_result(255)
    else:
        exited.set_result(result.si_status if result.si_code == os.CLD_EXITED else -result.si_status)


def _output_file() -> int:
    """A file in memory that cannot grow: no pipe that breaks when we leave, no disk that fills."""
    file = os.memfd_create("start-command", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, MAX_OUTPUT_BYTES)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return file


def _last_line(output: int) -> str:
    text = os.pread(output, MAX_OUTPUT_BYTES, 0).rstrip(b"\0").decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return repr(lines[-1][:300]) if lines else "it said nothing"


def _in_words(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {-status}"


def _is_uuid(text: str) -> bool:
    return len(text) == 36 and text.count("-") == 4
