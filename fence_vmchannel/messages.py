# SPDX-License-Identifier: LGPL-2.1-or-later
"""The messages that guest and host share: the fence service and the announcement of a node's name.

Each is a `Record` (a frozen dataclass to its users); `encode_message` puts its kind in front,
`decode_message` gives it back.
Specified in `docs/protocol.md`, section "Messages".
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, assert_never

from fence_vmchannel.errors import RemoteProtocolError
from fence_vmchannel.records import Record, tagged
from fence_vmchannel.tlv import decode, encode

FENCE_SERVICE: Final = "org.vmchannel.fence"
"""The host's fence service. Its ACCEPT carries a `FenceGreeting`."""

MAX_PLUG = 256
"""Longest plug, in characters. VM names are at most 255 bytes in practice; longer text is no name."""

MAX_SOURCE = 32
"""Longest source of a node name, in characters: it is kept with each record."""

REQUEST_ID_BYTES = 16


class FenceAction(IntEnum):
    """What to do, or to ask."""

    OFF = 1
    ON = 2
    REBOOT = 3
    STATUS = 4
    LIST = 5  # the plugs that the requester may name, with their states
    MONITOR = 6  # would fencing work? Changes nothing

    @property
    def destructive(self) -> bool:
        """Whether it changes the state of a VM, and so is journaled and done once."""
        return self in (FenceAction.OFF, FenceAction.ON, FenceAction.REBOOT)


class PowerState(IntEnum):
    """The power state of a VM. OFF is the claim of rule S0 and needs its evidence."""

    UNKNOWN = 0
    ON = 1
    OFF = 2


class FenceCode(IntEnum):
    """Why an answer is what it is; stable, each with its own cause and remedy."""

    DONE = 0  # done and proven, or the question is answered
    ALREADY = 1  # it was so before, proven afresh
    FAILED = 2  # tried; nothing proven
    UNKNOWN_PLUG = 3  # no VM, alias or node of that name among the requester's groups
    AMBIGUOUS = 4  # several VMs match (S9); the reason names them
    REFUSED = 5  # the policy does not allow it; the reason names the rule
    BUSY = 6  # another operation on the VM runs (S12)
    DEADLINE = 7  # the deadline passed; the outcome is unknown
    STALE = 8  # the request's tick is not of this host's boot, or its deadline is past: ask anew (S6)
    MIGRATED_AWAY = 9  # it left this host; where it runs is unknown here
    UNAVAILABLE = 10  # the host cannot act now (journal, configuration, shutdown)
    BAD_REQUEST = 11  # the message itself is wrong
    NOT_STARTED = 12  # off is proven, but the VM did not come up again
    VOID = 13  # the requester is itself the target of an earlier operation (S12)


class FenceGreeting(Record):
    """What the host says when the fence service accepts a channel; deadlines are stated against its tick."""

    host: str = tagged(1)
    boot_id: str = tagged(2)  # the tick's domain: the host kernel's boot
    tick_ms: int = tagged(3)  # the host's CLOCK_BOOTTIME, milliseconds
    vm_uuid: str = tagged(4)  # who you are: the VM whose port this is; "" for the operator
    vm_name: str = tagged(5)


class FenceRequest(Record):
    """Ask the host to change, or tell, the power state of a VM.

    The same `request_id` never acts twice (S5). The host acts on it until `within_ms` after `tick_ms` (S6).
    """

    request_id: bytes = tagged(1)  # 16 unguessable bytes, the client's choice
    action: FenceAction = tagged(2)
    plug: str = tagged(3)  # as the user wrote it; the host resolves it; "" for LIST and MONITOR
    boot_id: str = tagged(4)  # of the `FenceGreeting` that gave the tick
    tick_ms: int = tagged(5)
    within_ms: int = tagged(6)

    def __post_init__(self) -> None:
        if len(self.request_id) != REQUEST_ID_BYTES:
            raise ValueError(f"request_id has {len(self.request_id)} bytes, not {REQUEST_ID_BYTES}")
        if len(self.plug) > MAX_PLUG:
            raise ValueError(f"plug has {len(self.plug)} characters, at most {MAX_PLUG} are allowed")
        if not 0 < self.within_ms <= 3_600_000:
            raise ValueError(f"within_ms is {self.within_ms}, not 1 to 3,600,000")


class FenceTarget(Record):
    """One line of a LIST answer."""

    plug: str = tagged(1)  # the VM's name
    vm_uuid: str = tagged(2)
    state: PowerState = tagged(3)
    aliases: tuple[str, ...] = tagged(4, default=())  # announced node names and configured aliases


class FenceProgress(Record):
    """Something happened in a running operation; for people, no claim."""

    request_id: bytes = tagged(1)
    operation: str = tagged(2)
    text: str = tagged(3)
    elapsed_ms: int = tagged(4)


class FenceAnswer(Record):
    """The one answer to a request. Only `ok` with `state` is a claim about the VM."""

    request_id: bytes = tagged(1)
    ok: bool = tagged(2)
    code: FenceCode = tagged(3)
    state: PowerState = tagged(4)
    host: str = tagged(5)
    reason: str = tagged(6)  # one line for people; names culprit and remedy when not ok
    operation: str = tagged(7, default="")  # the journal's id of the operation
    vm_uuid: str = tagged(8, default="")  # of the target, once resolved
    vm_name: str = tagged(9, default="")
    evidence: tuple[str, ...] = tagged(10, default=())  # lines for people, as in the journal
    targets: tuple[FenceTarget, ...] = tagged(11, default=())  # LIST
    requester: str = tagged(12, default="")  # VM UUID to which this answer belongs
    elapsed_ms: int = tagged(13, default=0)


class FenceCancel(Record):
    """The client stops waiting. An intent goes on (S5); a request that is no intent yet is dropped."""

    request_id: bytes = tagged(1)


class Announce(Record):
    """The guest's cluster node name, recorded under its VM's UUID (DESIGN section 4, Aliases)."""

    node_name: str = tagged(1)
    source: str = tagged(2)  # "corosync" or "hostname"

    def __post_init__(self) -> None:
        if not 0 < len(self.node_name) <= MAX_PLUG:
            raise ValueError(f"node_name has {len(self.node_name)} characters, 1 to {MAX_PLUG} are allowed")
        if len(self.source) > MAX_SOURCE:
            raise ValueError(f"source has {len(self.source)} characters, at most {MAX_SOURCE} are allowed")


class AnnounceAnswer(Record):
    """Whether the name is recorded; a name that another VM holds is refused."""

    accepted: bool = tagged(1)
    reason: str = tagged(2)


FenceMessage = FenceRequest | FenceProgress | FenceAnswer | FenceCancel | Announce | AnnounceAnswer

_KIND = struct.Struct(">H")
_KINDS: Final[dict[int, type[FenceMessage]]] = {
    1: FenceRequest,
    2: FenceProgress,
    3: FenceAnswer,
    4: FenceCancel,
    5: Announce,
    6: AnnounceAnswer,
}


def _kind(message: FenceMessage) -> int:
    match message:
        case FenceRequest():
            return 1
        case FenceProgress():
            return 2
        case FenceAnswer():
            return 3
        case FenceCancel():
            return 4
        case Announce():
            return 5
        case AnnounceAnswer():
            return 6
        case _:
            assert_never(message)


def encode_message(message: FenceMessage) -> bytes:
    """The bytes of a message of the fence service: its kind (16 bits), then its fields."""
    return _KIND.pack(_kind(message)) + encode(message)


def decode_message(data: bytes) -> FenceMessage:
    """Parse a message of the fence service.

    Raises:
        RemoteProtocolError: too short, of an unknown kind, or malformed. Answer BAD_REQUEST or close.
    """
    if len(data) < _KIND.size:
        raise RemoteProtocolError("a message without a kind")
    number = _KIND.unpack_from(data)[0]
    if number not in _KINDS:
        raise RemoteProtocolError(f"unknown message kind {number}")
    return decode(_KINDS[number], data[_KIND.size :])
