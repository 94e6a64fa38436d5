# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the agent begins: it answers `metadata` on stdin by itself, and leaves all else to `fence_agent`.

Pacemaker's fencer stands still while it waits for metadata, ten seconds at most, and is restarted when that
lasts: on a node under heavy load the import of the fence-agents library alone can take so long.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Final

FENCE_LIBRARY: Final = "/usr/share/fence"
"""As in `library`, whose import would cost what is to be spared here."""

LIBRARY_VERSION: Final = b'RELEASE_VERSION = "4.12.1"'
"""What made `metadata.xml`. Another version has other standard options: then it is asked itself."""


def main(folder: str = FENCE_LIBRARY) -> int:
    """The command `fence_vmchannel`; returns its exit code. `folder` is where fencing.py is."""
    if len(sys.argv) == 1:
        given = sys.stdin.buffer.read()
        if wants_metadata(given) and (text := stored_metadata(folder)):
            sys.stdout.buffer.write(text)
            sys.stdout.flush()
            return 0
        sys.stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8", errors="surrogateescape")
    from vmchannel_agents.fence_agent import main as agent_main

    return agent_main(folder)


def wants_metadata(given: bytes) -> bool:
    """Whether the last action in these `key=value` lines is metadata."""
    action = b""
    for line in given.split(b"\n"):
        name, _, value = line.strip().partition(b"=")
        if name == b"action":
            action = value
    return action == b"metadata"


def stored_metadata(folder: str) -> bytes:
    """The metadata as the library there would print it; empty where it is of another version, or missing."""
    try:
        with open(os.path.join(folder, "fencing.py"), "rb") as file:
            if LIBRARY_VERSION not in file.read():
                return b""
        with open(os.path.join(os.path.dirname(__file__), "metadata.xml"), "rb") as file:
            return file.read()
    except OSError:
        return b""
