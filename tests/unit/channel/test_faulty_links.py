# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exactly once and in order, whatever the link does; else the applications are told."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from fence_vmchannel.core.connection import Priority
from tests.fakes.conversation import Conversation
from tests.fakes.link import Faults

FAULTS = st.builds(
    Faults,
    drop=st.sampled_from([0.0, 0.02, 0.1]),
    duplicate=st.sampled_from([0.0, 0.02, 0.1]),
    corrupt=st.sampled_from([0.0, 0.02, 0.1]),
    delay_s=st.sampled_from([0.0, 0.01, 0.5, 3.0]),
    max_chunk=st.sampled_from([1, 7, 4_096, 65_536]),
)


def act_at_random(talk: Conversation, rng: random.Random, steps: int) -> None:
    """Open, send, close, cut and connect as the seed says."""
    for step in range(steps):
        side = rng.choice(talk.applications)
        match rng.randrange(10):
            case 0 | 1:
                side.open(f"{side.name}-{len(side.by_target)}", rng.choice(list(Priority)))
            case 2 if side.by_target and step % 3 == 0:
                side.close(rng.choice(list(side.by_target)))
            case 3 if step % 4 == 0:
                talk.cut()
            case 4:
                if talk.link is None:
                    talk.connect()
            case _:
                for target in list(side.by_target):
                    side.try_send(target, rng.choice([0, 10, 300, 5_000, 40_000]))
        talk.run(rng.choice([0.0, 0.001, 0.1, 2.0]))


def assert_all_arrived(talk: Conversation) -> None:
    """Each message that was sent on a channel that nobody closed has been taken, once (the applications
    check)."""
    for sender, receiver in ((talk.host, talk.guest), (talk.guest, talk.host)):
        for target, stream in sender.by_target.items():
            other = receiver.by_target.get(target)
            if not stream.ended:
                assert other is not None, f"{target} never opened"
                assert other.got == stream.sent, f"{target}: {other.got} of {stream.sent} arrived"


@settings(max_examples=25, deadline=None)
@given(faults=FAULTS, seed=st.integers(0, 2**32))
def test_no_fault_of_a_link_loses_or_doubles_a_message_or_resets_a_session(faults: Faults, seed: int) -> None:
    talk = Conversation(faults, seed)
    talk.connect()
    act_at_random(talk, random.Random(seed), 30)
    talk.settle()
    assert not talk.host.resets
    assert not talk.guest.resets
    assert talk.host.connection.opened
    assert talk.guest.connection.opened
    assert_all_arrived(talk)
