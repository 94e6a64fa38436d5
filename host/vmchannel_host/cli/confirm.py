# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannelctl confirm-off: asks for the operator's word as plainly as it will count."""

from __future__ import annotations

import argparse
from typing import Final

from vmchannel_host.cli import show
from vmchannel_host.cli.console import Console, ExitCode
from vmchannel_host.cli.http_client import AdminClient, CliError, Doc, docs
from vmchannel_host.printable import printable

MEANING: Final = (
    "You say: no copy of this VM runs anywhere, on no other host and from no saved state, and its last "
    "writes have reached its disks. The cluster will start its services elsewhere on this word. If it is "
    "wrong, data is destroyed."
)


def add_confirm(one: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    one.add_argument("vm", metavar="VM", help="UUID, name or alias")
    one.add_argument("--yes", action="store_true", help="the word is given: do not ask")


def confirm_off(arguments: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    client = AdminClient(str(arguments.socket))
    if not arguments.yes and not _asked(client, str(arguments.vm), console):
        console.err.write("vmchannelctl: not confirmed; nothing was changed\n")
        return ExitCode.FAILED
    answer = client.post("/v1/confirm-off", {"vm": arguments.vm})
    doc = answer.doc
    if "ok" not in doc.raw:
        answer.checked()  # an error of the API itself
    if arguments.json:
        console.json(answer.value)
    else:
        console.lines(show.confirmed(doc, console.width))
    return ExitCode.DONE if answer.status == 200 and doc.flag("ok") else ExitCode.FAILED


def _asked(client: AdminClient, vm: str, console: Console) -> bool:
    """Whether the operator has typed the VM's name after reading what that means."""
    if console.ask is None:
        raise CliError(ExitCode.USAGE, f"confirm-off needs your word: {MEANING}\nremedy: give it with --yes")
    known = docs(client.get("/v1/vms").checked())
    doc = next((one for one in known if vm in (one.text("name"), one.text("uuid"))), Doc(None))
    console.lines(show.confirm_question(vm, doc, MEANING, console.width))
    try:
        typed = console.ask(f"Type {printable(vm, 100)} to confirm: ")
    except EOFError:
        return False
    return typed.strip() == vm
