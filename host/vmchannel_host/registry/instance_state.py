# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state machine of one instance (one QEMU process), from first sight to proven end.

Rules: 1. only `advance` makes a new state, from the table; 2. GONE is final, and reached by proof of the
process's end only (S1). A mute monitor changes nothing: the state is what was last watched.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from vmchannel_host.model import Instance, Migration, RunState


class InstanceState(Enum):
    """What an instance was doing when last watched."""

    UNWATCHED = "unwatched"  # a process whose monitor has never answered
    STARTING = "starting"  # prelaunch: not yet run, or reset while stopped
    RUNNING = "running"
    PAUSED = "paused"  # stopped for any reason: on, for all that matters
    INCOMING = "incoming"  # waits for, or takes in, another instance's state
    OUTGOING = "outgoing"  # a migration from it is active or begun
    POSTMIGRATE = "postmigrate"  # it has handed the VM over
    RESUMED = "resumed"  # it ran again after it had handed the VM over: two copies may run
    GONE = "gone"  # its process's end is proven


class Observation(Enum):
    """What one report says of an instance."""

    MUTE = "mute"  # the process is there, its monitor does not answer
    STARTS = "starts"
    RUNS = "runs"
    STOPS = "stops"
    RECEIVES = "receives"
    SENDS = "sends"
    SENT = "sent"
    RESUMES = "resumes"  # it runs or is about to, with a completed migration from it
    ENDS = "ends"  # the end of its process is proven


class ImpossibleTransition(Exception):
    """A report contradicts all that was seen of the instance before. Nothing is concluded from it."""


def _table() -> Mapping[tuple[InstanceState, Observation], InstanceState]:
    state, seen = InstanceState, Observation
    # A process that has not handed its VM over becomes what the report says.
    plain = {
        seen.STARTS: state.STARTING,
        seen.RUNS: state.RUNNING,
        seen.STOPS: state.PAUSED,
        seen.RECEIVES: state.INCOMING,
        seen.SENDS: state.OUTGOING,
        seen.SENT: state.POSTMIGRATE,
        seen.RESUMES: state.RESUMED,
    }
    # One that has handed it over stays suspect whatever it does: the other copy lives (`cont` after
    # `postmigrate` gave two running copies). It never receives.
    suspect = dict.fromkeys((seen.STARTS, seen.RUNS, seen.STOPS, seen.SENDS, seen.RESUMES), state.RESUMED)
    rows: dict[InstanceState, dict[Observation, InstanceState]] = {
        state.UNWATCHED: plain,
        state.STARTING: plain,
        state.RUNNING: plain,  # in post-copy a destination runs first and is then seen to receive
        state.PAUSED: plain,
        state.INCOMING: plain,
        # Failed or cancelled it runs on: `RUNS`. A source of a migration in progress receives nothing.
        state.OUTGOING: {key: value for key, value in plain.items() if key is not seen.RECEIVES},
        state.POSTMIGRATE: {**suspect, seen.SENT: state.POSTMIGRATE},
        state.RESUMED: {**suspect, seen.SENT: state.POSTMIGRATE},
        # Reports that were under way when the end was proven arrive after it.
        state.GONE: dict.fromkeys(Observation, state.GONE),
    }
    table = {(start, what): target for start, row in rows.items() for what, target in row.items()}
    table |= {(start, seen.MUTE): start for start in state}
    table |= {(start, seen.ENDS): state.GONE for start in state}
    return MappingProxyType(table)


TRANSITIONS: Mapping[tuple[InstanceState, Observation], InstanceState] = _table()
"""All that can happen. What is not in the table is an `ImpossibleTransition`."""

EXECUTING = frozenset({InstanceState.RUNNING, InstanceState.PAUSED, InstanceState.OUTGOING})
"""The VM was seen to live in this instance."""

LEAVING = frozenset({InstanceState.OUTGOING, InstanceState.POSTMIGRATE, InstanceState.RESUMED})
"""An end in one of these states is a departure (S1)."""


def advance(state: InstanceState, observation: Observation) -> InstanceState:
    """The state after a report.

    Raises:
        ImpossibleTransition: no sequence of events explains the report; keep the state and say so.
    """
    try:
        return TRANSITIONS[state, observation]
    except KeyError:
        raise ImpossibleTransition(f"{observation.value} after {state.value}") from None


def observe(instance: Instance) -> Observation:
    """What a report says. Where run state and migration disagree, what is worse for a claim counts."""
    run_state, migration = instance.run_state, instance.migration
    if run_state is RunState.POSTMIGRATE:
        return Observation.SENT
    if migration is Migration.COMPLETED:
        return Observation.RESUMES
    if migration is Migration.OUTGOING or run_state is RunState.FINISH_MIGRATE:
        return Observation.SENDS
    if migration is Migration.INCOMING or run_state is RunState.INMIGRATE:
        return Observation.RECEIVES
    if run_state is RunState.UNKNOWN or migration is Migration.UNKNOWN:
        return Observation.MUTE
    if run_state is RunState.PRELAUNCH:
        return Observation.STARTS
    return Observation.RUNS if run_state is RunState.RUNNING else Observation.STOPS


_REMEMBERED: Mapping[InstanceState, Migration] = MappingProxyType(
    {
        InstanceState.UNWATCHED: Migration.UNKNOWN,
        InstanceState.STARTING: Migration.UNKNOWN,  # it never ran: it is no sign that the VM lives here
        InstanceState.RUNNING: Migration.NONE,
        InstanceState.PAUSED: Migration.NONE,
        InstanceState.INCOMING: Migration.INCOMING,
        InstanceState.OUTGOING: Migration.OUTGOING,
        InstanceState.POSTMIGRATE: Migration.COMPLETED,
        InstanceState.RESUMED: Migration.COMPLETED,
    }
)


def to_migration(state: InstanceState) -> Migration:
    """What is kept durably of a state: all that an end which nobody watches is judged by."""
    return _REMEMBERED[state]


def from_migration(migration: Migration) -> InstanceState:
    """The state of a process that is known from the records only."""
    return {
        Migration.UNKNOWN: InstanceState.UNWATCHED,
        Migration.NONE: InstanceState.RUNNING,
        Migration.INCOMING: InstanceState.INCOMING,
        Migration.OUTGOING: InstanceState.OUTGOING,
        Migration.COMPLETED: InstanceState.POSTMIGRATE,
    }[migration]
