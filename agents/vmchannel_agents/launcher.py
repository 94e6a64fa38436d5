# SPDX-License-Identifier: GPL-2.0-or-later
"""The file that Pacemaker runs: where it must lie, and what stands in it.

Pacemaker and pcs look in one directory only, and the library takes the agent's name from the file's: it must
be called fence_vmchannel. It needs the system's Python, which has what fencing.py imports (pycurl, pexpect);
our packages may lie elsewhere.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import fence_vmchannel
import vmchannel_agents
import vmchannel_guest

AGENT: Final = "fence_vmchannel"
SYSTEM_PYTHON: Final = "/usr/bin/python3"
AGENT_FOLDER: Final = "/usr/sbin"

_TEMPLATE = """\
#!{python} -I
import sys

sys.path[0:0] = {paths!r}
from vmchannel_agents.entry import main

sys.exit(main())
"""


def launcher_text(paths: Sequence[str], python: str = SYSTEM_PYTHON) -> str:
    """The script; `paths` are put before the system's own places. No environment variable changes it (-I)."""
    return _TEMPLATE.format(python=python, paths=list(paths))


def package_roots() -> list[str]:
    """The directories that hold the packages which the agent needs, as they are imported now."""
    packages = (fence_vmchannel, vmchannel_guest, vmchannel_agents)
    files = [package.__file__ for package in packages]
    return list(dict.fromkeys(str(Path(file).resolve().parents[1]) for file in files if file))


def install(folder: str, paths: Sequence[str], python: str = SYSTEM_PYTHON) -> Path:
    """Write the agent into `folder`, replacing what is there in one step. Raises OSError."""
    target = Path(folder) / AGENT
    draft = target.with_name(f".{AGENT}.{os.getpid()}")
    try:
        draft.write_text(launcher_text(paths, python), encoding="utf-8")
        draft.chmod(0o755)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def main() -> int:
    """`python -m vmchannel_agents.launcher`: make the agent of this installation known to Pacemaker."""
    parser = argparse.ArgumentParser(description="Install the fence agent for Pacemaker.")
    parser.add_argument("--folder", default=AGENT_FOLDER, help="default: %(default)s")
    parser.add_argument("--python", default=SYSTEM_PYTHON, help="default: %(default)s")
    options = parser.parse_args()
    try:
        print(install(options.folder, package_roots(), options.python))
    except OSError as error:
        print(f"cannot install the agent: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
