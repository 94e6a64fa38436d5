# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannelctl doctor: asks the daemon what is wrong, or looks itself where none runs."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Final

from vmchannel_host.cli import show
from vmchannel_host.cli.console import Console, ExitCode
from vmchannel_host.cli.http_client import AdminClient, NotReached, docs

OFFLINE_S: Final = 10.0


def add_doctor(one: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    one.add_argument(
        "--config",
        metavar="FILE",
        help="configuration to look at when the daemon does not run (default /etc/vmchannel/host.yaml)",
    )


def doctor(arguments: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    try:
        value: object = AdminClient(str(arguments.socket)).get("/v1/doctor").checked()
    except NotReached as error:
        value = _without_daemon(error, arguments.config)
        code = ExitCode.NOT_REACHED
    else:
        wrong = any(finding.text("level") != "note" for finding in docs(value))
        code = ExitCode.FAILED if wrong else ExitCode.DONE
    if arguments.json:
        console.json(value)
    else:
        console.lines(show.findings(docs(value), console.width))
    return code


def _without_daemon(error: NotReached, file: str | None) -> list[object]:
    """What can be seen without the daemon."""
    # Imported here: YAML and its schema would slow every other command down.
    from vmchannel_host.admin.view import Finding
    from vmchannel_host.config.loading import DEFAULT_CONFIG, ConfigError, load_config
    from vmchannel_host.doctor.facts import MachineFacts
    from vmchannel_host.doctor.machine import collect
    from vmchannel_host.doctor.rules import ERROR, judge

    text, _, remedy = str(error).partition("\nremedy: ")
    found = [Finding(ERROR, "daemon", text, remedy)]
    try:
        config = load_config(Path(file) if file else DEFAULT_CONFIG)
    except ConfigError as problem:
        facts = MachineFacts(config=tuple(map(str, problem.problems)))
    else:
        facts = collect(config, daemon=None, timeout_s=OFFLINE_S)
    return [asdict(finding) for finding in (*found, *judge(facts, None))]
