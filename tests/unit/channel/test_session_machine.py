# SPDX-License-Identifier: LGPL-2.1-or-later
"""Any sequence of what can happen to two hubs: each message once and in order, or both applications are
told."""

from __future__ import annotations

import copy
import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fence_vmchannel.core.connection import Opened, Priority, Reset, Role, Unlinked
from fence_vmchannel.core.session_state import SessionState
from tests.fakes.conversation import Application, Conversation
from tests.fakes.link import BAD, GOOD, Faults
from tests.unit.channel.test_faulty_links import assert_all_arrived
from tests.unit.channel.test_handover import hand_over

LINKS = [GOOD, BAD, Faults(delay_s=2.0), Faults(drop=0.3), Faults(corrupt=0.3)]
SIDES = st.sampled_from(["host", "guest"])


class TwoHubs(RuleBasedStateMachine):
    """The applications check each message as it comes; the end checks that all came that nobody was told
    about."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = Conversation()
        self.opened = 0
        self.snapshot: Application | None = None

    def side(self, name: str) -> Application:
        return self.talk.host if name == "host" else self.talk.guest

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.talk = Conversation(seed=seed)

    @rule(faults=st.sampled_from(LINKS))
    def connect(self, faults: Faults) -> None:
        self.talk.connect(faults)

    @precondition(lambda self: self.talk.link is not None)
    @rule()
    def cut(self) -> None:
        self.talk.cut()

    @rule(seconds=st.sampled_from([0.0, 0.01, 1.0, 7.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.talk.run(seconds)

    @rule(name=SIDES, priority=st.sampled_from(Priority))
    def open(self, name: str, priority: Priority) -> None:
        self.opened += 1
        self.side(name).open(f"{name}-{self.opened}", priority)

    @rule(name=SIDES, size=st.sampled_from([0, 50, 5_000, 60_000]), which=st.integers(0, 9))
    def send(self, name: str, size: int, which: int) -> None:
        side = self.side(name)
        if side.by_target:
            side.try_send(list(side.by_target)[which % len(side.by_target)], size)

    @rule(name=SIDES, which=st.integers(0, 9))
    def close(self, name: str, which: int) -> None:
        side = self.side(name)
        if side.by_target:
            side.close(list(side.by_target)[which % len(side.by_target)])

    @rule(name=SIDES)
    def stop_reading(self, name: str) -> None:
        self.side(name).paused = True

    @rule(name=SIDES)
    def go_on_reading(self, name: str) -> None:
        self.side(name).resume_reading()

    @rule(name=SIDES)
    def hand_over(self, name: str) -> None:
        hand_over(self.talk, self.side(name))

    @rule(name=SIDES)
    def kill(self, name: str) -> None:
        """The process and its application are gone; others start, without a memory."""
        self.talk.cut()
        if name == "host":
            self.talk.host = Application("host", self.talk.new_connection(Role.HOST))
        else:
            self.talk.guest = Application("guest", self.talk.new_connection(Role.GUEST))
            self.snapshot = None

    @precondition(lambda self: self.talk.link is not None)
    @rule(name=SIDES, saved=st.booleans())
    def replace_unseen(self, name: str, saved: bool) -> None:
        """The process is replaced by another in the middle of a write, and the other side's link stays up."""
        link = self.talk.link
        assert link is not None
        side = self.side(name)
        (link.to_guest if name == "host" else link.to_host).cut()
        side.connection.link_down(self.talk.now)
        side.handle_events()
        role = Role.HOST if name == "host" else Role.GUEST
        if saved:
            side.connection = self.talk.import_connection(role, side.connection.export_state())
        elif name == "host":
            self.talk.host = Application("host", self.talk.new_connection(role))
        else:
            self.talk.guest = Application("guest", self.talk.new_connection(role))
            self.snapshot = None
        self.side(name).connection.link_up(self.talk.now)

    @rule()
    def take_snapshot(self) -> None:
        self.snapshot = copy.deepcopy(self.talk.guest)

    @precondition(lambda self: self.snapshot is not None)
    @rule()
    def restore_snapshot(self) -> None:
        """The guest's whole memory goes back. The port's state is set anew, the bytes under way stay."""
        assert self.snapshot is not None
        self.talk.guest = copy.deepcopy(self.snapshot)
        unlinked = self.talk.guest.connection.state is SessionState.UNLINKED
        if unlinked and self.talk.link is not None:
            self.talk.guest.connection.link_up(self.talk.now)
        elif not unlinked and self.talk.link is None:
            self.talk.guest.connection.link_down(self.talk.now)

    @invariant()
    def what_is_told_makes_sense(self) -> None:
        for side in self.talk.applications:
            told = False
            for event in side.events:
                if isinstance(event, Opened):
                    assert not told, "Opened twice"
                    told = True
                elif isinstance(event, Unlinked):
                    assert told, "Unlinked without Opened"
                    told = False
                elif isinstance(event, Reset):
                    told = False

    @invariant()
    def memory_is_bounded(self) -> None:
        for side in self.talk.applications:
            bound = 400_000 + 3 * side.window * (len(side.by_target) + 1)
            assert side.connection.unsent_bytes <= bound

    def teardown(self) -> None:
        for side in self.talk.applications:
            side.resume_reading()
        self.talk.settle()
        assert self.talk.host.connection.opened
        assert self.talk.guest.connection.opened
        assert_all_arrived(self.talk)
        for side in self.talk.applications:
            assert side.connection.unsent_bytes == 0


def act(hubs: TwoHubs, rng: random.Random) -> None:
    """One thing happens."""
    name, which, linked = rng.choice(["host", "guest"]), rng.randrange(10), hubs.talk.link is not None
    weights = [6, 20, 8, 40, 3, 5, 2, 1, 2, 3, 1, 1]
    match rng.choices(range(len(weights)), weights)[0]:
        case 0:
            hubs.connect(rng.choice(LINKS))
        case 1:
            hubs.wait(rng.choice([0.0, 0.01, 1.0, 7.0, 60.0]))
        case 2:
            hubs.open(name, rng.choice(list(Priority)))
        case 3:
            hubs.send(name, rng.choice([0, 50, 5_000, 60_000]), which)
        case 4:
            hubs.close(name, which)
        case 5:
            (hubs.stop_reading if which < 4 else hubs.go_on_reading)(name)
        case 6:
            hubs.hand_over(name)
        case 7:
            hubs.kill(name)
        case 8 if linked:
            hubs.cut()
        case 9 if linked:
            hubs.replace_unseen(name, which < 6)
        case 10:
            hubs.take_snapshot()
        case 11 if hubs.snapshot is not None:
            hubs.restore_snapshot()
        case _:
            pass


def live(seed: int, steps: int) -> TwoHubs:
    """A long life with everything in it, which the rules above alone seldom make."""
    rng, hubs = random.Random(seed), TwoHubs()
    hubs.talk = Conversation(seed=seed)
    hubs.connect(GOOD)
    for _ in range(steps):
        act(hubs, rng)
        hubs.what_is_told_makes_sense()
        hubs.memory_is_bounded()
    return hubs


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_long_life_ends_with_all_delivered_or_told(seed: int) -> None:
    live(seed, 100).teardown()


TwoHubs.TestCase.settings = settings(  # pyright: ignore[reportUnknownMemberType] (hypothesis makes it)
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestTwoHubs = TwoHubs.TestCase  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
