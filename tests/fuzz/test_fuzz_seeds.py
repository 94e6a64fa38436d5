# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each fuzz target holds for its seeds and for a few changes of them. `make test-all` fuzzes for longer."""

from __future__ import annotations

import random
from zlib import crc32

import pytest

from tests.fuzz.catalogue import PLANTED, TARGETS
from tests.fuzz.planted import PlantedBugError
from tests.fuzz.target import Plan, Target

CHANGES = 40
"""Of each seed: a smoke, not a search."""


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_a_target_holds_for_its_seeds(target: Target) -> None:
    for seed in target.seeds:
        target.run(seed)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_a_target_holds_for_small_changes_of_its_seeds(target: Target) -> None:
    for seed in target.seeds:
        rng = random.Random(crc32(seed))
        for _ in range(CHANGES):
            target.run(changed(seed[:8_192], rng))


def changed(seed: bytes, rng: random.Random) -> bytes:
    """The seed with a few bytes set, taken out or doubled."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(3):
            case 0 if at < len(data):
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case _:
                data[at:at] = data[at : at + rng.randint(1, 8)] or bytes((rng.randrange(256),))
    return bytes(data)


def test_the_planted_bug_is_behind_three_checks() -> None:
    PLANTED.run(b"")
    PLANTED.run(b"\xf5VM.")
    with pytest.raises(PlantedBugError):
        PLANTED.run(b"\xf5VMC")


def test_a_plan_gives_each_byte_once_and_then_zeros() -> None:
    plan = Plan(bytes((1, 0, 2, 65, 66, 5)))
    assert (plan.number(), plan.sized(), plan.one_of("abc"), plan.over) == (1, b"AB", "c", True)
    assert (plan.number(8), plan.take(3)) == (0, b"")
