# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannelctl: the operator's tool. Asks the daemon over its admin socket and shows what it says."""

from __future__ import annotations

import argparse
import io
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Final

from vmchannel_host.cli import show
from vmchannel_host.cli.confirm import add_confirm, confirm_off
from vmchannel_host.cli.console import Console, ExitCode
from vmchannel_host.cli.doctor import add_doctor, doctor
from vmchannel_host.cli.http_client import AdminClient, Answer, BrokenOff, CliError, Doc, docs, told
from vmchannel_host.cli.plug import add_attach, add_detach, attach, detach
from vmchannel_host.cli.progress import ProgressLine
from vmchannel_host.cli.setup import add_setup, setup

DEFAULT_SOCKET: Final = "/run/vmchannel/admin.sock"
DEFAULT_STATE: Final = "/var/lib/vmchannel"
ACTIONS: Final = ("off", "on", "reboot", "status")
_WIDTH: Final = 80  # of a table that goes to no terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal that knows no "é" must not end the tool
    width = shutil.get_terminal_size((_WIDTH, 24)).columns if sys.stdout.isatty() else _WIDTH
    ask = input if sys.stdin is not None and sys.stdin.isatty() else None
    return run(sys.argv[1:] if argv is None else argv, Console(sys.stdout, sys.stderr, width, ask))


def run(argv: Sequence[str], console: Console) -> int:
    """Run one command on a console."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as ended:  # argparse has said why
        return ExitCode.DONE if not ended.code else ExitCode.USAGE
    command: Callable[[argparse.Namespace, Console], int] = arguments.command
    try:
        code = command(arguments, console)
        console.out.flush()
        return code
    except CliError as error:
        console.err.write(f"vmchannelctl: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        console.err.write("\nvmchannelctl: interrupted; an operation that has begun goes on\n")
        return ExitCode.FAILED
    except BrokenPipeError:
        # The reader of our output went (`| head`). stdout is given a place to be flushed to at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
        return ExitCode.FAILED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="vmchannelctl",
        description="Show and fence virtual machines through vmchanneld on this host.",
        epilog="Exit codes: 0 done, 1 failed or unknown, 2 usage or configuration, 3 refused by policy, "
        "4 daemon not reached. See vmchannelctl(8).",
    )
    top.add_argument("--socket", metavar="PATH", default=DEFAULT_SOCKET, help="admin socket (%(default)s)")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace, Console], int], text: str
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        # Also behind the command, without undoing one that stands before it.
        one.add_argument(
            "--socket", metavar="PATH", default=argparse.SUPPRESS, help="admin socket of the daemon"
        )
        one.add_argument("--json", action="store_true", help="print JSON")
        one.set_defaults(command=command)
        return one

    add("status", _status, "show the daemon and what stops fencing now")
    add("vms", _list("/v1/vms", show.vms), "list the VMs")
    add("ports", _list("/v1/ports", show.ports), "list the ports that are served")
    add("hosts", _list("/v1/hosts", show.hosts), "list the hosts that could hold a VM")
    add_doctor(add("doctor", doctor, "tell what is wrong and what to do"))
    add_setup(add("setup", setup, "propose groups of VMs and write them into policy.d"))
    add("events", _events, "show what happens, until interrupted")
    _add_fence(add("fence", _fence, "change or ask the power state of a VM"))
    add_confirm(add("confirm-off", confirm_off, "take your word that a VM which left this host is off"))
    add_attach(add("attach", attach, "plug a port into a running VM"))
    add_detach(add("detach", detach, "take a port away from a running VM, or from all of them"))
    _add_can(add("can", _can, "tell whether VM may do ACTION to PLUG, and whether it could be proven now"))
    _add_ops(add("ops", _ops, "list operations, or show one with its evidence"))
    _add_verify(add("verify-journal", _verify, "check every record of the journal"))
    _add_journal(add("journal", _journal, "copy the journal, or put a copy back"))
    return top


def _add_fence(one: argparse.ArgumentParser) -> None:
    one.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    one.add_argument("vm", metavar="VM", help="UUID, name or alias")
    one.add_argument(
        "--timeout", type=_seconds, default=40.0, metavar="SECONDS", help="answer within (default 40)"
    )


def _add_can(one: argparse.ArgumentParser) -> None:
    one.add_argument("vm", metavar="VM", help="who would ask")
    one.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    one.add_argument("plug", metavar="PLUG", help="what would be fenced")


def _add_ops(one: argparse.ArgumentParser) -> None:
    one.add_argument("operation", metavar="ID", nargs="?", help="show this one with its evidence")
    one.add_argument(
        "--limit", type=_limit, default=20, metavar="N", help="how many to list (default %(default)s)"
    )


def _add_verify(one: argparse.ArgumentParser) -> None:
    one.add_argument("--file", metavar="PATH", help="check this file instead of asking the daemon")
    one.add_argument(
        "--public-key",
        metavar="PATH",
        help="with --file: the key, best from a copy kept elsewhere (default: journal.key.pub beside it)",
    )


def _add_journal(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "what",
        choices=("backup", "restore"),
        metavar="backup|restore",
        help="backup: copy it to FILE, also while the daemon runs; restore: put FILE in its place",
    )
    one.add_argument("file", metavar="FILE", help="the copy")
    one.add_argument(
        "--state", metavar="DIR", default=DEFAULT_STATE, help="paths.state of host.yaml (%(default)s)"
    )


def _client(arguments: argparse.Namespace) -> AdminClient:
    return AdminClient(str(arguments.socket))


def _list(
    path: str, lines: Callable[[Sequence[Doc], int], list[str]]
) -> Callable[[argparse.Namespace, Console], int]:
    """A command that shows a list."""

    def command(arguments: argparse.Namespace, console: Console) -> int:
        value = _client(arguments).get(path).checked()
        if arguments.json:
            console.json(value)
        else:
            console.lines(lines(docs(value), console.width))
        return ExitCode.DONE

    return command


def _status(arguments: argparse.Namespace, console: Console) -> int:
    value = _client(arguments).get("/v1/status").checked()
    if arguments.json:
        console.json(value)
    else:
        console.lines(show.status(Doc(value), console.width))
    return ExitCode.DONE


def _ops(arguments: argparse.Namespace, console: Console) -> int:
    client = _client(arguments)
    if arguments.operation:
        value = client.get(f"/v1/ops/{arguments.operation}").checked()
        lines = show.operation(Doc(value), console.width)
    else:
        value = client.get("/v1/ops", {"limit": str(arguments.limit)}).checked()
        lines = show.operations(docs(value), console.width)
    if arguments.json:
        console.json(value)
    else:
        console.lines(lines)
    return ExitCode.DONE


def _can(arguments: argparse.Namespace, console: Console) -> int:
    query = {"vm": arguments.vm, "action": arguments.action, "plug": arguments.plug}
    value = _client(arguments).get("/v1/can", query).checked()
    doc = Doc(value)
    if arguments.json:
        console.json(value)
    else:
        console.lines(show.can(doc, console.width))
    if not doc.flag("allowed"):
        return ExitCode.REFUSED
    return ExitCode.DONE if doc.flag("provable") else ExitCode.FAILED


def _fence(arguments: argparse.Namespace, console: Console) -> int:
    order = {
        "request_id": os.urandom(16).hex(),
        "action": arguments.action,
        "vm": arguments.vm,
        "timeout_s": arguments.timeout,
    }
    # The daemon answers within the time-out and a grace of its own; then the outcome is unknown.
    patience_s = arguments.timeout + 15.0
    answer: object = None
    with ProgressLine(console.err, f"{arguments.action} {arguments.vm}", width=console.width) as line:
        for kind, value in _client(arguments).stream("POST", "/v1/fence", order, timeout_s=patience_s):
            if isinstance(value, Answer):
                value.checked()
                raise BrokenOff("the daemon gave another answer than asked for; the outcome is unknown")
            if kind == "progress":
                line.update(Doc(value).text("text"))
            elif kind == "error":
                raise BrokenOff(told(Doc(value)))
            elif kind == "answer":
                answer = value
                break
    if answer is None:
        raise BrokenOff("the daemon gave no answer: the outcome is unknown, see `vmchannelctl ops`")
    return _fence_answer(arguments, console, answer)


def _fence_answer(arguments: argparse.Namespace, console: Console, answer: object) -> int:
    doc = Doc(answer)
    if arguments.json:
        console.json(answer)
    else:
        console.lines(show.answer(doc, console.width))
    if doc.flag("ok"):
        return ExitCode.DONE
    by_code = {"refused": ExitCode.REFUSED, "void": ExitCode.REFUSED, "bad_request": ExitCode.USAGE}
    return by_code.get(doc.text("code"), ExitCode.FAILED)


def _events(arguments: argparse.Namespace, console: Console) -> int:
    for _, value in _client(arguments).stream("GET", "/v1/events", None, timeout_s=60.0):
        if isinstance(value, Answer):
            value.checked()
            raise BrokenOff("the daemon gave another answer than asked for")
        if arguments.json:
            console.json(value, indent=None)
        else:
            console.lines(show.event(Doc(value), console.width))
            console.out.flush()
    raise BrokenOff("the daemon ended the live view: it stops")


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.public_key and not arguments.file:
        raise CliError(ExitCode.USAGE, "--public-key goes with --file; the daemon checks with its own key")
    if arguments.file:
        value = _verify_offline(arguments.file, arguments.public_key)
    else:
        value = _client(arguments).get("/v1/journal/verify", timeout_s=3600.0).checked()
    doc = Doc(value)
    if arguments.json:
        console.json(value)
    else:
        console.lines(show.verified(doc, console.width))
    return ExitCode.DONE if doc.flag("ok") else ExitCode.FAILED


def _verify_offline(file: str, public_key: str | None) -> object:
    # Imported here: SQLite and cryptography would slow every other command down.
    from dataclasses import asdict
    from pathlib import Path

    from vmchannel_host.journal.types import JournalError
    from vmchannel_host.journal.verify import verify_file

    path = Path(file)
    key = Path(public_key) if public_key else path.with_name("journal.key.pub")
    for needed in (path, key):
        if not needed.is_file():
            raise CliError(ExitCode.USAGE, f"{needed}: no such file")
    try:
        return asdict(verify_file(path, key))
    except JournalError as error:
        raise CliError(ExitCode.FAILED, str(error)) from error


def _journal(arguments: argparse.Namespace, console: Console) -> int:
    # Imported here: SQLite and cryptography would slow every other command down.
    from dataclasses import asdict
    from pathlib import Path

    from vmchannel_host.journal.backup import back_up, restore
    from vmchannel_host.journal.types import JournalError

    journal, key = Path(arguments.state, "journal.db"), Path(arguments.state, "journal.key")
    copy = Path(arguments.file)
    needed = journal if arguments.what == "backup" else copy
    if not needed.is_file():
        raise CliError(ExitCode.USAGE, f"{needed}: no such file")
    try:
        result = back_up(journal, key, copy) if arguments.what == "backup" else restore(copy, journal, key)
    except JournalError as error:
        raise CliError(ExitCode.FAILED, str(error)) from error
    if arguments.json:
        console.json(asdict(result))
    else:
        console.lines(show.verified(Doc(asdict(result)), console.width))
    return ExitCode.DONE


def _seconds(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not 0 < value <= 3600:
        raise argparse.ArgumentTypeError("more than 0 and at most 3600 seconds")
    return value


def _limit(text: str) -> int:
    value = int(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError("1 to 1000")
    return value


if __name__ == "__main__":
    sys.exit(main())
