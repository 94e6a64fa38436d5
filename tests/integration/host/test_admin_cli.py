# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannelctl against a real admin socket: what it shows, how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from fence_vmchannel.messages import FenceAction, FenceCode
from tests.integration.host.admin_rig import (
    OP,
    OPERATION,
    PORT1,
    UUID1,
    UUID2,
    VM1,
    VM2,
    AdminRig,
    failed,
    served,
)
from tests.integration.host.journal_rig import JournalRig
from vmchannel_host.admin.view import (
    AdminEvent,
    CanView,
    ConfirmView,
    DefinedVm,
    DefinitionsView,
    Finding,
)
from vmchannel_host.cli.console import Console
from vmchannel_host.cli.main import run
from vmchannel_host.cli.progress import ProgressLine
from vmchannel_host.cli.table import display_width
from vmchannel_host.hot_plug import PlugOutcome
from vmchannel_host.journal.types import JournalError, VerifyResult


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Ask = Callable[[str], str]


def command(socket_path: Path, *words: str, err: io.StringIO | None = None, ask: Ask | None = None) -> Ran:
    """Run vmchannelctl in this thread."""
    out, err = io.StringIO(), err or io.StringIO()
    code = run(["--socket", str(socket_path), *words], Console(out, err, 80, ask))
    return Ran(int(code), out.getvalue(), err.getvalue())


async def ctl(rig: AdminRig, *words: str, err: io.StringIO | None = None, ask: Ask | None = None) -> Ran:
    """Run vmchannelctl beside the daemon's loop."""
    return await asyncio.to_thread(command, rig.path, *words, err=err, ask=ask)


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[AdminRig]:
    async with served(tmp_path) as rig:
        yield rig


# showing
async def test_vms_are_a_table_of_80_columns_with_what_is_wrong_below(rig: AdminRig) -> None:
    rig.view.vms_now = [replace(VM1, name="n" * 255), VM2]
    ran = await ctl(rig, "vms")
    assert ran.code == 0
    assert ran.lines[0].split() == ["NAME", "POWER", "RUN", "STATE", "PORT", "UUID"]
    assert ran.lines[1].split() == ["n" * 15 + "…", "on", "running", "yes", UUID1]
    assert ran.lines[2].split() == ["vm2", "unknown", "-", "no", UUID2]
    assert "  vm2: pid 99 is not proven to have ended" in ran.lines
    assert max(map(display_width, ran.lines)) <= 80


async def test_a_name_cannot_write_on_the_terminal(rig: AdminRig) -> None:
    rig.view.vms_now = [replace(VM1, name="a\x1b[2Jb\nc\udce9", problem="x\r\x07y")]
    ran = await ctl(rig, "vms")
    assert "a\\x1b[2J" in ran.out
    assert "x\\x0d\\x07y" in ran.out
    assert all(line.isprintable() for line in ran.lines)


async def test_ports_hosts_and_operations_fit_80_columns(rig: AdminRig) -> None:
    long = "x" * 200
    rig.view.ports_now = [replace(PORT1, vm_name=long, name=long, received_bytes=10**15)]
    rig.view.operations = [replace(OPERATION, vm_name=long, requester=long, code=long)]
    for words in (["ports"], ["hosts"], ["ops"]):
        ran = await ctl(rig, *words)
        assert ran.code == 0
        assert max(map(display_width, ran.lines)) <= 80, ran.out
        assert len(ran.lines) >= 2
    assert OP in ran.out  # an id that is cut is good for nothing


async def test_status_names_what_stops_fencing(rig: AdminRig) -> None:
    rig.view.status_now = replace(rig.view.status_now, problems=("the policy allows nobody",))
    ran = await ctl(rig, "status")
    assert ran.code == 0
    assert "up:         1h02m" in ran.lines
    assert "ports:      2, 1 connected" in ran.lines
    assert ran.lines[-1] == "  the policy allows nobody"


async def test_an_operation_is_shown_with_its_evidence_and_steps(rig: AdminRig) -> None:
    ran = await ctl(rig, "ops", OP)
    assert ran.code == 0
    assert "evidence:" in ran.lines
    assert "  pid 99 on hv1 ended: quit, proven by its pidfd after 12 ms" in ran.lines
    assert any(line.endswith("intent: off vm2") for line in ran.lines)


async def test_a_failed_operation_is_shown_as_failed_and_a_running_one_as_running(rig: AdminRig) -> None:
    rig.view.operations = [
        replace(OPERATION, ok=False, code="failed"),
        replace(OPERATION, running=True, phase="destroying"),
        replace(OPERATION, ok=False, code=""),  # cut short by a crash
    ]
    ran = await ctl(rig, "ops")
    assert [
        word in line
        for word, line in zip(("FAILED: fa", "running: d", "FAILED: un"), ran.lines[1:], strict=True)
    ] == [
        True,
        True,
        True,
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["vms"],
        ["ports"],
        ["hosts"],
        ["ops"],
        ["ops", OP],
        ["doctor"],
        ["verify-journal"],
        ["fence", "off", "vm2"],
        ["can", "vm1", "off", "node2"],
        ["attach", "vm2"],
        ["detach", "vm2"],
        ["detach", "--all"],
    ],
)
async def test_every_command_prints_json(rig: AdminRig, words: list[str]) -> None:
    ran = await ctl(rig, *words, "--json")
    assert ran.code == 0
    assert isinstance(json.loads(ran.out), (dict, list))


# fencing
async def test_a_fence_that_is_done_shows_its_evidence_and_ends_with_0(rig: AdminRig) -> None:
    ran = await ctl(rig, "fence", "off", "vm2", "--timeout", "7")
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines == ["done: vm2 is off", "  pid 99 ended", f"  op={OP} host=hv1 time=1.2s"]
    [order] = rig.view.orders
    assert (order.action, order.vm, order.timeout_s) == (FenceAction.OFF, "vm2", 7.0)


async def test_each_fence_has_a_request_id_of_its_own(rig: AdminRig) -> None:
    await ctl(rig, "fence", "off", "vm2")
    await ctl(rig, "fence", "off", "vm2")
    assert len({order.request_id for order in rig.view.orders}) == 2


EXIT_CODES = {
    FenceCode.REFUSED: 3,
    FenceCode.VOID: 3,
    FenceCode.BAD_REQUEST: 2,
}


@pytest.mark.parametrize("code", list(FenceCode))
async def test_a_fence_that_is_not_ok_never_ends_with_0(rig: AdminRig, code: FenceCode) -> None:
    rig.view.answer = failed(code, "the reason")
    ran = await ctl(rig, "fence", "off", "vm2")
    assert ran.code == EXIT_CODES.get(code, 1)
    assert ran.lines[0] == f"FAILED ({code.name.lower()}): the reason"


@pytest.mark.parametrize("error", [JournalError("disk full"), RuntimeError("bug")])
async def test_a_daemon_that_fails_is_a_failure(rig: AdminRig, error: Exception) -> None:
    rig.view.answer = error
    ran = await ctl(rig, "fence", "off", "vm2")
    assert ran.code == 1
    assert ran.err.startswith("vmchannelctl: ")
    assert "remedy: " in ran.err


async def test_a_terminal_sees_progress_and_a_file_does_not(rig: AdminRig) -> None:
    for err, shown in ((Terminal(), True), (io.StringIO(), False)):
        rig.view.go.clear()
        running = asyncio.create_task(ctl(rig, "fence", "off", "vm2", err=err))
        async with asyncio.timeout(20):
            while shown and "step 1" not in err.getvalue():
                await asyncio.sleep(0.02)
        rig.view.go.set()
        ran = await running
        assert ("off vm2" in ran.err) is shown
        assert ran.err.endswith("\r\x1b[K" if shown else "")


def test_the_progress_line_shows_time_and_never_wraps() -> None:
    stream, now = Terminal(), [10.0]
    line = ProgressLine(stream, "off " + "n\n" * 100, width=40, clock=lambda: now[0])
    now[0] = 12.5
    with line:
        line.update("x" * 100)
        deadline = time.monotonic() + 20
        while "2.5s" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "  2.5s  off n\\x0an" in stream.getvalue()
    parts = stream.getvalue().split("\r\x1b[K")
    assert max(map(len, parts)) <= 39
    assert "\n" not in stream.getvalue()


# can, doctor, verify
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (CanView(True, True, "vm1", "off", "node2", UUID2, "vm2", "group web"), 0),
        (CanView(True, False, "vm1", "off", "node2", UUID2, "vm2", "its monitor is mute"), 1),
        (CanView(False, False, "vm1", "off", "node2", reason="no group", remedy="add one"), 3),
        (CanView(False, True, "vm1", "off", "node2", reason="no group"), 3),
    ],
)
async def test_can_tells_allowed_and_provable_apart(rig: AdminRig, answer: CanView, code: int) -> None:
    rig.view.can_now = answer
    ran = await ctl(rig, "can", "vm1", "off", "node2")
    assert ran.code == code
    assert answer.reason in ran.out
    assert rig.view.asked_can == ("vm1", FenceAction.OFF, "node2")


async def test_doctor_fails_when_something_is_wrong(rig: AdminRig) -> None:
    assert (await ctl(rig, "doctor")).lines == ["nothing is wrong"]
    rig.view.findings = [Finding("note", "vm2", "in no group")]
    assert (await ctl(rig, "doctor")).code == 0
    rig.view.findings = [Finding("warning", "vm2", "no port", "attach one")]
    assert (await ctl(rig, "doctor")).code == 1
    rig.view.findings.append(Finding("error", "journal", "disk full", "make room"))
    ran = await ctl(rig, "doctor")
    assert ran.code == 1
    assert ran.lines[-2:] == ["error    journal: disk full", "         remedy: make room"]


async def test_a_bad_journal_is_named_with_its_record(rig: AdminRig) -> None:
    assert (await ctl(rig, "verify-journal")).lines[0] == "journal:   ok: 17 records, 1 to 17"
    rig.view.journal = VerifyResult(False, 3, 1, 3, "ab" * 32, "cd" * 32, 4, "record 4 was changed")
    ran = await ctl(rig, "verify-journal")
    assert ran.code == 1
    assert ran.lines[0] == "journal:   BAD at record 4: record 4 was changed"


async def test_a_journal_is_backed_up_and_restored_without_a_daemon(tmp_path: Path) -> None:
    journal, nobody, copy = JournalRig(tmp_path / "state"), tmp_path / "nobody.sock", tmp_path / "copy.db"
    await journal.filled(5)
    words = ("--state", str(journal.directory))
    ran = command(nobody, "journal", "backup", str(copy), *words)
    assert (ran.code, ran.lines[0]) == (0, "journal:   ok: 5 records, 1 to 5")
    assert command(nobody, "journal", "backup", str(copy), *words).code == 1
    async with journal.opened():
        ran = command(nobody, "journal", "restore", str(copy), *words)
        assert (ran.code, "another daemon" in ran.err) == (1, True)
    assert command(nobody, "journal", "restore", str(tmp_path / "none"), *words).code == 2
    assert command(nobody, "journal", "restore", str(copy), *words, "--json").code == 0
    async with journal.opened():
        pass
    ran = command(nobody, "verify-journal", "--file", str(journal.path))
    assert (ran.code, "restored from a backup at 6" in " ".join(ran.lines)) == (0, True)


async def test_a_journal_file_is_verified_without_a_daemon(tmp_path: Path) -> None:
    journal, nobody = JournalRig(tmp_path / "state"), tmp_path / "nobody.sock"
    await journal.filled(5)
    assert command(nobody, "verify-journal", "--file", str(journal.path)).code == 0
    copy = tmp_path / "key.pub"
    shutil.copy(journal.public_key, copy)
    words = ("verify-journal", "--file", str(journal.path), "--public-key", str(copy), "--json")
    assert json.loads(command(nobody, *words).out)["records"] == 5
    journal.tamper("UPDATE records SET body = '{}' WHERE seq = 2")
    ran = command(nobody, "verify-journal", "--file", str(journal.path))
    assert (ran.code, "BAD at record 2" in ran.out) == (1, True)
    journal.path.write_bytes(b"garbage" * 1000)
    assert command(nobody, "verify-journal", "--file", str(journal.path)).code == 1
    assert command(nobody, "verify-journal", "--file", str(tmp_path / "none.db")).code == 2
    assert command(nobody, "verify-journal", "--public-key", str(copy)).code == 2


# events
async def test_events_are_lines_as_they_happen(rig: AdminRig) -> None:
    rig.view.feed.put_nowait(AdminEvent(1.0, "vm.ended", "pid 99 ended", UUID2, "vm2"))
    rig.view.feed.put_nowait(None)
    ran = await ctl(rig, "events")
    assert ran.lines[0].endswith("vm.ended  vm2  pid 99 ended")
    rig.view.feed.put_nowait(AdminEvent(1.0, "vm.ended", "pid 99 ended", UUID2, "vm2"))
    rig.view.feed.put_nowait(None)
    ran = await ctl(rig, "events", "--json")
    assert json.loads(ran.lines[0])["kind"] == "vm.ended"
    assert ran.code == 1  # a live view that ends is not what was asked for


# exit codes
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["explode"],
        ["fence", "explode", "vm2"],
        ["fence", "list", "vm2"],
        ["fence", "off"],
        ["fence", "off", "vm2", "--timeout", "0"],
        ["fence", "off", "vm2", "--timeout", "nan"],
        ["fence", "off", "vm2", "--timeout", "soon"],
        ["ops", "--limit", "0"],
    ],
)
async def test_wrong_usage_ends_with_2_and_asks_nothing(
    rig: AdminRig, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (await ctl(rig, *words)).code == 2
    assert "usage: " in capsys.readouterr().err
    assert rig.view.orders == []


def test_help_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path / "none", "--help").code == 0
    assert command(tmp_path / "none", "fence", "--help").code == 0
    assert "Exit codes" in capsys.readouterr().out


async def test_an_unknown_operation_ends_with_1(rig: AdminRig) -> None:
    ran = await ctl(rig, "ops", "../../x?y")
    assert (ran.code, "not" in ran.err.lower()) == (1, True)


async def test_an_order_that_the_daemon_finds_malformed_ends_with_2(rig: AdminRig) -> None:
    ran = await ctl(rig, "fence", "off", "x" * 300)
    assert (ran.code, "vm must be text" in ran.err) == (2, True)
    assert rig.view.orders == []


@pytest.mark.parametrize("words", [["status"], ["fence", "off", "vm2"], ["events"], ["verify-journal"]])
def test_no_daemon_ends_with_4_and_says_what_to_do(tmp_path: Path, words: list[str]) -> None:
    ran = command(tmp_path / "none.sock", *words)
    assert ran.code == 4
    assert "systemctl start vmchanneld" in ran.err
    (tmp_path / "dead.sock").touch()
    assert command(tmp_path / "dead.sock", *words).code == 4
    assert command(tmp_path / ("x" * 200), *words).code == 4


class HalfDaemon:
    """Takes one request, sends these bytes, closes."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self.path = path
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(self._answer)

    def close(self) -> None:
        self._thread.join()
        self._socket.close()


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"ok":true}',
        b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops",
        SSE,
        SSE + b'event: progress\ndata: {"text":"x"}\n\n',
        SSE + b'event: answer\ndata: {"ok":tru',
        SSE + b'event: answer\ndata: {"ok":true}\n',  # not ended by its empty line: not whole
        SSE + b"event: answer\ndata: nonsense\n\n",
        SSE + b"event: answer\ndata: [true]\n\n",
        SSE + b'event: answer\ndata: {"ok":"yes"}\n\n',
        SSE + b'event: answer\ndata: {"ok":1}\n\n',
        SSE + b"event: answer\ndata: " + b"[" * 100_000 + b"\n\n",
    ],
)
def test_a_daemon_that_breaks_off_in_a_fence_is_a_failure_of_unknown_outcome(
    tmp_path: Path, answer: bytes
) -> None:
    daemon = HalfDaemon(tmp_path / "half.sock", answer)
    try:
        assert command(daemon.path, "fence", "off", "vm2").code == 1
    finally:
        daemon.close()


async def test_the_socket_may_be_named_before_or_behind_the_command(rig: AdminRig, tmp_path: Path) -> None:
    console = Console(io.StringIO(), io.StringIO(), 80)
    words = ["status", "--socket", str(rig.path)]
    assert await asyncio.to_thread(run, words, console) == 0
    assert await asyncio.to_thread(run, ["--socket", "/none", *words], console) == 0


async def test_the_program_ends_as_its_commands_do_and_imports_little(rig: AdminRig) -> None:
    script = (
        "import sys; from vmchannel_host.cli.main import main; code = main(sys.argv[1:])\n"
        "heavy = {'asyncio', 'aiohttp', 'cryptography', 'sqlite3', 'yaml'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    words = [sys.executable, "-c", script, "--socket", str(rig.path), "fence", "status", "vm2"]
    rig.view.answer = failed(FenceCode.REFUSED, "no rule é")
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = await asyncio.to_thread(
        subprocess.run, words, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == [
        "FAILED (refused): no rule \\xe9",
        "remedy: change the group in host.yaml or policy.d, then reload the daemon",
    ]


async def test_a_reader_that_goes_is_no_traceback(rig: AdminRig) -> None:
    rig.view.operations = [OPERATION] * 1000
    script = "import sys; from vmchannel_host.cli.main import main; sys.exit(main(sys.argv[1:]))"
    pipe = f'"{sys.executable}" -c "$@" | head -n 1'
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    done = await asyncio.to_thread(
        subprocess.run,
        ["sh", "-c", pipe, "sh", script, "--socket", str(rig.path), "ops", "--limit", "1000"],
        capture_output=True, text=True, timeout=60, check=False, env=environment,
    )  # fmt: skip
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


# the operator's word
async def test_a_word_is_given_by_typing_the_vms_name_after_reading_what_it_means(rig: AdminRig) -> None:
    ran = await ctl(rig, "confirm-off", "vm2", ask=lambda _: " vm2 ")
    assert ran.code == 0
    assert "problem: pid 99 is not proven to have ended" in ran.lines
    assert "data is destroyed" in ran.out
    assert "done: vm2: confirmed off by 'root'" in ran.lines
    assert [vm for vm, _ in rig.view.confirmations] == ["vm2"]


@pytest.mark.parametrize("typed", ["", "y", "yes", "vm1"])
async def test_another_answer_confirms_nothing(rig: AdminRig, typed: str) -> None:
    ran = await ctl(rig, "confirm-off", "vm2", ask=lambda _: typed)
    assert ran.code == 1
    assert "nothing was changed" in ran.err
    assert rig.view.confirmations == []


async def test_an_end_of_input_confirms_nothing(rig: AdminRig) -> None:
    def gone(_: str) -> str:
        raise EOFError

    assert (await ctl(rig, "confirm-off", "vm2", ask=gone)).code == 1
    assert rig.view.confirmations == []


async def test_without_a_terminal_the_word_needs_its_option(rig: AdminRig) -> None:
    ran = await ctl(rig, "confirm-off", "vm2")
    assert ran.code == 2
    assert "--yes" in ran.err
    assert rig.view.confirmations == []
    ran = await ctl(rig, "confirm-off", "vm2", "--yes", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["code"] == "done"


async def test_a_word_that_is_not_taken_fails_with_its_reason(rig: AdminRig) -> None:
    rig.view.confirmed = ConfirmView(False, FenceCode.FAILED, "not proven to have ended: pid 99")
    ran = await ctl(rig, "confirm-off", "vm2", "--yes")
    assert ran.code == 1
    assert ran.lines[0] == "NOT CONFIRMED (failed): not proven to have ended: pid 99"
    assert ran.lines[1].startswith("remedy: ")


# ports plugged in and out
async def test_an_attach_says_what_the_next_start_needs_in_one_line_to_copy(rig: AdminRig) -> None:
    ran = await ctl(rig, "attach", "vm2", "--timeout", "3")
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines[0] == "done: vm2: port org.vmchannel.0 attached"
    assert ran.lines[-1] == "  -device virtserialport,name=org.vmchannel.0"
    [order] = rig.view.plugs
    assert (order.attach, order.vm, order.port, order.timeout_s) == (True, "vm2", "org.vmchannel.0", 3.0)


async def test_a_detach_names_its_port_and_uses_force_when_told(rig: AdminRig) -> None:
    assert (await ctl(rig, "detach", "vm2")).code == 0
    assert (await ctl(rig, "detach", "vm2", "--port", "org.vmchannel.1", "--force")).code == 0
    assert [(one.attach, one.port, one.force) for one in rig.view.plugs] == [
        (False, "org.vmchannel.0", False),
        (False, "org.vmchannel.1", True),
    ]


@pytest.mark.parametrize(
    ("code", "exit_code"), [("busy", 1), ("no_slot", 1), ("unknown_plug", 1), ("bad_request", 2)]
)
async def test_an_attach_that_failed_says_why_and_what_to_do(
    rig: AdminRig, code: str, exit_code: int
) -> None:
    rig.view.plugged["vm2"] = PlugOutcome(code, "because of it", "do this")
    ran = await ctl(rig, "attach", "vm2")
    assert (ran.code, ran.out) == (exit_code, "")
    assert ran.err == "vmchannelctl: because of it\nremedy: do this\n"


@pytest.mark.parametrize("words", [[], ["vm2", "--all"], ["--all", "--force"], ["--all", "--port", "x"]])
async def test_a_detach_is_of_one_vm_or_of_all(rig: AdminRig, words: list[str]) -> None:
    assert (await ctl(rig, "detach", *words)).code == 2
    assert rig.view.plugs == []


async def test_detach_all_asks_every_vm_by_its_uuid_and_passes_by_what_attach_did_not_make(
    rig: AdminRig,
) -> None:
    rig.view.plugged[UUID1] = PlugOutcome("not_running", "it does not run here")
    ran = await ctl(rig, "detach", "--all")
    assert [(one.vm, one.port, one.force) for one in rig.view.plugs] == [
        (UUID1, "", False),
        (UUID2, "", False),
    ]
    assert ran.code == 0
    assert ran.lines[0] == "done: vm2: port org.vmchannel.0 attached", "as the view said"
    assert "vm1" not in ran.out


async def test_detach_all_asks_what_is_only_defined_too_and_fails_where_that_is_not_known(
    rig: AdminRig,
) -> None:
    vms = (DefinedVm(UUID2, "vm2"), DefinedVm("aaaaaaaa-0000-4000-8000-000000000009", "a\tb"))
    rig.view.defined = DefinitionsView(vms, ())
    assert (await ctl(rig, "detach", "--all")).code == 0
    assert [one.vm for one in rig.view.plugs] == [UUID1, UUID2, vms[1].uuid]
    rig.view.defined = DefinitionsView(vms, ("qemu:///system is not connected",))
    ran = await ctl(rig, "detach", "--all")
    assert (ran.code, len(rig.view.plugs)) == (1, 6)
    assert ran.lines[0] == "FAILED: qemu:///system is not connected: it may have VMs with such ports"
    ran = await ctl(rig, "detach", "--all", "--json")
    assert [one["code"] for one in json.loads(ran.out)] == ["no_monitor", "done", "done", "done"]


async def test_detach_all_goes_on_after_a_failure_and_ends_with_1(rig: AdminRig) -> None:
    rig.view.plugged[UUID1] = PlugOutcome("busy", "busy op=7: the VM is being fenced", "wait for its end")
    ran = await ctl(rig, "detach", "--all")
    assert ran.code == 1
    assert ran.lines[:2] == [
        "FAILED (busy): vm1: busy op=7: the VM is being fenced",
        "  remedy: wait for its end",
    ]
    assert len(rig.view.plugs) == 2
    ran = await ctl(rig, "detach", "--all", "--json")
    assert [one["code"] for one in json.loads(ran.out)] == ["busy", "done"]


async def test_detach_all_says_so_when_there_is_nothing(rig: AdminRig) -> None:
    for vm in (UUID1, UUID2):
        rig.view.plugged[vm] = PlugOutcome("already", "no port was attached to it")
    ran = await ctl(rig, "detach", "--all")
    assert (ran.code, ran.lines) == (0, ["no VM has a port that was attached"])
