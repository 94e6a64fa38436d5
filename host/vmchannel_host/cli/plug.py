# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannelctl attach and detach."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Final

from fence_vmchannel.addresses import DEFAULT_PORT
from vmchannel_host.cli import show
from vmchannel_host.cli.console import Console, ExitCode
from vmchannel_host.cli.http_client import AdminClient, CliError, Doc, docs
from vmchannel_host.printable import printable

_GRACE_S: Final = 10.0  # beyond the daemon's own time-out

_LEFT_ALONE: Final = ("not_running", "not_ours", "unsupported")
"""What `detach --all` passes by: there is nothing that an attach has made."""


def add_attach(one: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    one.add_argument("vm", metavar="VM", help="UUID, name or alias")
    _add_common(one)


def add_detach(one: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    one.add_argument("vm", metavar="VM", nargs="?", help="UUID, name or alias")
    one.add_argument("--all", action="store_true", help="every port that attach made, of every VM")
    one.add_argument("--force", action="store_true", help="also a port that attach did not make")
    _add_common(one)


def _add_common(one: argparse.ArgumentParser) -> None:
    one.add_argument("--port", metavar="NAME", default=None, help=f"the port's name (default {DEFAULT_PORT})")
    one.add_argument(
        "--timeout", type=_seconds, default=20.0, metavar="SECONDS", help="answer within (default 20)"
    )


def attach(arguments: argparse.Namespace, console: Console) -> int:
    """Run `attach`."""
    order = {"vm": arguments.vm, "port": arguments.port or DEFAULT_PORT, "timeout_s": arguments.timeout}
    return _order("/v1/attach", order, arguments, console)


def detach(arguments: argparse.Namespace, console: Console) -> int:
    """Run `detach`."""
    if arguments.all == bool(arguments.vm):
        raise CliError(ExitCode.USAGE, "name a VM, or --all")
    if not arguments.all:
        order = {"vm": arguments.vm, "port": arguments.port or DEFAULT_PORT, "force": arguments.force}
        return _order("/v1/detach", {**order, "timeout_s": arguments.timeout}, arguments, console)
    if arguments.port or arguments.force:
        raise CliError(ExitCode.USAGE, "--all takes away what attach made: --port and --force go with a VM")
    return _detach_all(arguments, console)


def _order(path: str, order: Mapping[str, object], arguments: argparse.Namespace, console: Console) -> int:
    client = AdminClient(str(arguments.socket))
    value = client.post(path, order, timeout_s=arguments.timeout + _GRACE_S).checked()
    if arguments.json:
        console.json(value)
    else:
        console.lines(show.plugged(Doc(value), console.width))
    return ExitCode.DONE


def _detach_all(arguments: argparse.Namespace, console: Console) -> int:
    """One VM after the other, those that are only defined too; one that fails stops none."""
    client = AdminClient(str(arguments.socket))
    defined = Doc(client.get("/v1/definitions").checked())
    vms = {vm.text("uuid"): vm for vm in (*docs(client.get("/v1/vms").checked()), *defined.docs("vms"))}
    problems = defined.texts("problems")
    answers: list[object] = [{"ok": False, "code": "no_monitor", "reason": text} for text in problems]
    failed = bool(problems)
    if not arguments.json:
        console.lines(
            [f"FAILED: {printable(text, 500)}: it may have VMs with such ports" for text in problems]
        )
    for vm in vms.values():
        order = {"vm": vm.text("uuid"), "port": None, "timeout_s": arguments.timeout}
        answer = client.post("/v1/detach", order, timeout_s=arguments.timeout + _GRACE_S)
        doc = answer.doc
        if doc.text("code") in _LEFT_ALONE:
            continue
        answers.append(answer.value)
        good = answer.status == 200 and doc.flag("ok")
        failed = failed or not good
        if arguments.json:
            continue
        if not good:
            console.lines(show.not_plugged(vm, doc, console.width))
        elif doc.texts("ports"):
            console.lines(show.plugged(doc, console.width))
    if arguments.json:
        console.json(answers)
    elif not any(Doc(value).texts("ports") for value in answers) and not failed:
        console.lines(["no VM has a port that was attached"])
    return ExitCode.FAILED if failed else ExitCode.DONE


def _seconds(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not 0 < value <= 3600:
        raise argparse.ArgumentTypeError("more than 0 and at most 3600 seconds")
    return value
