# SPDX-License-Identifier: LGPL-2.1-or-later
"""A scripted QMP server: tells the truth, lies, stalls, answers late, floods, or closes in mid sentence.

In process (`QmpServer`), or as a program of its own that plays a VM with a command line:
`PROGRAM qmp_server.py SOCKET SCRIPT -uuid UUID -name NAME`, SCRIPT being one of `SCRIPTS`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import MappingProxyType, TracebackType

Reply = Callable[["Session", object], Awaitable[None]]
"""Answers one command; gets the session and the command's id."""

VERSION = {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}
GREETING: Mapping[str, object] = MappingProxyType({"QMP": {"version": VERSION, "capabilities": ["oob"]}})


class Session:
    """One client's connection, as a script sees it."""

    def __init__(self, server: QmpServer, writer: asyncio.StreamWriter) -> None:
        self.server = server
        self._writer = writer

    def say(self, message: Mapping[str, object]) -> None:
        self.raw(json.dumps(dict(message)).encode() + b"\r\n")

    def raw(self, data: bytes) -> None:
        self._writer.write(data)

    def event(self, name: str, **data: object) -> None:
        self.say({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 0}})

    def hang_up(self) -> None:
        self._writer.close()

    async def drain(self) -> None:
        await self._writer.drain()


def answer(value: object) -> Reply:
    """Return a value at once."""

    async def reply(session: Session, identifier: object) -> None:
        session.say({"return": value, "id": identifier})

    return reply


def refuse(text: str) -> Reply:
    """Answer with an error."""

    async def reply(session: Session, identifier: object) -> None:
        session.say({"error": {"class": "GenericError", "desc": text}, "id": identifier})

    return reply


async def silence(_session: Session, _identifier: object) -> None:
    """Never answer."""


def late(seconds: float, value: object) -> Reply:
    """Answer after a while; commands behind it wait, as in QEMU."""

    async def reply(session: Session, identifier: object) -> None:
        await asyncio.sleep(seconds)
        session.say({"return": value, "id": identifier})

    return reply


async def close_mid_way(session: Session, identifier: object) -> None:
    """Send half of an answer and close."""
    session.raw(json.dumps({"return": {}, "id": identifier}).encode()[:9])
    session.hang_up()


def with_events(*events: tuple[str, Mapping[str, object]], before: bool) -> Reply:
    """Answer, and send events before or after the answer."""

    async def reply(session: Session, identifier: object) -> None:
        if before:
            for name, data in events:
                session.event(name, **data)
        session.say({"return": {}, "id": identifier})
        if not before:
            for name, data in events:
                session.event(name, **data)

    return reply


def truthful(vm_uuid: str, name: str = "vm", status: str = "running") -> dict[str, Reply]:
    """The answers of a QEMU with one port."""
    return {
        "query-uuid": answer({"UUID": vm_uuid}),
        "query-name": answer({"name": name}),
        "query-status": answer({"status": status, "running": status == "running", "singlestep": False}),
        "query-migrate": answer({}),
        "migrate-set-capabilities": answer({}),
        "qom-list": answer([{"name": "port0", "type": "child<virtserialport>"}]),
        "qom-get": answer("org.vmchannel.0"),
        "query-chardev": answer(
            [
                {
                    "label": "org.vmchannel.0",
                    "filename": "unix:/nowhere,server=on",
                    "frontend-open": True,
                }
            ]
        ),
        "human-monitor-command": answer(""),
        "system_reset": with_events(
            ("RESET", {"guest": False, "reason": "host-qmp-system-reset"}), before=False
        ),
    }


class QmpServer:
    """Serves one socket path, one client at a time like QEMU, or many."""

    def __init__(
        self,
        path: str,
        replies: Mapping[str, Reply],
        *,
        greeting: Mapping[str, object] | bytes | None = GREETING,
    ) -> None:
        self.replies = dict(replies)
        self.received: list[str] = []
        self.sessions: list[Session] = []
        self._path = path
        self._greeting = greeting
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> QmpServer:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for session in self.sessions:
            session.hang_up()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        session = Session(self, writer)
        self.sessions.append(session)
        try:
            if isinstance(self._greeting, bytes):
                session.raw(self._greeting)
            elif self._greeting is not None:
                session.say(self._greeting)
            async for message in _messages(reader):
                await self._obey(session, message)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _obey(self, session: Session, message: Mapping[str, object]) -> None:
        command = str(message.get("execute", message.get("exec-oob")))
        self.received.append(command)
        if command == "qmp_capabilities":
            session.say({"return": {}})
            return
        reply = self.replies.get(command, refuse(f"The command {command} has not been found"))
        await reply(session, message.get("id"))


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[Mapping[str, object]]:
    """Cut a stream of JSON objects; no line ends are needed, as in QEMU."""
    decoder, text = json.JSONDecoder(), ""
    while data := await reader.read(65536):
        text += data.decode()
        while text := text.lstrip():
            try:
                message, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break
            yield message
            text = text[end:]


OTHER_UUID = "ffffffff-ffff-4fff-8fff-ffffffffffff"

SCRIPTS: Mapping[str, Callable[[str], dict[str, Reply]]] = MappingProxyType(
    {
        "truthful": lambda vm_uuid: truthful(vm_uuid),
        "another-uuid": lambda _: truthful(OTHER_UUID),
        "mute-after-greeting": lambda _: {},
        "deaf-to-quit": lambda vm_uuid: truthful(vm_uuid) | {"quit": answer({})},
        "migrates-when-told-to-quit": lambda vm_uuid: truthful(vm_uuid) | {"quit": _migrate_away},
        "garbage": lambda vm_uuid: truthful(vm_uuid) | {"query-status": answer(["running"])},
        "flood": lambda vm_uuid: truthful(vm_uuid) | {"query-migrate": _flood},
        "hangs-up": lambda vm_uuid: truthful(vm_uuid) | {"query-status": _hang_up},
        "stalls-when-plugged-into": lambda vm_uuid: truthful(vm_uuid) | _stall_at_device_add(),
        "opens-and-closes-its-port-in-silence": lambda vm_uuid: (
            truthful(vm_uuid) | {"query-chardev": _open_for_a_while()}
        ),
    }
)


def _stall_at_device_add() -> dict[str, Reply]:
    """Takes a chardev and never answers for the port; what comes later is answered."""
    chardevs: list[object] = []

    async def add(session: Session, identifier: object) -> None:
        chardevs.append({"label": "added", "filename": "unix:/nowhere,server=on", "frontend-open": False})
        session.say({"return": {}, "id": identifier})

    async def remove(session: Session, identifier: object) -> None:
        chardevs.clear()
        session.say({"return": {}, "id": identifier})

    async def tell(session: Session, identifier: object) -> None:
        session.say({"return": list(chardevs), "id": identifier})

    controller = {"name": "serial", "type": "child<virtio-serial-pci>"}
    return {
        "qom-list": answer([controller, {"name": "serial.0", "type": "child<virtio-serial-bus>"}]),
        "query-chardev": tell,
        "getfd": answer({}),
        "chardev-add": add,
        "chardev-remove": remove,
        "device_add": silence,
        "device_del": refuse("Device 'it' not found"),
    }


def _open_for_a_while() -> Reply:
    """The guest opens its port, then closes it, and no event tells: as of a port whose device has no id."""
    states = iter([False, False, True, True])

    async def reply(session: Session, identifier: object) -> None:
        chardev = {"label": "org.vmchannel.0", "filename": "unix:/nowhere,server=on"}
        session.say({"return": [chardev | {"frontend-open": next(states, False)}], "id": identifier})

    return reply


async def _hang_up(session: Session, identifier: object) -> None:
    """Answer that the VM runs, and close the connection."""
    session.say({"return": {"status": "running", "running": True, "singlestep": False}, "id": identifier})
    session.hang_up()


async def _migrate_away(session: Session, identifier: object) -> None:
    """End a migration at the very moment of `quit`; then say no more."""
    for command in session.server.replies:
        session.server.replies[command] = silence
    session.event("MIGRATION", status="completed")
    session.say({"return": {}, "id": identifier})


async def _flood(session: Session, identifier: object) -> None:
    """Answer, then send events without end."""
    session.say({"return": {}, "id": identifier})
    while True:
        session.event("BLOCK_IO_ERROR", device="d0", action="report")
        await session.drain()


async def _play(path: str, script: str, vm_uuid: str) -> None:
    replies = SCRIPTS[script](vm_uuid)
    if script == "mute-after-greeting":
        replies = dict.fromkeys(truthful(vm_uuid), silence)
    async with QmpServer(path, replies):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_play(sys.argv[1], sys.argv[2], sys.argv[sys.argv.index("-uuid") + 1]))
