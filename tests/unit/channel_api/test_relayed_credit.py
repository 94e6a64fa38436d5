# SPDX-License-Identifier: LGPL-2.1-or-later
"""Channels through both hubs with small limits: nothing deadlocks, memory is bounded, a stalled reader stops
only its own writer.

A stateful test: any order of opening, writing, stalling, going on, cutting the port.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fence_vmchannel.core.channel_state import MIN_WINDOW, largest_message, message_cost
from fence_vmchannel.core.events import Limits
from fence_vmchannel.core.sending import BULK_IN_FLIGHT
from fence_vmchannel.hub.hub import LOCAL_LIMITS
from tests.counts import Count
from tests.fakes.relay_line import Line, Talk, data_frames

LIMIT = 2 * MIN_WINDOW
CHANNELS = 6
CONTROL_BYTES = 65_536
"""What frames without data (credit, acknowledgement) may add to what a hub holds."""

WINDOWS = (1_000, MIN_WINDOW, LIMIT, 10 * LIMIT)


class RelayedChannels(RuleBasedStateMachine):
    """Six channels at most between two applications; `pairs` holds both ends of each."""

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(max_window_bytes=LIMIT, session_bytes=CHANNELS * LIMIT)
        self.line = Line(limits, LOCAL_LIMITS)
        self.pairs: list[tuple[Talk, Talk]] = []
        self.plugged = True

    # --- what happens ---

    @precondition(lambda self: self.plugged and len(self.pairs) < CHANNELS)
    @rule(window=st.sampled_from(WINDOWS), by_guest=st.booleans())
    def open(self, window: int, by_guest: bool) -> None:
        apps = (self.line.guest_app, self.line.host_app)
        opener, acceptor = apps if by_guest else apps[::-1]
        self.pairs.append(self.line.open(opener, acceptor, "org.example.x", window))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), size=st.integers(8, 70_000))
    def write(self, data: st.DataObject, size: int) -> None:
        self.end(data).write(size)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), size=st.sampled_from([8, 3_000, MIN_WINDOW, 2 * MIN_WINDOW]))
    def outrun(self, data: st.DataObject, size: int) -> None:
        """A writer that never waits longer than it must."""
        end = self.end(data)
        size = min(size, max(8, end.shell.connection.max_message(end.channel)))
        for _ in range(50):
            while end.write(size):
                self.look()
            self.line.turns()
            self.look()

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        self.end(data).stalled = True

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        end = self.end(data)
        end.stalled = False
        end.take()

    @precondition(lambda self: self.plugged)
    @rule()
    def cut(self) -> None:
        self.plugged = False
        self.line.cut()

    @precondition(lambda self: not self.plugged)
    @rule()
    def plug(self) -> None:
        self.plugged = True
        self.line.plug()

    @rule(turns=st.integers(1, 5))
    def some_turns(self, turns: int) -> None:
        for _ in range(turns):
            self.line.turns()

    @precondition(lambda self: self.plugged)
    @rule()
    def settle(self) -> None:
        """When all has come to rest, who has no stalled reader has delivered all and may write again."""
        self.line.settle()
        for writer, reader in self.directions():
            if not reader.stalled:
                assert reader.read == writer.sent
                connection = writer.shell.connection
                assert connection.credit(writer.channel) == connection.max_message(writer.channel) > 0

    # --- what holds ---

    @invariant()
    def look(self) -> None:
        for writer, reader in self.directions():
            assert writer.closed is None
            assert writer.sent_cost - reader.read_cost <= min(LIMIT, reader.window)
        for hub in self.line.hubs:
            for shell in hub:  # one direction each
                bound = sum(min(LIMIT, one.window) for one, _ in self.pairs)
                assert shell.connection.unsent_bytes <= bound + CONTROL_BYTES

    def teardown(self) -> None:
        if not self.plugged:
            self.plug()
        for pair in self.pairs:
            for end in pair:
                end.stalled = False
                end.take()
        self.settle()

    # --- helpers ---

    def directions(self) -> list[tuple[Talk, Talk]]:
        """(writer, reader) of each channel, both ways."""
        return [ends for one, other in self.pairs for ends in ((one, other), (other, one))]

    def end(self, data: st.DataObject) -> Talk:
        """Some end of some channel."""
        return data.draw(st.sampled_from([end for pair in self.pairs for end in pair]), label="end")


@pytest.mark.counted
def test_no_order_of_events_deadlocks_hubs_that_relay_or_makes_them_hold_more_than_they_may(
    count: Count,
) -> None:
    lives = count(25, 100, "lives of two relaying hubs")
    run_state_machine_as_test(
        RelayedChannels, settings=settings(max_examples=lives, stateful_step_count=30, deadline=None)
    )


def test_with_every_reader_stalled_but_one_that_one_has_all_it_is_sent() -> None:
    """Ten channels; nine hold all that they may; the tenth moves a megabyte each way."""
    line = Line(Limits(max_window_bytes=LIMIT, session_bytes=10 * LIMIT), LOCAL_LIMITS)
    pairs = [line.open(line.guest_app, line.host_app, "org.example.x", 10 * LIMIT) for _ in range(10)]
    for pair in pairs[:-1]:
        for end in pair:
            end.stalled = True
    size = largest_message(LIMIT)
    for _ in range(3):
        for pair in pairs[:-1]:
            for end in pair:
                while end.write(1_000):
                    pass
        line.settle()
    for one, other in pairs[:-1]:
        assert LIMIT - message_cost(1_000) < one.sent_cost - other.read_cost <= LIMIT
    one, other = pairs[-1]
    for _ in range(16):
        assert one.write(size)
        assert other.write(size)
        line.settle()
    assert (one.read, other.read) == (16, 16)


def test_a_fence_request_goes_before_all_bulk_that_has_no_number_yet() -> None:
    """Ten channels saturate the port, which takes nothing for a while; then an agent asks."""
    window = 1_000_000
    line = Line(Limits(), LOCAL_LIMITS)
    pairs = [line.open(line.guest_app, line.host_app, "org.example.x", window) for _ in range(10)]
    fence, service = line.open(line.agent, line.host_app, "fence", window)
    line.to_host.held = True
    for _ in range(100):
        for one, _ in pairs:
            while one.write(100_000):
                pass
        line.turns()
    queued = line.guest_peer.connection.unsent_bytes
    assert queued > 10 * BULK_IN_FLIGHT
    written = len(line.to_host.written)
    assert fence.write(100)
    for _ in range(10):
        line.turns()
    line.to_host.held = False
    line.settle()
    assert service.read == 1
    frames = data_frames(bytes(line.to_host.written[:written])), data_frames(bytes(line.to_host.written))
    place = next(at for at, frame in enumerate(frames[1]) if len(frame.payload) == 100)
    ahead = frames[1][len(frames[0]) : place]
    assert len(ahead) <= BULK_IN_FLIGHT // MIN_WINDOW  # those that had their numbers
    behind = sum(len(frame.payload) for frame in frames[1][place:])
    assert behind >= queued - BULK_IN_FLIGHT
