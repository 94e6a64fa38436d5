# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the journal said is stored is there after kill -9, at whatever moment it strikes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.host import journal_writer
from tests.integration.host.journal_rig import JournalRig

KILLS = 12


def _write_until_killed(directory: Path, lines: int) -> int:
    """Kill a writer after it reported `lines` records; return the last number that it reported."""
    with subprocess.Popen(
        [sys.executable, str(journal_writer.__file__), str(directory)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as writer:
        assert writer.stdout is not None
        reported = [writer.stdout.readline() for _ in range(lines)]
        writer.kill()
        # What is still in the pipe was reported too; its last line may be cut.
        rest = writer.stdout.read().split(b"\n")
        reported += [line + b"\n" for line in rest[:-1]]
    return int(reported[-1])


@pytest.mark.timeout(120)
async def test_no_stored_record_is_lost_by_kill_9_and_the_chain_stays_whole(tmp_path: Path) -> None:
    rig = JournalRig(tmp_path / "state")
    stored = 0
    for kill in range(KILLS):
        last = _write_until_killed(rig.directory, 1 + kill * 7)
        assert last > stored
        stored = last
        result = rig.verified()  # first with the dead writer's log beside the file, by a reader
        assert result.ok, result
        assert result.last_seq >= stored
        async with rig.opened() as journal:  # then recovered by the next daemon
            result = await journal.verify()
        assert (result.ok, result.records >= stored) == (True, True)
        stored = result.records


async def test_a_killed_daemon_leaves_no_lock_behind(tmp_path: Path) -> None:
    rig = JournalRig(tmp_path / "state")
    _write_until_killed(rig.directory, 1)
    async with rig.opened() as journal:
        assert (await journal.verify()).ok
