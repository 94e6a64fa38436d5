# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fuzz all targets, or those named: `python -m tests.fuzz [--seconds S] [TARGET...]`. `--list` names them.

First a planted bug must be found: a fuzzer that sees nothing would find nothing either.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / ".cache" / "fuzz"
SECONDS: Final = 60.0
"""For each target."""

PLANTED_S: Final = 60
"""At most: the planted bug takes a second or two to find, on a loaded machine ten times as long."""


def fuzz(name: str, seconds: float, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    """Run the driver for one target, in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.driver", name, str(seconds), str(folder)]
    paths = ":".join(str(ROOT / part) for part in (".", "host", "guest", "agents"))
    return subprocess.run(
        command,
        cwd=ROOT,
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds + 300,
        check=False,
    )


def executions(output: str) -> int:
    """How many inputs a driver says it tried; 0 when it does not."""
    found = re.search(r"number_of_executed_units: (\d+)", output)
    return int(found[1]) if found else 0


def planted_bug_is_found(folder: Path = FOLDER) -> bool:
    """Whether the fuzzer finds its way through three checks."""
    for old in (folder / "corpus" / "planted").glob("*"):
        old.unlink()  # so that it is found again each time
    done = fuzz("planted", PLANTED_S, folder)
    return done.returncode != 0 and "PlantedBugError" in done.stdout


def main() -> int:
    """0 when nothing broke, 1 when something did, 2 when the fuzzer is not there or blind."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each target")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument("targets", nargs="*")
    options = parser.parse_args()
    from tests.fuzz.catalogue import TARGETS

    if options.list:
        print("\n".join(TARGETS))
        return 0
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if not planted_bug_is_found():
        print("planted bug: NOT FOUND; is atheris installed (make deps)?")
        return 2
    print("planted bug: found", flush=True)
    broken = 0
    for name in options.targets or TARGETS:
        done = fuzz(name, options.seconds)
        verdict = "nothing broke" if done.returncode == 0 else f"BROKE\n{done.stdout[-6000:]}"
        print(f"{name}: {options.seconds:g} s, {executions(done.stdout):,} inputs, {verdict}", flush=True)
        broken += done.returncode != 0
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
