# SPDX-License-Identifier: LGPL-2.1-or-later
"""The admin API over a real unix socket."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pwd
import socket
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from tests.integration.host.admin_rig import DONE, OP, PORT1, VM1, AdminRig, failed, served
from vmchannel_host.admin.json_text import REMEDIES
from vmchannel_host.admin.listener import AdminSocketError
from vmchannel_host.admin.server import AdminLimits
from vmchannel_host.admin.view import AdminEvent, ConfirmView
from vmchannel_host.hot_plug import PlugOutcome
from vmchannel_host.hypervisors import PlugProblem
from vmchannel_host.journal.types import JournalError

STEPS = [
    {"at": 1_700_000_000.0, "text": "intent: off vm2"},
    {"at": 1_700_000_001.0, "text": "done: "},
]
ORDER = {"request_id": "00" * 16, "action": "off", "vm": "vm2", "timeout_s": 40}


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[AdminRig]:
    async with served(tmp_path, AdminLimits(clients=5, patience_s=0.5, grace_s=0.1, streams=2)) as rig:
        yield rig


def client(rig: AdminRig) -> aiohttp.ClientSession:
    """A client of that daemon."""
    return aiohttp.ClientSession("http://host", connector=aiohttp.UnixConnector(str(rig.path)))


@pytest_asyncio.fixture
async def http(rig: AdminRig) -> AsyncIterator[aiohttp.ClientSession]:
    async with client(rig) as session:
        yield session


async def get(http: aiohttp.ClientSession, path: str) -> tuple[int, Any]:
    async with http.get(path) as response:
        return response.status, await response.json()


async def post(http: aiohttp.ClientSession, order: object, **headers: str) -> tuple[int, Any]:
    async with http.post("/v1/fence", data=json.dumps(order), headers=headers) as response:
        return response.status, await response.json()


async def until(condition: Any) -> None:
    """Wait for what another task does."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_confirmation_carries_who_gave_it(rig: AdminRig, http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/confirm-off", json={"vm": "vm2"}) as response:
        assert response.status == 200
        body = await response.json()
    assert (body["ok"], body["code"], body["vm_name"]) == (True, "done", "vm2")
    assert rig.view.confirmations == [("vm2", pwd.getpwuid(os.getuid()).pw_name)]


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"vm": ""}', '{"vm": 1}', '{"vm": "a", "yes": true}'])
async def test_a_malformed_confirmation_is_refused_and_never_reaches_the_view(
    rig: AdminRig, http: aiohttp.ClientSession, body: str
) -> None:
    async with http.post("/v1/confirm-off", data=body) as response:
        assert response.status == 400
    assert rig.view.confirmations == []


@pytest.mark.parametrize(
    "code", [code for code in FenceCode if code not in (FenceCode.DONE, FenceCode.ALREADY)]
)
async def test_a_word_that_was_not_taken_is_never_a_2xx(
    rig: AdminRig, http: aiohttp.ClientSession, code: FenceCode
) -> None:
    rig.view.confirmed = ConfirmView(False, code, "because")
    async with http.post("/v1/confirm-off", json={"vm": "vm2"}) as response:
        assert response.status >= 400
        assert (await response.json())["remedy"] != ""


# ports plugged in and out
@pytest.mark.parametrize(
    ("path", "body", "order"),
    [
        ("attach", {"vm": "vm2"}, ("org.vmchannel.0", False, 20.0)),
        ("attach", {"vm": "vm2", "port": "org.vmchannel.1", "timeout_s": 3}, ("org.vmchannel.1", False, 3.0)),
        ("detach", {"vm": "vm2"}, ("org.vmchannel.0", False, 20.0)),
        ("detach", {"vm": "vm2", "port": None, "force": True}, ("", True, 20.0)),
    ],
)
async def test_an_attach_or_detach_reaches_the_view_with_who_ordered_it(
    rig: AdminRig, http: aiohttp.ClientSession, path: str, body: object, order: tuple[str, bool, float]
) -> None:
    async with http.post(f"/v1/{path}", json=body) as response:
        assert response.status == 200
        told = await response.json()
    assert (told["ok"], told["code"], told["ports"]) == (True, "done", ["org.vmchannel.0"])
    [plug] = rig.view.plugs
    assert (plug.attach, plug.vm, plug.operator) == (
        path == "attach",
        "vm2",
        pwd.getpwuid(os.getuid()).pw_name,
    )
    assert (plug.port, plug.force, plug.timeout_s) == order


@pytest.mark.parametrize("path", ["attach", "detach"])
@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{}",
        '{"vm": ""}',
        '{"vm": "a", "port": ""}',
        '{"vm": "a", "port": 1}',
        '{"vm": "a", "timeout_s": 0}',
        '{"vm": "a", "all": true}',
        '{"vm": "a", "force": 1}',
    ],
)
async def test_a_malformed_attach_or_detach_never_reaches_the_view(
    rig: AdminRig, http: aiohttp.ClientSession, path: str, body: str
) -> None:
    async with http.post(f"/v1/{path}", data=body) as response:
        assert response.status == 400
    assert rig.view.plugs == []


@pytest.mark.parametrize("body", ['{"vm": "a", "port": null}', '{"vm": "a", "force": true}'])
async def test_only_a_detach_takes_every_port_or_uses_force(
    rig: AdminRig, http: aiohttp.ClientSession, body: str
) -> None:
    async with http.post("/v1/attach", data=body) as response:
        assert response.status == 400
    assert rig.view.plugs == []


@pytest.mark.parametrize("code", [*(one.value for one in PlugProblem), "unknown_plug", "ambiguous"])
async def test_an_attach_that_failed_is_never_a_2xx_and_says_what_to_do(
    rig: AdminRig, http: aiohttp.ClientSession, code: str
) -> None:
    rig.view.plugged["vm2"] = PlugOutcome(code, "because", "do this")
    async with http.post("/v1/attach", json={"vm": "vm2"}) as response:
        assert response.status >= 400
        body = await response.json()
    assert (body["ok"], body["code"], body["reason"], body["remedy"]) == (False, code, "because", "do this")


# what is shown
async def test_each_path_shows_what_the_view_says(http: aiohttp.ClientSession) -> None:
    cases: list[tuple[str, dict[str, object]]] = [
        ("/v1/status", {"host": "hv1", "state": "ready", "problems": []}),
        ("/v1/vms", {"name": "vm1", "groups": ["web"]}),
        ("/v1/definitions", {"vms": [], "problems": []}),
        ("/v1/ports", {"name": "org.vmchannel.0", "channels": 3}),
        ("/v1/hosts", {"name": "hv1", "last_word_s": None}),
        ("/v1/ops", {"id": OP, "code": "done", "ok": True}),
        (f"/v1/ops/{OP}", {"id": OP, "steps": STEPS}),
        ("/v1/can?vm=vm1&action=off&plug=node2", {"allowed": True, "target_name": "vm2"}),
        ("/v1/journal/verify", {"ok": True, "records": 17, "bad_seq": None}),
    ]
    for path, wanted in cases:
        status, value = await get(http, path)
        one = path.startswith(("/v1/status", "/v1/definitions", "/v1/can", "/v1/journal", f"/v1/ops/{OP}"))
        shown: dict[str, object] = value if one else value[0]
        assert status == 200, path
        assert {key: shown[key] for key in wanted} == wanted, path


async def test_what_can_is_asked_reaches_the_view(rig: AdminRig, http: aiohttp.ClientSession) -> None:
    await get(http, "/v1/can?vm=a%20b&action=reboot&plug=n%26de")
    assert rig.view.asked_can == ("a b", FenceAction.REBOOT, "n&de")


async def test_names_of_any_kind_are_ascii_json(rig: AdminRig, http: aiohttp.ClientSession) -> None:
    rig.view.vms_now = [replace(VM1, name='a"\n\ud800é')]
    async with http.get("/v1/vms") as response:
        body = await response.read()
    assert body.isascii()
    assert json.loads(body)[0]["name"] == 'a"\n\ud800é'


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/", 404, "not_found"),
        ("/v1/nothing", 404, "not_found"),
        ("/v1/ops/unknown", 404, "not_found"),
        ("/v1/fence", 405, "method_not_allowed"),
        ("/v1/ops?limit=0", 400, "bad_request"),
        ("/v1/ops?limit=1001", 400, "bad_request"),
        ("/v1/ops?limit=²", 400, "bad_request"),
        ("/v1/can", 400, "bad_request"),
        ("/v1/can?vm=a&plug=b&action=explode", 400, "bad_request"),
        ("/v1/can?vm=a&plug=b&action=list", 400, "bad_request"),
        ("/v1/can?vm=" + "x" * 300 + "&plug=b&action=off", 400, "bad_request"),
    ],
)
async def test_what_cannot_be_answered_is_an_error_with_a_code(
    http: aiohttp.ClientSession, path: str, status: int, code: str
) -> None:
    got, value = await get(http, path)
    assert (got, value["code"], bool(value["reason"])) == (status, code, True)
    assert value.keys() == {"code", "reason", "remedy"}


# fencing
async def test_a_fence_is_ordered_and_its_answer_comes_back(
    rig: AdminRig, http: aiohttp.ClientSession
) -> None:
    status, value = await post(http, {**ORDER, "request_id": "0123456789abcdef" * 2})
    [order] = rig.view.orders
    assert (order.request_id, order.action, order.vm, order.timeout_s) == (
        bytes.fromhex("0123456789abcdef" * 2),
        FenceAction.OFF,
        "vm2",
        40.0,
    )
    assert order.operator == pwd.getpwuid(os.geteuid()).pw_name
    assert status == 200
    assert {key: value[key] for key in ("ok", "code", "state", "operation", "evidence", "remedy")} == {
        "ok": True,
        "code": "done",
        "state": "off",
        "operation": OP,
        "evidence": ["pid 99 ended"],
        "remedy": "",
    }


@pytest.mark.parametrize("code", list(FenceCode))
async def test_an_answer_that_is_not_ok_is_never_a_2xx(
    rig: AdminRig, http: aiohttp.ClientSession, code: FenceCode
) -> None:
    rig.view.answer = failed(code)
    status, value = await post(http, ORDER)
    assert status >= 400
    assert (value["ok"], value["code"], value["remedy"]) == (False, code.name.lower(), REMEDIES[code][1])


async def test_an_answer_that_is_ok_is_a_200_whatever_its_code(
    rig: AdminRig, http: aiohttp.ClientSession
) -> None:
    rig.view.answer = replace(DONE, code=FenceCode.NOT_STARTED, state=PowerState.OFF)  # S8
    assert (await post(http, ORDER))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 9000,
        b"\xff\xfe",
        b'{"request_id":"%s","action":"off","vm":"a","timeout_s":1,"timeout_s":2}' % (b"00" * 16),
        b'{"request_id":"%s","action":"off","vm":"a","timeout_s":NaN}' % (b"00" * 16),
        b'{"request_id":"%s","action":"off","vm":"a","timeout_s":1e999}' % (b"00" * 16),
        b'{"request_id":"%s","action":"off","vm":"a","timeout_s":%s}' % (b"00" * 16, b"9" * 400),
        *[
            json.dumps({**ORDER, **change}).encode()
            for change in (
                {"request_id": "00" * 15},
                {"request_id": "zz" * 16},
                {"request_id": 7},
                {"request_id": " " + "0" * 31},
                {"action": "list"},
                {"action": "OFF"},
                {"action": False},
                {"action": None},
                {"vm": ""},
                {"vm": "x" * 257},
                {"vm": ["vm2"]},
                {"timeout_s": 0},
                {"timeout_s": -1},
                {"timeout_s": True},
                {"timeout_s": "40"},
                {"timeout_s": 3601},
                {"extra": 1},
            )
        ],
        *[json.dumps({k: v for k, v in ORDER.items() if k != missing}).encode() for missing in ORDER],
    ],
)
async def test_a_malformed_order_is_refused_and_never_reaches_the_view(
    rig: AdminRig, http: aiohttp.ClientSession, body: bytes
) -> None:
    async with http.post("/v1/fence", data=body) as response:
        value = await response.json()
        assert (response.status, value["code"]) == (400, "bad_request"), value
    assert rig.view.orders == []


async def test_a_body_over_the_limit_is_refused(rig: AdminRig, http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/fence", data=b" " * 20_000) as response:
        assert (response.status, (await response.json())["code"]) == (413, "request_entity_too_large")
    assert rig.view.orders == []


async def test_a_view_that_fails_is_an_error_and_logged(
    rig: AdminRig, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    rig.view.answer = RuntimeError("secret detail")
    with caplog.at_level(logging.ERROR):
        status, value = await post(http, ORDER)
    assert (status, value["code"]) == (500, "internal")
    assert "secret detail" not in str(value)
    assert "secret detail" in caplog.text


async def test_a_journal_that_fails_is_named(rig: AdminRig, http: aiohttp.ClientSession) -> None:
    rig.view.answer = JournalError("the disk is full")
    status, value = await post(http, ORDER)
    assert (status, value["code"], value["reason"]) == (503, "journal", "the journal: the disk is full")


async def test_a_view_that_breaks_its_promise_to_answer_is_not_waited_for_ever(
    rig: AdminRig, http: aiohttp.ClientSession
) -> None:
    rig.view.go.clear()
    status, value = await post(http, {**ORDER, "timeout_s": 0.1})
    assert (status, value["code"]) == (504, "deadline")
    assert "unknown" in value["reason"]


async def stream(response: aiohttp.ClientResponse) -> list[tuple[str, Any]]:
    """All server-sent events until the end."""
    events: list[tuple[str, Any]] = []
    for block in (await response.text()).split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if "data" in lines:
            events.append((lines["event"], json.loads(lines["data"])))
    return events


SSE = {"Accept": "text/event-stream"}


async def test_progress_is_streamed_before_the_answer(rig: AdminRig, http: aiohttp.ClientSession) -> None:
    rig.view.go.clear()
    async with http.post("/v1/fence", json=ORDER, headers=SSE) as response:
        assert await response.content.readline() == b"event: progress\n"  # before there is an answer
        rig.view.go.set()
        rest = await response.text()
    assert '"text":"step 0"' in rest
    assert '"text":"step 1"' in rest
    assert rest.count("event: answer") == 1
    assert json.loads(rest.strip().rsplit("data: ", 1)[1])["code"] == "done"


@pytest.mark.parametrize(
    ("error", "code"), [(JournalError("disk"), "journal"), (RuntimeError("bug"), "internal")]
)
async def test_a_failure_ends_the_stream_with_an_error_event(
    rig: AdminRig, http: aiohttp.ClientSession, error: Exception, code: str
) -> None:
    rig.view.answer = error
    async with http.post("/v1/fence", json=ORDER, headers=SSE) as response:
        kind, body = (await stream(response))[-1]
    assert (kind, body["code"]) == ("error", code)


async def test_of_too_much_progress_the_oldest_goes_and_the_answer_comes(
    rig: AdminRig, http: aiohttp.ClientSession
) -> None:
    rig.view.progress_lines = 1000
    async with http.post("/v1/fence", json=ORDER, headers=SSE) as response:
        events = await stream(response)
    assert len(events) <= 66
    assert [events[-2][1]["text"], events[-1][0]] == ["step 999", "answer"]


async def test_a_client_that_goes_does_not_end_the_fence(rig: AdminRig) -> None:
    rig.view.go.clear()
    body = json.dumps(ORDER).encode()
    for accept in (b"*/*", b"text/event-stream"):
        _, writer = await asyncio.open_unix_connection(str(rig.path))
        head = b"POST /v1/fence HTTP/1.1\r\nHost: h\r\nAccept: %s\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (accept, len(body)) + body)
        await writer.drain()
        wanted = len(rig.view.orders) + 1
        await until(lambda wanted=wanted: len(rig.view.orders) == wanted)
        writer.close()
        await writer.wait_closed()
    await asyncio.sleep(0.05)
    rig.view.go.set()
    await until(lambda: rig.view.answered == 2)


# live views
async def test_events_come_as_they_happen_and_the_listener_is_let_go(
    rig: AdminRig, http: aiohttp.ClientSession
) -> None:
    async with http.get("/v1/events") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        rig.view.feed.put_nowait(AdminEvent(1.0, "vm.ended", "pid 99 ended", "u", "vm2"))
        assert await response.content.readline() == b"event: vm.ended\n"
        assert json.loads((await response.content.readline())[6:])["vm_name"] == "vm2"
        rig.view.feed.put_nowait(None)
        await response.read()
    await until(lambda: rig.view.listeners == 0)


async def test_live_views_are_limited_in_number_and_end_with_the_daemon_when_their_client_has_gone(
    rig: AdminRig, http: aiohttp.ClientSession
) -> None:
    views = [await http.get("/v1/events") for _ in range(2)]
    assert (await get(http, "/v1/events"))[0] == 503
    for view in views:
        view.close()
    await rig.server.close()
    assert rig.view.listeners == 0


async def test_a_live_view_that_is_not_read_is_dropped(rig: AdminRig) -> None:
    reader, writer = await asyncio.open_unix_connection(str(rig.path), limit=1)
    writer.write(b"GET /v1/events HTTP/1.1\r\nHost: h\r\n\r\n")
    await until(lambda: rig.view.listeners == 1)
    reader._transport.pause_reading()  # type: ignore[attr-defined]  # pyright: ignore
    for _ in range(200):
        rig.view.feed.put_nowait(AdminEvent(1.0, "vm.seen", "x" * 10_000))
    await until(lambda: rig.view.listeners == 0)
    await until(lambda: rig.server.connections == 0)
    writer.close()


async def test_an_answer_that_is_not_taken_is_dropped(rig: AdminRig) -> None:
    rig.view.vms_now = [replace(VM1, name="x" * 10_000)] * 500
    slow = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    slow.connect(str(rig.path))
    slow.send(b"GET /v1/vms HTTP/1.1\r\nHost: h\r\n\r\n")
    await until(lambda: rig.server.connections == 1)
    await until(lambda: rig.server.connections == 0)
    slow.close()


async def test_closing_ends_live_views_and_open_connections(tmp_path: Path) -> None:
    async with served(tmp_path) as rig, client(rig) as http:
        response = await http.get("/v1/events")
        await until(lambda: rig.view.listeners == 1)
        await rig.server.close()
        await response.read()
        assert rig.view.listeners == 0
    assert not rig.path.exists()


async def test_closing_gives_a_fence_its_time_and_then_lets_go_of_it(tmp_path: Path) -> None:
    for timeout_s, status in ((20.0, 200), (0.1, None)):
        async with served(tmp_path) as rig, client(rig) as http:
            rig.view.go.clear()
            asked = asyncio.create_task(post(http, ORDER))
            await until(lambda rig=rig: rig.view.orders)
            closing = asyncio.create_task(rig.server.close(timeout_s=timeout_s))
            if status is not None:
                await asyncio.sleep(0.05)
                rig.view.go.set()
                assert (await asked)[0] == status
            else:
                with pytest.raises(aiohttp.ClientError):
                    await asked
            await closing
            assert rig.view.answered == (status is not None)


# clients that misbehave
async def test_a_connection_that_says_nothing_is_closed(rig: AdminRig) -> None:
    for data in (b"", b"GET /v1/status HT"):
        reader, writer = await asyncio.open_unix_connection(str(rig.path))
        writer.write(data)
        async with asyncio.timeout(10):
            await reader.read()
        writer.close()


async def test_a_body_that_never_ends_is_refused_in_time(rig: AdminRig) -> None:
    reader, writer = await asyncio.open_unix_connection(str(rig.path))
    writer.write(b"POST /v1/fence HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
    async with asyncio.timeout(10):
        head = await reader.readline()
    assert b"408" in head
    writer.close()


async def test_one_connection_too_many_is_told_so(rig: AdminRig, http: aiohttp.ClientSession) -> None:
    held = [await asyncio.open_unix_connection(str(rig.path)) for _ in range(5)]
    await until(lambda: rig.server.connections == 5)
    status, value = await get(http, "/v1/status")
    assert (status, value["code"]) == (503, "limit")
    for _, writer in held:
        writer.close()
        await writer.wait_closed()
    await until(lambda: rig.server.connections == 0)
    assert (await get(http, "/v1/status"))[0] == 200


async def test_garbage_is_answered_and_closed(rig: AdminRig, http: aiohttp.ClientSession) -> None:
    reader, writer = await asyncio.open_unix_connection(str(rig.path))
    writer.write(b"\x00\xff garbage\r\n\r\n" * 100)
    async with asyncio.timeout(10):
        assert b"400" in await reader.readline()
    writer.close()
    assert (await get(http, "/v1/status"))[0] == 200


# the socket
async def test_the_socket_is_for_its_owner_and_group_only(rig: AdminRig) -> None:
    assert stat.S_IMODE(rig.path.stat().st_mode) == 0o660
    assert stat.S_ISSOCK(rig.path.stat().st_mode)


async def test_a_second_daemon_is_refused_and_the_first_goes_on(
    rig: AdminRig, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    with pytest.raises(AdminSocketError, match="another daemon"):
        async with served(tmp_path):
            pass
    assert (await get(http, "/v1/status"))[0] == 200


async def test_a_dead_daemons_socket_is_taken_over(tmp_path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "admin.sock"))
    dead.close()
    (tmp_path / "admin.sock.new").write_text("left by a crash")
    async with served(tmp_path) as rig, client(rig) as http:
        assert (await get(http, "/v1/status"))[0] == 200


async def test_a_file_in_the_sockets_place_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "admin.sock").write_text("precious")
    with pytest.raises(AdminSocketError, match="no socket"):
        async with served(tmp_path):
            pass
    assert (tmp_path / "admin.sock").read_text() == "precious"


# metrics
async def test_metrics_tell_operations_and_the_views_gauges(
    rig: AdminRig, http: aiohttp.ClientSession
) -> None:
    rig.metrics.operation_answered(FenceAction.OFF, FenceCode.DONE, 0.02)
    rig.metrics.input_refused("fence-message")
    rig.metrics.session_begun("resumed")
    await get(http, "/no/such/path")
    await get(http, "/v1/ops?limit=many")
    async with http.get("/metrics") as response:
        lines = (await response.text()).splitlines()
        assert response.headers["Content-Type"].startswith("text/plain")
    for wanted in (
        'vmchannel_operations_total{action="off",code="done"} 1.0',
        'vmchannel_operation_seconds_bucket{action="off",le="0.025"} 1.0',
        'vmchannel_refused_input_total{kind="garbage"} 3.0',
        'vmchannel_refused_input_total{kind="fence-message"} 1.0',
        'vmchannel_refused_input_total{kind="admin-request"} 2.0',
        'vmchannel_sessions_begun_total{how="resumed"} 1.0',
        'vmchannel_channels_at_limit{direction="to-guest"} 2.0',
        'vmchannel_channels_at_limit{direction="from-guest"} 1.0',
        "vmchannel_unsent_bytes 4096.0",
        'vmchannel_vms{power="on"} 1.0',
        'vmchannel_vms{power="off"} 0.0',
        "vmchannel_ports 2.0",
        "vmchannel_ports_connected 1.0",
        "vmchannel_vms_without_port 0.0",
        "vmchannel_journal_ok 1.0",
        f'vmchannel_port_received_bytes_total{{port="org.vmchannel.0",vm="{PORT1.vm_uuid}"}} 1.5e+06',
    ):
        assert wanted in lines, wanted


async def test_a_port_name_cannot_break_the_metrics(rig: AdminRig, http: aiohttp.ClientSession) -> None:
    rig.view.ports_now = [replace(PORT1, name='x"} 1\n\ud800')]
    async with http.get("/metrics") as response:
        text = await response.text()
    assert response.status == 200
    assert 'port="x\\"} 1\\\\x0a\\\\ud800"' in text


async def test_two_daemons_in_one_process_count_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with served(tmp_path / "a") as one, served(tmp_path / "b") as other:
        one.metrics.operation_answered(FenceAction.OFF, FenceCode.DONE, 1.0)
        assert b'code="done"' in one.metrics.render()
        assert b'code="done"' not in other.metrics.render()
