# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes in place of QEMUs: each serves a QMP socket and a port, behind which it plays its own guest.

The daemon under test is unmodified: a peer's executable is a copy of Python under the name of a QEMU, and
its command line carries its VM's UUID. They are forked from one process, so that a thousand of them fit in
memory; each writes its own UUID over its command line.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fence_vmchannel.channel import Channel
from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import ChannelOpened, Limits, Opened, PeerIdentity, Priority, Reset, Role
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.links.stream import SocketLink
from fence_vmchannel.messages import (
    FENCE_SERVICE,
    FenceAction,
    FenceAnswer,
    FenceGreeting,
    FenceRequest,
    decode_message,
    encode_message,
)
from fence_vmchannel.peers import PeerInfo, PeerKind
from fence_vmchannel.tlv import decode
from tests.fakes.qmp_server import QmpServer, Reply, Session, answer, truthful

CHECKOUT = Path(__file__).resolve().parents[1]
NAME: Final = "qemu-system-peer"
BULK: Final = "org.example.take"
MESSAGE: Final = 32_768

_PLACEHOLDER = "00000000-0000-0000-0000-000000000000"
_READY_S = 180


def vm_uuid(number: int) -> str:
    """The UUID of that peer's VM."""
    return str(uuid.UUID(int=(0xBE << 120) + number + 1))


class Peers:
    """The peers that run: `folder`/vmpN holds the sockets of peer N."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.uuids = [vm_uuid(number) for number in range(count)]

    async def ask(self, peer: int, action: str, plug: str, *, count: int = 1, rate: float = 0) -> list[float]:
        """Let a peer's guest ask the fence service; milliseconds from each request to its answer.

        `rate`: requests per second, whatever the answers take; 0: one after the other.
        """
        told = await self._tell(peer, {"ask": action, "plug": plug, "count": count, "rate": rate})
        return [float(one) for one in told]

    async def flood(self, peer: int, how: str, channels: int = 1) -> None:
        """Let a peer's guest send without end, until `calm`: `status` requests, or `bulk` messages."""
        await self._tell(peer, {"flood": how, "channels": channels})

    async def calm(self, peer: int) -> None:
        """Let it stop."""
        await self._tell(peer, {"calm": True})

    async def _tell(self, peer: int, order: Mapping[str, object]) -> list[Any]:
        reader, writer = await asyncio.open_unix_connection(
            str(self.folder / f"vmp{peer}" / "ctl.sock"), limit=1 << 24
        )
        try:
            writer.write(json.dumps(dict(order)).encode() + b"\n")
            told = json.loads(await reader.readline())
        finally:
            writer.close()
        if isinstance(told, dict):
            raise RuntimeError(f"peer {peer}: {told['error']}")
        return list(told)


@contextmanager
def running_peers(folder: Path, count: int) -> Generator[Peers, None, None]:
    """Start peers and wait until they listen; all have ended when the block is left."""
    program = folder / NAME
    shutil.copy(os.path.realpath(sys.executable), program)
    command = ["setpriv", "--pdeathsig", "KILL", "--", str(program), "-m", "benchmarks.peers"]
    command += [str(folder), str(count), "-uuid", _PLACEHOLDER]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONHOME": sys.base_prefix, "PYTHONPATH": _python_path()}
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT, env=environment
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        ready, _, _ = select.select([server.stdout], [], [], _READY_S)
        assert ready, "the peers did not start in time"
        assert server.stdout.readline() == b"ready\n"
        yield Peers(folder, count)
    finally:
        server.stdin.close()
        server.wait(60)
        server.stdout.close()


def _python_path() -> str:
    return os.pathsep.join(str(CHECKOUT / part) for part in ("", "host", "guest", "agents"))


# --- in the peers


def main(folder: Path, count: int) -> None:
    """Fork the peers, say so when all listen, and end them when the standard input ends."""
    reader, writer = os.pipe()
    gc.collect()
    gc.freeze()
    children: list[int] = []
    for number in range(count):
        child = os.fork()
        if not child:
            os.close(reader)
            _be(folder / f"vmp{number}", number, writer)
        children.append(child)
    os.close(writer)
    left = count
    while left and (said := os.read(reader, 4096)):
        left -= len(said)
    print("ready" if not left else "failed", flush=True)
    sys.stdin.read()
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _be(folder: Path, number: int, ready: int) -> None:
    """Be a peer; never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _write_command_line(_PLACEHOLDER, vm_uuid(number))
        folder.mkdir()
        asyncio.run(_play(folder, number, ready))
    except BaseException:  # noqa: BLE001 - nobody else would tell
        traceback.print_exc()
    finally:
        os._exit(1)


async def _play(folder: Path, number: int, ready: int) -> None:
    await _Peer(folder, number).run(ready)


def _write_command_line(old: str, new: str) -> None:
    """Replace a word of this process's command line by one of the same length (proc(5), arg_start)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # fields 48 and 49
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        at = memory.read(end - start).index(old.encode())
        memory.seek(start + at)
        memory.write(new.encode())


class _Peer:
    """One VM: its QEMU's monitor and its guest."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._uuid = vm_uuid(number)
        self._name = f"peer{number}"
        connection = Connection(
            Role.GUEST,
            PeerIdentity(str(uuid.uuid4()), "benchmark"),
            random_bytes=os.urandom,
            limits=Limits(channels=64),
        )
        self._endpoint = Endpoint(PeerInfo("host", PeerKind.HOST), connection, self, clock=time.monotonic)
        self._floods: list[asyncio.Task[None]] = []

    async def run(self, ready: int) -> None:
        """Serve for ever."""
        port = socket.socket(socket.AF_UNIX)
        port.bind(str(self._folder / "port.sock"))
        port.listen(1)
        port.setblocking(False)
        chardev = {
            "label": "c0",
            "filename": f"unix:{self._folder}/port.sock,server=on",
            "frontend-open": True,
        }
        replies: dict[str, Reply] = truthful(self._uuid, self._name) | {
            "query-chardev": answer([chardev]),
            "qom-list": _devices,
            "qom-get": _property,
            "quit": _quit,
        }
        monitor = QmpServer(str(self._folder / "qmp.sock"), replies)
        control = await asyncio.start_unix_server(self._obey, str(self._folder / "ctl.sock"))
        async with monitor, control:
            os.write(ready, b"x")
            while True:
                accepted, _ = await asyncio.get_running_loop().sock_accept(port)
                await self._endpoint.use(SocketLink(accepted, "port"))

    async def _obey(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        order: dict[str, Any] = json.loads(await reader.readline())
        told: object = []
        try:
            if "ask" in order:
                told = await self._ask(order)
            elif "flood" in order:
                if order["flood"] == "status":
                    os.nice(19)  # a VM has processors of its own; here it shares the daemon's
                for _ in range(order["channels"]):
                    flood = self._ask_for_ever() if order["flood"] == "status" else self._send_for_ever()
                    self._floods.append(asyncio.create_task(flood, name="flood"))
            else:
                for task in self._floods:
                    task.cancel()
                await asyncio.gather(*self._floods, return_exceptions=True)
                self._floods.clear()
        except Exception as error:  # noqa: BLE001 - told to who ordered it
            told = {"error": f"{type(error).__name__}: {error}"}
        writer.write(json.dumps(told).encode() + b"\n")
        await writer.drain()
        writer.close()

    async def _open(self) -> tuple[Channel, FenceGreeting]:
        channel = await Channel.opened(
            self._endpoint, self._endpoint.peer, FENCE_SERVICE, payload=b"", priority=Priority.FENCING
        )
        return channel, decode(FenceGreeting, channel.greeting)

    async def _ask(self, order: Mapping[str, Any]) -> Sequence[float]:
        channel, greeting = await self._open()
        action = FenceAction[str(order["ask"]).upper()]
        began: dict[bytes, float] = {}
        took: list[float] = []

        async def send() -> None:
            request = FenceRequest(
                os.urandom(16), action, order["plug"], greeting.boot_id, greeting.tick_ms, 60_000
            )
            began[request.request_id] = time.perf_counter()
            await channel.send(encode_message(request))

        async def receive() -> None:
            while (message := await channel.receive()) is not None:
                told = decode_message(message)
                if isinstance(told, FenceAnswer):
                    took.append((time.perf_counter() - began.pop(told.request_id)) * 1e3)
                    if not told.ok:
                        raise RuntimeError(f"{told.code.name}: {told.reason}")
                    return
            raise RuntimeError("the host closed the channel")

        async def receive_all() -> None:
            for _ in range(order["count"]):
                await receive()

        if not order["rate"]:
            for _ in range(order["count"]):
                await send()
                await receive()
        else:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(receive_all())
                due = asyncio.get_running_loop().time()
                for _ in range(order["count"]):
                    await asyncio.sleep(due - asyncio.get_running_loop().time())
                    due += 1 / order["rate"]
                    await send()
        channel.close()
        return took

    async def _ask_for_ever(self) -> None:
        channel, greeting = await self._open()

        async def drop() -> None:
            while await channel.receive() is not None:
                pass

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(drop())
            while True:
                request = FenceRequest(
                    os.urandom(16), FenceAction.STATUS, self._uuid, greeting.boot_id, greeting.tick_ms, 60_000
                )
                await channel.send(encode_message(request))
                await asyncio.sleep(0)

    async def _send_for_ever(self) -> None:
        channel = await Channel.opened(self._endpoint, self._endpoint.peer, BULK, payload=b"")
        while True:
            await channel.send(bytes(MESSAGE))

    # the endpoint's observer

    def on_connected(self, endpoint: Endpoint, event: Opened) -> None: ...

    def on_disconnected(self, endpoint: Endpoint, reason: str) -> None: ...

    def on_reset(self, endpoint: Endpoint, event: Reset) -> None: ...

    def on_channel(self, endpoint: Endpoint, event: ChannelOpened) -> None: ...


async def _devices(session: Session, identifier: object) -> None:
    """Its port is a device with an id: the devices that have one are asked for first, then the others."""
    asked = session.server.received.count("qom-list")
    port = [{"name": "port0", "type": "child<virtserialport>"}]
    session.say({"return": port if asked % 2 else [], "id": identifier})


async def _property(session: Session, identifier: object) -> None:
    """Name and chardev of the one port are asked for in turn."""
    asked = session.server.received.count("qom-get")
    session.say({"return": "org.vmchannel.0" if asked % 2 else "c0", "id": identifier})


async def _quit(session: Session, identifier: object) -> None:
    session.say({"return": {}, "id": identifier})
    await session.drain()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
