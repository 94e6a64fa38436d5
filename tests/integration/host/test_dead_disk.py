# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk that never answers again holds up no stop: threads that hang in it end with the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.host.journal_rig import OP1, JournalRig
from tests.integration.host.test_journal import Brake
from tests.rig.fixtures import rig_dir
from tests.rig.programs import environment, program
from tests.system.site import Site, open_site
from vmchannel_host.journal.types import JournalBusy

__all__ = ["rig_dir"]

pytestmark = pytest.mark.slow

UNIT_S = 60
"""TimeoutStopSec of the unit."""

DAEMON = """
import asyncio, sys, threading, time
from dataclasses import replace
from pathlib import Path
from vmchannel_host import logs
from vmchannel_host.config.loading import load_config
from vmchannel_host.daemon import build
from vmchannel_host.parts import real_parts
from vmchannel_host.main import run
dead, path = Path(sys.argv[1]), Path(sys.argv[2])
def clock():
    if dead.exists() and threading.current_thread().name == "journal":
        threading.Event().wait()
    return time.time()
parts = replace(real_parts(), wall_clock=clock)
logs.configure("info", sys.stderr, for_journald=False)
asyncio.run(run(build(load_config(path), file=path, parts=parts), path))
"""

DOCTOR = """
import asyncio, threading
from vmchannel_host.doctor.daemon_facts import MachineLook
def hangs(paths, timeout_s):
    threading.Event().wait()
print(asyncio.run(MachineLook(hangs, slack_s=0.1).facts((), 0.1)))
"""


@pytest.fixture
def site(rig_dir: Path) -> Generator[Site]:
    with open_site(rig_dir) as site:
        yield site


@contextmanager
def running(command: list[str], log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A program that is killed should it not end by itself."""
    with (
        log.open("ab") as lines,
        subprocess.Popen(command, env=environment(), stdout=lines, stderr=lines) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


async def test_a_stop_goes_on_when_the_journals_disk_does_not_answer_and_leaves_the_sessions(
    site: Site,
) -> None:
    site.write_config()
    dead, log = site.folder / "dead", site.folder / "own.log"
    command = [sys.executable, "-c", DAEMON, str(dead), str(site.config_file)]
    with running(command, log) as daemon:
        await site.until(lambda: "ready host=" in log.read_text(), "daemon")
        dead.touch()
        answer = await site.ctl("fence", "off", "nobody", "--timeout", "5")
        assert answer.code != 0, answer
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(UNIT_S) == 0, log.read_text()
    assert "not closed: no answer from the disk" in log.read_text()
    assert (site.folder / "run" / "host.sessions").exists()
    dead.unlink()  # the next daemon, for the site's checks, opens the journal as after a crash


async def test_a_stop_goes_on_while_the_journal_cannot_be_opened(site: Site) -> None:
    site.write_config()
    log = site.folder / "own.log"
    (site.folder / "state").mkdir(mode=0o700)
    key = site.folder / "state" / "journal.key"
    os.mkfifo(key, 0o600)  # whoever reads it waits for ever
    with running(program("vmchanneld", "--config", str(site.config_file)), log) as daemon:
        lock = site.folder / "state" / "journal.db.lock"
        await site.until(lock.exists, "daemon that opens its journal")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(UNIT_S) == 0, log.read_text()
    key.unlink()


def test_a_look_of_doctor_that_hangs_does_not_hold_up_a_stop() -> None:
    command = [sys.executable, "-c", DOCTOR]
    done = subprocess.run(
        command, env=environment(), timeout=UNIT_S, capture_output=True, text=True, check=True
    )
    assert "late=True" in done.stdout


async def test_closing_a_journal_waits_for_its_disk_so_long_and_no_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig, brake = JournalRig(tmp_path / "state"), Brake()
    journal = await rig.open(boottime=brake)
    with pytest.raises(JournalBusy):
        await journal.append("host.note", OP1, {}, timeout_s=0.05)
    await journal.close(timeout_s=0.05)
    assert "no answer from the disk" in caplog.text
    brake.go.set()
    await journal.close()
    assert rig.verified().records == 1
