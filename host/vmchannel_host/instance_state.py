# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state machine of one instance (one QEMU process), from first sight to proven end.

Rules: 1. only this module changes a state, by `advance`; 2. GONE is final, and reached by proof of the
process's end only (S1). A mute monitor changes nothing: the state is what was last watched.
"""

from __future__ import annotations

from enum import Enum


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
    RESUMES = "resumes"  # runs, with a completed outgoing migration
    ENDS = "ends"  # the end of its process is proven
