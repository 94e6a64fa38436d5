# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes of a killed process that settle only after its end was concluded (S1)."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.host.hypervisors.test_cut_off_endings import Rig
from vmchannel_host.hypervisors import Ended
from vmchannel_host.model import EndCause, IoState


class HeldImage:
    """The image of the rig, locked as the kernel keeps it while a write of the dead process is under way."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 2, 0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, lock)

    def lands(self) -> None:
        """The write is on the disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, dies=True)
    made.watched.followed = True
    yield made
    made.close()


@pytest.fixture
def image(rig: Rig) -> Iterator[HeldImage]:
    made = HeldImage(rig.proc.root / "disk.img")
    yield made
    made.lands()


async def test_what_was_unproven_is_proven_and_told_once_the_locks_are_gone(
    rig: Rig, image: HeldImage
) -> None:
    events = rig.table.events()
    end = await rig.off(timeout_s=0.5)
    assert (end.cause, end.io) == (EndCause.KILL, IoState.UNPROVEN)
    settling = asyncio.create_task(rig.endings.settle(rig.watched))
    image.lands()
    async with asyncio.timeout(20):
        await settling
    known = rig.table.ended(rig.watched.identity)
    assert known is not None
    assert (known.cause, known.io) == (EndCause.KILL, IoState.SETTLED)
    assert await rig.off() == known
    async with asyncio.timeout(20):
        while (event := await anext(events)) != Ended(known):
            assert event
    assert rig.watched.storage_at_kill is None


async def test_as_long_as_a_lock_is_there_nothing_is_claimed(rig: Rig, image: HeldImage) -> None:
    await rig.off(timeout_s=0.5)
    settling = asyncio.create_task(rig.endings.settle(rig.watched))
    await asyncio.wait((settling,), timeout=0.1)
    assert not settling.done()
    settling.cancel()
    await asyncio.wait((settling,))
    known = rig.table.ended(rig.watched.identity)
    assert known is not None
    assert known.io is IoState.UNPROVEN
    assert rig.watched.storage_at_kill is None  # nothing stays open when the daemon stops


async def test_files_stay_open_only_where_somebody_waits_for_them(rig: Rig, image: HeldImage) -> None:
    rig.watched.followed = False
    assert (await rig.off(timeout_s=0.5)).io is IoState.UNPROVEN
    assert rig.watched.storage_at_kill is None


async def test_an_end_that_proved_its_writes_leaves_nothing_to_wait_for(rig: Rig) -> None:
    assert (await rig.off()).io is IoState.SETTLED
    assert rig.watched.storage_at_kill is None
    async with asyncio.timeout(20):
        await rig.endings.settle(rig.watched)
