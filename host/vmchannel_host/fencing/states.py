# SPDX-License-Identifier: LGPL-2.1-or-later
"""The states of a fence operation and every allowed change between them, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final


class OperationState(Enum):
    """Where an operation is."""

    ORDERED = "ordered"  # the intent has its place in the order; nothing was done
    SURVEYING = "surveying"  # the hosts look which instances there are, and whose
    RESETTING = "resetting"  # reboot: `system_reset` of the one running instance
    CHECKING = "checking"  # reboot: the hosts look whether exactly that instance runs
    ACTING = "acting"  # instances are being destroyed
    LOOKING = "looking"  # every end is proven; the hosts look afresh
    STARTING = "starting"  # off is proven; a new instance is awaited
    CONCLUDING = "concluding"  # the outcome is published, not yet delivered
    DONE = "done"  # the outcome counts, and is a success
    FAILED = "failed"  # nothing is claimed


class Step(Enum):
    """Why the state changes."""

    SURVEY = "survey"
    DESTROY = "destroy"
    LOOK = "look"
    RESET = "reset"
    CHECK = "check"
    START = "start"
    CONCLUDE = "conclude"
    COUNT = "count"  # a success was delivered in time
    FAIL = "fail"  # a failure was delivered, or a success did not count
    TAKE_OVER = "take over"  # an `off` of the same VM was ordered (S12)
    GIVE_UP = "give up"  # the coordinator's failure was delivered


_S = OperationState
TRANSITIONS: Final[Mapping[tuple[OperationState, Step], OperationState]] = MappingProxyType(
    {
        (_S.ORDERED, Step.SURVEY): _S.SURVEYING,
        (_S.ORDERED, Step.DESTROY): _S.ACTING,
        (_S.ORDERED, Step.LOOK): _S.LOOKING,
        (_S.ORDERED, Step.START): _S.STARTING,  # resumed: its start may have run
        (_S.ORDERED, Step.CONCLUDE): _S.CONCLUDING,
        (_S.SURVEYING, Step.RESET): _S.RESETTING,
        (_S.SURVEYING, Step.DESTROY): _S.ACTING,
        (_S.SURVEYING, Step.LOOK): _S.LOOKING,  # no process is to be destroyed, but maybe saved memory
        (_S.SURVEYING, Step.START): _S.STARTING,
        (_S.SURVEYING, Step.CONCLUDE): _S.CONCLUDING,
        (_S.RESETTING, Step.CHECK): _S.CHECKING,
        (_S.RESETTING, Step.DESTROY): _S.ACTING,
        (_S.RESETTING, Step.LOOK): _S.LOOKING,  # it ended by itself meanwhile
        (_S.RESETTING, Step.CONCLUDE): _S.CONCLUDING,
        (_S.CHECKING, Step.DESTROY): _S.ACTING,
        (_S.CHECKING, Step.LOOK): _S.LOOKING,  # it ended by itself meanwhile
        (_S.CHECKING, Step.CONCLUDE): _S.CONCLUDING,
        (_S.ACTING, Step.LOOK): _S.LOOKING,
        (_S.ACTING, Step.CONCLUDE): _S.CONCLUDING,
        (_S.LOOKING, Step.DESTROY): _S.ACTING,  # a find starts again
        (_S.LOOKING, Step.START): _S.STARTING,
        (_S.LOOKING, Step.CONCLUDE): _S.CONCLUDING,
        (_S.STARTING, Step.CONCLUDE): _S.CONCLUDING,
        (_S.CONCLUDING, Step.COUNT): _S.DONE,
        (_S.CONCLUDING, Step.FAIL): _S.FAILED,
    }
    | {(state, Step.TAKE_OVER): _S.FAILED for state in _S if state not in (_S.DONE, _S.FAILED)}
    | {(state, Step.GIVE_UP): _S.FAILED for state in _S if state not in (_S.DONE, _S.FAILED, _S.CONCLUDING)}
)
"""Every allowed change of state."""

FINAL: Final = frozenset((OperationState.DONE, OperationState.FAILED))
"""States in which nothing more happens."""
