# SPDX-License-Identifier: LGPL-2.1-or-later
"""Drive a guest over its second serial line: run programs in it, move files, see its console.

The ports under test stay free. The other end is `guest_files/agent.py`.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shlex
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from qemu.qmp import QMPClient

from tests.rig.kernel import RigError
from tests.rig.qemu import VmSpec
from tests.rig.vm import Vm

READY_S = 240
"""Time for a boot under TCG on a loaded machine; 3 s on a quiet one, 20 s with Debian in it."""

_FIRST_PING_S, _LAST_PING_S = 1.0, 10.0
"""A guest that is not up takes no ping, one that is busy is slow to answer: first short, then longer."""

_SLACK_S = 20  # beyond the guest's own deadline: the guest may be slow to say that it passed
_CHUNK = 20_000  # of a pushed file, bytes; a request line stays under 32 KiB
_LINE_LIMIT = 1 << 23


@dataclass(frozen=True, slots=True)
class Completed:
    """A program in the guest has ended."""

    command: str
    code: int | None  # as subprocess: negative for a signal; None: it still runs
    stdout: str
    stderr: str
    timed_out: bool  # it was killed at its deadline

    def check(self) -> Completed:
        """Return itself.

        Raises:
            RigError: it did not end with 0.
        """
        if self.code != 0:
            why = "timed out" if self.timed_out else f"exit code {self.code}"
            raise RigError(f"{self.command}: {why}\n{self.stdout[-2000:]}\n{self.stderr[-2000:]}")
        return self


@dataclass(frozen=True, slots=True)
class Job:
    """A program that was started in the guest and may still run."""

    guest: Guest
    command: str
    number: int
    pid: int  # in the guest

    async def wait(self, timeout_s: float = 60) -> Completed:
        """Wait for its end.

        Raises:
            RigError: it still runs after `timeout_s`.
        """
        done = await self._ask(timeout_s)
        if done.code is None:
            raise RigError(f"{self.command}: still runs after {timeout_s} s\n{done.stdout}\n{done.stderr}")
        return done

    async def peek(self) -> Completed:
        """What it has written so far; `code` is None while it runs."""
        return await self._ask(0)

    async def signal(self, number: int) -> None:
        """Send a signal to the program and its children."""
        await self.guest.request("signal", job=self.number, signal=number)

    async def _ask(self, timeout_s: float) -> Completed:
        answer = await self.guest.request(
            "wait", timeout_s=timeout_s + _SLACK_S, job=self.number, timeout=timeout_s
        )
        return _completed(self.command, answer)


class Guest:
    """A guest as the rig sees it. Use it in one event loop and `disconnect` before that loop ends."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._line: _Line | None = None
        self._sending = asyncio.Lock()
        self._ids = itertools.count(1)

    @property
    def spec(self) -> VmSpec:
        return self.vm.spec

    async def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Wait until the guest answers: after a start, a reset, or `on` by the daemon under test.

        Raises:
            RigError: it does not; the message carries the end of its console.
        """
        try:
            async with asyncio.timeout(timeout_s):
                patience_s = _FIRST_PING_S
                while not await self._answers(patience_s):
                    patience_s = min(1.1 * patience_s, _LAST_PING_S)
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise RigError(
                f"{self.spec.name}: no answer in {timeout_s} s\n{self.console()[-3000:]}"
            ) from error

    async def _answers(self, patience_s: float) -> bool:
        try:
            await self.request("ping", timeout_s=patience_s)
        except RigError:
            await self.disconnect()
            return False
        return True

    async def run(
        self,
        *argv: str,
        stdin: str | bytes = b"",
        timeout_s: float = 60,
        env: Mapping[str, str] | None = None,
        uid: int | None = None,
    ) -> Completed:
        """Run a program and wait for its end. It is killed after `timeout_s`, which the result says."""
        job = await self.start(*argv, stdin=stdin, timeout_s=timeout_s, env=env, uid=uid)
        return await job.wait(timeout_s + _SLACK_S)

    async def sh(self, script: str, *, timeout_s: float = 60) -> Completed:
        """Run a line of shell."""
        return await self.run("sh", "-c", script, timeout_s=timeout_s)

    async def python(
        self, source: str, *, timeout_s: float = 60, env: Mapping[str, str] | None = None
    ) -> Completed:
        """Run Python source in a fork of the rig's agent: no interpreter start, no script file."""
        job = await self.start_python(source, timeout_s=timeout_s, env=env)
        return await job.wait(timeout_s + _SLACK_S)

    async def start(
        self,
        *argv: str,
        stdin: str | bytes = b"",
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        uid: int | None = None,
    ) -> Job:
        """Start a program and go on. None as `timeout_s`: it may run as long as the guest does."""
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        user = {} if uid is None else {"uid": uid, "gid": uid}
        options: dict[str, Any] = {"argv": argv, "stdin": _text(raw), "env": dict(env or {}), **user}
        return self._job(shlex.join(argv), await self.request("start", timeout=timeout_s, **options))

    async def start_python(
        self, source: str, *, timeout_s: float | None = None, env: Mapping[str, str] | None = None
    ) -> Job:
        """As `python`, and go on."""
        answer = await self.request("start", source=source, timeout=timeout_s, env=dict(env or {}))
        return self._job("python", answer)

    def _job(self, command: str, answer: dict[str, Any]) -> Job:
        return Job(self, f"{self.spec.name}: {command}", answer["job"], answer["pid"])

    async def push(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file in the guest. About 300 KB/s."""
        for start in range(0, max(len(data), 1), _CHUNK):
            part = _text(data[start : start + _CHUNK])
            await self.request("write", path=path, data=part, append=start > 0, mode=mode)

    async def pull(self, path: str, *, limit: int = 1 << 20) -> bytes:
        """Read the first `limit` bytes of a file of the guest."""
        answer = await self.request("read", path=path, offset=0, limit=limit)
        return base64.b64decode(answer["data"])

    async def boot_id(self) -> str:
        """The guest kernel's boot id: another one after each boot."""
        return str((await self.request("ping"))["boot_id"])

    async def uptime_s(self) -> float:
        """Seconds since the guest's kernel started."""
        return float((await self.request("ping"))["uptime"])

    def console(self) -> str:
        """What the guest's kernel and init wrote, all boots."""
        log = self.spec.console_log
        return log.read_text(errors="replace") if log.exists() else ""

    async def qmp(self, command: str, timeout_s: float = 10, **arguments: object) -> Any:
        """One QMP command on the rig's own monitor; gives its `return`."""
        async with self.monitor() as client, asyncio.timeout(timeout_s):
            return await client.execute(command, arguments or None)

    @asynccontextmanager
    async def monitor(self) -> AsyncGenerator[QMPClient, None]:
        """The rig's own monitor, for events. It serves one client at a time."""
        async with qmp_client(self.spec) as client:
            yield client

    async def disconnect(self) -> None:
        """Leave the serial line; the next request connects anew."""
        if self._line is not None:
            self._line.close()
            self._line = None
            await asyncio.sleep(0)  # lets the transport close its socket

    async def request(self, op: str, *, timeout_s: float = 30, **arguments: object) -> dict[str, Any]:
        """Ask the guest's agent. For what has no method here.

        Raises:
            RigError: no answer in time, or the agent failed.
        """
        number = next(self._ids)
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._connected()
                async with self._sending:
                    answer = await line.send(number, {"op": op, **arguments})
                result = await answer
        except (OSError, TimeoutError) as error:
            raise RigError(f"{self.spec.name}: no answer to {op}: {error!r}") from error
        if "error" in result:
            raise RigError(f"{self.spec.name}: {op}: {result['error']}")
        return result

    async def _connected(self) -> _Line:
        if self._line is None or self._line.lost:
            loop = asyncio.get_running_loop()
            _, self._line = await loop.create_unix_connection(_Line, str(self.spec.control))
        return self._line


class _Line(asyncio.Protocol):
    """The serial line: requests out, answers in by their id."""

    def __init__(self) -> None:
        self.lost = False
        self._transport: asyncio.Transport | None = None
        self._partial = bytearray()
        self._got: dict[int, asyncio.Future[None]] = {}
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(b"\n")  # ends half a line of an earlier connection

    async def send(self, number: int, request: dict[str, object]) -> asyncio.Future[dict[str, Any]]:
        """Send a request, wait until the guest has read it, and give the future of its answer."""
        if self._transport is None or self.lost:
            raise ConnectionResetError("the serial line is closed")
        loop = asyncio.get_running_loop()
        got, answer = loop.create_future(), loop.create_future()
        self._got[number], self._answers[number] = got, answer
        self._transport.write(json.dumps({"id": number, **request}).encode() + b"\n")
        await got
        return answer

    def data_received(self, data: bytes) -> None:
        self._partial += data
        if len(self._partial) > _LINE_LIMIT:
            self.close()
            return
        *lines, rest = bytes(self._partial).split(b"\n")
        self._partial = bytearray(rest)
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            answer: dict[str, Any] = json.loads(line)
            number = int(answer["id"])
        except (ValueError, KeyError, TypeError):
            return  # half a line from before this connection
        futures = self._got if "got" in answer else self._answers
        future = cast("asyncio.Future[Any] | None", futures.pop(number, None))
        if future is not None and not future.done():
            future.set_result(None if "got" in answer else answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._fail()

    def _fail(self) -> None:
        self.lost = True
        futures: list[asyncio.Future[Any]] = [*self._got.values(), *self._answers.values()]
        for future in futures:
            if not future.done():
                future.set_exception(ConnectionResetError("the serial line closed"))
                future.exception()  # nobody may be waiting for it
        self._got, self._answers = {}, {}


@asynccontextmanager
async def qmp_client(spec: VmSpec, *, timeout_s: float = 10) -> AsyncGenerator[QMPClient, None]:
    """A QMP client on the rig's own monitor of any VM, with or without a guest."""
    client = QMPClient(f"rig-{spec.name}")
    async with asyncio.timeout(timeout_s):
        await client.connect(str(spec.rig_qmp))
    try:
        yield client
    finally:
        try:
            async with asyncio.timeout(timeout_s):
                await client.disconnect()
        except (EOFError, OSError):
            pass  # qemu.qmp raises here what ended the connection, as after `quit`


def _completed(command: str, answer: dict[str, Any]) -> Completed:
    out, err = (base64.b64decode(answer[name]).decode(errors="replace") for name in ("out", "err"))
    return Completed(command, answer["rc"], out, err, bool(answer["timed_out"]))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
