# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmchanneld`: the host daemon's command line, its signals and its exit codes."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TextIO

import fence_vmchannel
from vmchannel_host import logs
from vmchannel_host.config.loading import (
    DEFAULT_CONFIG,
    ConfigError,
    HostConfig,
    check_config,
    load_config,
)
from vmchannel_host.daemon import Daemon, StartError, build
from vmchannel_host.notify import Notifier

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

GC_THRESHOLDS: Final = (10_000, 20, 100)
"""A full collection looks at every object, and nothing else runs meanwhile: with 1,000 VMs some tenths of a
second. What the daemon drops is freed without it, but for rare cycles, so it may come rarely."""

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon until SIGTERM; returns the exit code: 0 stopped, 1 failed, 2 wrong configuration."""
    options = _parser().parse_args(argv)
    if options.check_config is not None:
        return _check(options.check_config, sys.stdout, sys.stderr)
    try:
        config = load_config(options.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    logs.configure(config.log.level.value, sys.stderr, for_journald="JOURNAL_STREAM" in os.environ)
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        notifier = Notifier(os.environ)
        asyncio.run(run(build(config, file=options.config, notifier=notifier), options.config))
    except (StartError, ValueError) as error:
        _log.error("cannot start: %s", error)
        return EXIT_FAILED
    return 0


async def run(daemon: Daemon, config_path: Path) -> None:
    """Run a built daemon; SIGTERM and SIGINT stop it in order, SIGHUP reads the configuration again.

    Raises:
        StartError: it could not start; nothing was fenced.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop)
    loop.add_signal_handler(signal.SIGHUP, reload, daemon, config_path)
    try:
        await daemon.run()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


def reload(daemon: Daemon, config_path: Path) -> None:
    """Read the configuration again (blocks briefly); a wrong one changes nothing (S10)."""
    try:
        config: HostConfig = load_config(config_path)
    except ConfigError as error:
        for problem in error.problems:
            _log.error("configuration not taken over: %s", problem)
        return
    daemon.reload(config)


def _check(path: Path, out: TextIO, err: TextIO) -> int:
    problems = check_config(path)
    for problem in problems:
        print(problem, file=err)
    if problems:
        return EXIT_USAGE
    print(f"{path}: no problem found", file=out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmchanneld",
        description="Serves the org.vmchannel.* ports of this host's VMs, and fences them with proof.",
        epilog="Signals: SIGTERM stops, SIGHUP reads the configuration again. "
        "Exit codes: 0 stopped in order, 1 failed, 2 usage or configuration.",
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, default=DEFAULT_CONFIG, help="default: %(default)s"
    )
    parser.add_argument(
        "--check-config", metavar="FILE", type=Path, help="say what is wrong with FILE, and do nothing else"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {fence_vmchannel.__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
