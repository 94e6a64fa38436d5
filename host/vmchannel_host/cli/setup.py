# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannelctl setup: from the VMs that there are to a policy file and the line for the cluster."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from vmchannel_host.cli import show
from vmchannel_host.cli.console import Console, ExitCode
from vmchannel_host.cli.http_client import AdminClient, CliError, docs
from vmchannel_host.policy.proposal import KnownVm, Proposal, WrongGroup, propose, read_group, render

PCS: Final = "pcs stonith create vmfence fence_vmchannel"
FILE: Final = "setup.yaml"

Ask = Callable[[str], str]


def add_setup(one: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    one.add_argument(
        "--group",
        metavar="NAME=VM,VM",
        action="append",
        default=[],
        help="make this group, and no other than those given so; VMs by name or UUID",
    )
    one.add_argument("--dry-run", action="store_true", help="show the file, write nothing")
    one.add_argument("--yes", action="store_true", help="take what is proposed, do not ask")
    one.add_argument("--force", action="store_true", help="replace the file if it exists")
    one.add_argument(
        "--config",
        metavar="FILE",
        help="host.yaml beside policy.d (default /etc/vmchannel/host.yaml)",
    )
    one.add_argument(
        "--file", metavar="NAME", default=FILE, help="name of the file in policy.d (default %(default)s)"
    )


def setup(arguments: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    # Imported here: YAML and its schema would slow every other command down.
    from vmchannel_host.config.loading import DEFAULT_CONFIG, POLICY_DIR
    from vmchannel_host.config.placing import place, problems_with

    config = Path(arguments.config) if arguments.config else DEFAULT_CONFIG
    name = str(arguments.file)
    if "/" in name or name.startswith(".") or not name.endswith(".yaml"):
        raise CliError(ExitCode.USAGE, f"--file: {name!r} is no file of policy.d: NAME.yaml")
    path = config.parent / POLICY_DIR / name
    groups = _choose(arguments, console)
    text = render(groups)
    try:
        problems = problems_with(config, name, text)
        if problems:
            raise CliError(ExitCode.USAGE, "\n".join(("nothing was written:", *problems)))
        written = not arguments.dry_run and _agreed(arguments, console, path, text)
        if written:
            place(path, text, replace=bool(arguments.force))
    except FileExistsError as error:
        raise CliError(
            ExitCode.FAILED, f"{path} exists; nothing was written\nremedy: --force, or --file"
        ) from error
    except OSError as error:
        raise CliError(ExitCode.FAILED, f"{path}: {error.strerror or error}; nothing was written") from error
    _tell(arguments, console, path, text, groups, written=written)
    return ExitCode.DONE if written or arguments.dry_run else ExitCode.FAILED


def _choose(arguments: argparse.Namespace, console: Console) -> tuple[Proposal, ...]:
    """The groups to be written: those of the command line, else what is proposed, as far as it is taken."""
    value = AdminClient(str(arguments.socket)).get("/v1/vms").checked()
    vms = [KnownVm(doc.text("uuid"), doc.text("name"), tuple(doc.texts("groups"))) for doc in docs(value)]
    ask = None if arguments.yes or arguments.json else console.ask
    try:
        if arguments.group:
            return tuple(read_group(text, vms) for text in arguments.group)
        proposed = propose(vms)
        if ask is not None:
            console.lines(show.vms(docs(value), console.width))
            proposed = _asked(ask, console, proposed, vms)
        elif not arguments.yes and not arguments.dry_run:
            told = "".join(f"\n  {one}" for one in proposed) or " none"
            raise CliError(
                ExitCode.USAGE, f"nobody is here to be asked: give --group, or --yes to take these:{told}"
            )
    except WrongGroup as error:
        raise CliError(ExitCode.USAGE, f"{error}") from error
    if not proposed:
        raise CliError(
            ExitCode.FAILED,
            "there is no group to write: no VMs without a group have numbered names of one kind\n"
            "remedy: name groups with --group NAME=VM,VM",
        )
    return proposed


def _asked(
    ask: Ask, console: Console, proposed: Sequence[Proposal], vms: Sequence[KnownVm]
) -> tuple[Proposal, ...]:
    """Let the operator take, leave and add groups."""
    taken: list[Proposal] = []
    for one in proposed:
        console.lines(show.plain(f"Proposed group {one}", console.width))
        if _yes(ask, "Make this group? [Y/n] ", default=True):
            taken.append(one)
    while text := _read(ask, "Another group, as NAME=VM,VM (nothing to go on): "):
        try:
            taken.append(read_group(text, vms))
        except WrongGroup as error:
            console.lines(show.plain(str(error), console.width))
    return tuple(taken)


def _agreed(arguments: argparse.Namespace, console: Console, path: Path, text: str) -> bool:
    if arguments.yes or arguments.group or console.ask is None:
        return True
    console.lines([f"{path}:", *(f"  {line}" for line in text.splitlines())])
    return _yes(console.ask, "Write it? [y/N] ", default=False)


def _yes(ask: Ask, question: str, *, default: bool) -> bool:
    answer = _read(ask, question).lower()
    return answer in ("y", "yes") if answer else default


def _read(ask: Ask, question: str) -> str:
    try:
        return ask(question).strip()
    except EOFError as error:
        raise CliError(ExitCode.FAILED, "the input ended; nothing was written") from error


def _tell(
    arguments: argparse.Namespace,
    console: Console,
    path: Path,
    text: str,
    groups: Sequence[Proposal],
    *,
    written: bool,
) -> None:
    if arguments.json:
        members = {one.name: [vm.uuid for vm in one.members] for one in groups}
        console.json({"file": str(path), "written": written, "groups": members, "text": text, "pcs": PCS})
        return
    if arguments.dry_run:
        console.out.write(text)
        console.lines(["", f"Nothing was written. Without --dry-run this becomes {path}."])
        return
    if not written:
        console.lines(["Nothing was written."])
        return
    console.lines(
        [
            f"Written: {path}",
            "Let the daemon read it:  systemctl reload vmchanneld",
            f"In the cluster, once:    {PCS}",
        ]
    )
