# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches: snapshot, changes, and what happens to a watcher that is too slow."""

from __future__ import annotations

from fence_vmchannel.hub.events import HubEvent, Overflow, PortAdded, PortRemoved, Synced
from fence_vmchannel.hub.watch import Watch, WatchList


async def take(watch: Watch, count: int) -> list[HubEvent]:
    return [await anext(watch) for _ in range(count)]


async def test_a_watch_gives_the_snapshot_then_changes_then_ends() -> None:
    watches = WatchList(lambda: [PortAdded("p", "host")])
    with watches.add() as watch:
        watches.publish(PortRemoved("p", "host"))
        watches.end()
        assert [event async for event in watch] == [
            PortAdded("p", "host"),
            Synced(),
            PortRemoved("p", "host"),
        ]


async def test_a_watcher_that_is_too_slow_is_told_and_gets_a_new_snapshot() -> None:
    there: list[HubEvent] = [PortAdded("old", "host")]
    watches = WatchList(lambda: there, size=3)
    slow, quick = watches.add(), watches.add()
    await take(slow, 2)
    for number in range(10):
        watches.publish(PortAdded(str(number), "host"))
        if number < 3:
            await take(quick, 1)
    there[:] = [PortAdded("new", "host")]
    assert await take(slow, 3) == [Overflow(10), PortAdded("new", "host"), Synced()]
    watches.publish(PortRemoved("new", "host"))
    assert await anext(slow) == PortRemoved("new", "host")


async def test_a_snapshot_larger_than_the_queue_is_no_overflow() -> None:
    watches = WatchList(lambda: [PortAdded(str(number), "vm") for number in range(100)], size=3)
    watch = watches.add()
    watches.publish(PortRemoved("0", "vm"))
    events = await take(watch, 102)
    assert not any(isinstance(event, Overflow) for event in events)
    assert events[-1] == PortRemoved("0", "vm")


async def test_a_closed_watch_hears_no_more() -> None:
    watches = WatchList(list)
    watch = watches.add()
    watch.close()
    watch.close()
    watches.publish(PortAdded("p", "host"))
    assert [event async for event in watch] == [Synced()]
