# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk that is really full: `off` goes on in the room that is kept for it, all else is refused."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.host.journal_rig import HOST, JournalRig, ended, process
from vmchannel_host.journal.file import connect
from vmchannel_host.journal.journal import Journal
from vmchannel_host.journal.room import Descriptors, Room
from vmchannel_host.journal.types import JournalFull, JournalShort, VerifyResult
from vmchannel_host.model import OperationId

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")

KEPT_OFFS = 100
"""A host full of VMs can be fenced once."""


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB of its own."""
    place, image = tmp_path / "disk", tmp_path / "image"
    place.mkdir()
    if request.param == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)]
    else:
        os.truncate(os.open(image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), 48 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-F", image], check=True, timeout=60)
        command = ["mount", "-o", "loop", str(image), str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a {request.param} here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True, timeout=60)


@pytest.fixture
def rig(disk: Path) -> JournalRig:
    return JournalRig(disk / "state")


def fill(disk: Path) -> None:
    """Take every block; a filler that goes on takes what is freed meanwhile too."""
    with (disk / "filler").open("ab", buffering=0) as filler:
        for size in (1 << 20, 4096):
            try:
                while True:
                    filler.write(bytes(size))
                    os.fsync(filler.fileno())
            except OSError:
                continue


def make_space(disk: Path) -> None:
    (disk / "filler").unlink()
    os.sync()


async def off(journal: Journal, number: int) -> None:
    """All that one `off` writes."""
    operation, identity = OperationId(f"off-{number}"), process(5000 + number)
    request_id = number.to_bytes(16, "big")
    await journal.remember_request(request_id, "vm " + "r" * 80, b"d" * 32, operation, 1000.0)
    await journal.append("fence.intent", operation, {"action": "off", "pad": "x" * 600})
    await journal.append("fence.phase", operation, {"phase": "begun"})
    await journal.remember_kill(identity, HOST)
    await journal.remember_end(ended(identity))
    for kind in ("fence.evidence", "fence.evidence", "fence.outcome"):
        await journal.append(kind, operation, {"pad": "x" * 600})
    await journal.remember_answer(request_id, b"a" * 500)


async def offs(journal: Journal, first: int, count: int) -> None:
    """As many at once."""
    await asyncio.gather(*(off(journal, first + number) for number in range(count)))


async def until_refused(journal: Journal, size: int, *, if_room: bool) -> JournalFull:
    """Write records until the journal takes no more."""
    for _ in range(2000):
        try:
            await journal.append("host.note", OperationId(""), {"pad": "x" * size}, if_room=if_room)
        except JournalFull as error:
            return error
    raise AssertionError("the disk is not full")


async def refused(journal: Journal) -> None:
    """What is not for an `off` is refused, and says why. What the file had grown beyond is used first."""
    assert isinstance(await until_refused(journal, 30_000, if_room=True), JournalShort)
    with pytest.raises(JournalShort, match="disk is full; what room is left is kept for `off`"):
        await journal.append("fence.intent", OperationId("on-1"), {"action": "on"}, if_room=True)
    with pytest.raises(JournalShort):
        await journal.remember_request(b"r" * 16, "vm", b"d", OperationId("on-1"), 1.0, if_room=True)
    assert "disk is full" in journal.short


async def test_offs_on_a_full_disk_are_durable_and_the_others_refused_until_there_is_room(
    rig: JournalRig, disk: Path
) -> None:
    async with rig.opened() as journal:
        await offs(journal, 1000, 50)
        fill(disk)
        await refused(journal)
        await offs(journal, 0, KEPT_OFFS)
        await refused(journal)
        assert (await journal.verify()).ok
    fill(disk)
    async with rig.opened() as journal:  # an upgrade of the daemon on the full disk
        await refused(journal)
        await off(journal, KEPT_OFFS)
        known = {one.identity: one for one in await journal.known_instances()}
        assert all(known[process(5000 + number)].end is not None for number in range(KEPT_OFFS + 1))
        assert [one.kind for one in await journal.operation(OperationId("off-0"))][-1] == "fence.outcome"
        answer = await journal.request((7).to_bytes(16, "big"))
        assert answer is not None
        assert answer.answer == b"a" * 500
        make_space(disk)
        await journal.append("fence.intent", OperationId("on-1"), {"action": "on"}, if_room=True)
        assert journal.short == ""
    assert rig.verified().ok


async def test_when_the_kept_room_is_gone_too_everything_is_refused_and_nothing_is_lost(
    rig: JournalRig, disk: Path
) -> None:
    async with rig.opened() as journal:
        await offs(journal, 0, 5)
        fill(disk)
        await refused(journal)
        for size in (30_000, 600):
            assert not isinstance(await until_refused(journal, size, if_room=False), JournalShort)
        with pytest.raises(JournalFull, match="disk is full"):
            await offs(journal, 5, 100)
        last = journal.last_seq
        assert len(await journal.known_instances()) >= 5  # it can be read
    async with rig.opened() as journal:
        assert journal.last_seq >= last
        await until_refused(journal, 600, if_room=False)
        make_space(disk)
        await off(journal, 9999)
        assert (await journal.verify()).ok


async def test_the_kept_room_is_not_taken_by_one_who_fills_the_disk_all_the_time(
    rig: JournalRig, disk: Path
) -> None:
    async with rig.opened() as journal:
        fill(disk)
        with subprocess.Popen(  # noqa: ASYNC220 (returns at once)
            [sys.executable, "-c", FILLER, str(disk / "log")], stdout=subprocess.PIPE
        ) as filler:
            assert filler.stdout is not None
            await asyncio.to_thread(filler.stdout.readline)
            for number in range(20):
                await off(journal, number)
            filler.kill()
        assert (await journal.verify()).ok


FILLER = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
print(flush=True)
while True:
    try:
        os.write(log, bytes(4096))
    except OSError:
        pass
"""


async def test_offs_on_a_full_disk_survive_kill_9(rig: JournalRig, disk: Path) -> None:
    await rig.filled(1)
    fill(disk)
    with subprocess.Popen(  # noqa: ASYNC220 (returns at once)
        [sys.executable, "-m", "tests.integration.host.journal_writer", str(rig.directory)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as writer:
        assert writer.stdout is not None
        stored = int([writer.stdout.readline() for _ in range(100)][-1])
        writer.kill()
    dead: VerifyResult = rig.verified()  # with the dead writer's log beside the file
    assert (dead.ok, dead.last_seq >= stored) == (True, True)
    async with rig.opened() as journal:
        await refused(journal)
        await off(journal, 1)
        assert (await journal.verify()).last_seq > stored


async def test_what_the_next_opening_needs_is_made_whole_when_the_disk_had_no_room_for_it(
    tmp_path: Path,
) -> None:
    rig = JournalRig(tmp_path / "state")
    await rig.filled(1)
    spare = rig.directory / "journal.db.spare"
    descriptors = Descriptors(rig.path)
    try:
        with closing(connect(rig.path)) as connection:
            connection.execute("SELECT count(*) FROM records").fetchone()
            spare.touch(0o600)  # it could be made, but no block was left for it
            room = Room(connection, rig.path, descriptors)
            room.make()
            assert (room.short, spare.stat().st_size) == ("", 65_536)
    finally:
        descriptors.close()
