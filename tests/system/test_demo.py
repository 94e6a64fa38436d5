# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demo is what a newcomer sees first: it ends well, and leaves nothing, also when it is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig.image import CHECKOUT
from tests.rig.vm import find_processes

pytestmark = pytest.mark.slow

# What a background shell starts ignores SIGINT, and so does all that comes of it.
COMMAND = ["env", "--default-signal=INT", sys.executable, "-m", "tests.rig.demo"]


def start() -> subprocess.Popen[str]:
    accel = os.environ.get("VMCHANNEL_ACCEL", "tcg")
    return subprocess.Popen(
        COMMAND,
        cwd=CHECKOUT,
        env=os.environ | {"VMCHANNEL_ACCEL": accel},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def folder_of(output: str) -> Path:
    """The folder that the demo made, from the command that it shows."""
    found = re.search(r"--config (\S+)/host\.yaml", output)
    assert found, output
    return Path(found[1])


def assert_nothing_left(folder: Path) -> None:
    assert not folder.exists()
    assert find_processes(f"{folder}/") == []


def test_the_demo_ends_well_and_leaves_nothing() -> None:
    with start() as demo:
        output, _ = demo.communicate(timeout=280)
    assert demo.returncode == 0, output
    assert " FAIL " not in output
    for action in ("list", "status", "off", "on", "reboot", "verify-journal"):
        assert f"ok   {action}: exit code" in output
    assert_nothing_left(folder_of(output))


def test_an_interrupted_demo_leaves_nothing_and_says_so_by_its_exit_code() -> None:
    with start() as demo:
        assert demo.stdout is not None
        output = ""
        while "vmchanneld --config" not in output:
            line = demo.stdout.readline()
            assert line, output
            output += line
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output + rest
    assert_nothing_left(folder_of(output))
