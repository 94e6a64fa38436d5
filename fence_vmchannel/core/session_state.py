# SPDX-License-Identifier: LGPL-2.1-or-later
"""The states of a session's link, for both roles, as tables. `session.py` is the only module that moves
them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final

from fence_vmchannel.core.events import Role
from fence_vmchannel.errors import LocalProtocolError


class SessionState(Enum):
    """What the session can do on the present link. The session itself outlives links."""

    UNLINKED = "unlinked"  # no byte connection
    KNOCKING = "knocking"  # GUEST: asks for a challenge, again and again
    ANSWERED = "answered"  # GUEST: HELLO is on its way, WELCOME awaited
    CHALLENGING = "challenging"  # HOST: waits for a HELLO that echoes its nonce
    WELCOMING = "welcoming"  # HOST: WELCOME is on its way; the first frame of the new epoch confirms it
    OPEN = "open"  # frames flow
    REFUSED = "refused"  # this link is of no use; waits for its end
    EXPORTED = "exported"  # the session lives elsewhere now; this object is dead


class SessionInput(Enum):
    """What moves a session from state to state."""

    LINK_UP = "link up"
    LINK_DOWN = "link down"
    KNOCK = "KNOCK arrives"
    CHALLENGE = "CHALLENGE arrives"
    HELLO = "a HELLO with our nonce arrives"
    WELCOME = "a WELCOME with our nonce arrives"
    CONFIRMED = "first frame of the epoch arrives"
    ANOMALY = "gap, number going back, damage, stall, silence or time-out"
    REFUSE = "no common version, a broken rule, garbage, or ERROR arrives"
    EXPORT = "export_state"


_S = SessionState
_I = SessionInput
Transitions = Mapping[tuple[SessionState, SessionInput], SessionState]

_HOST: Final[Transitions] = MappingProxyType(
    {
        (_S.UNLINKED, _I.LINK_UP): _S.CHALLENGING,
        (_S.CHALLENGING, _I.KNOCK): _S.CHALLENGING,
        (_S.CHALLENGING, _I.HELLO): _S.WELCOMING,
        (_S.WELCOMING, _I.CONFIRMED): _S.OPEN,
        (_S.WELCOMING, _I.KNOCK): _S.CHALLENGING,
        (_S.WELCOMING, _I.ANOMALY): _S.CHALLENGING,
        (_S.OPEN, _I.KNOCK): _S.CHALLENGING,
        (_S.OPEN, _I.ANOMALY): _S.CHALLENGING,
        (_S.CHALLENGING, _I.REFUSE): _S.REFUSED,
        (_S.WELCOMING, _I.REFUSE): _S.REFUSED,
        (_S.OPEN, _I.REFUSE): _S.REFUSED,
        (_S.CHALLENGING, _I.LINK_DOWN): _S.UNLINKED,
        (_S.WELCOMING, _I.LINK_DOWN): _S.UNLINKED,
        (_S.OPEN, _I.LINK_DOWN): _S.UNLINKED,
        (_S.REFUSED, _I.LINK_DOWN): _S.UNLINKED,
        (_S.UNLINKED, _I.EXPORT): _S.EXPORTED,
    }
)

_GUEST: Final[Transitions] = MappingProxyType(
    {
        (_S.UNLINKED, _I.LINK_UP): _S.KNOCKING,
        (_S.KNOCKING, _I.CHALLENGE): _S.ANSWERED,
        (_S.ANSWERED, _I.CHALLENGE): _S.ANSWERED,
        (_S.ANSWERED, _I.WELCOME): _S.OPEN,
        (_S.ANSWERED, _I.ANOMALY): _S.KNOCKING,
        (_S.OPEN, _I.CHALLENGE): _S.ANSWERED,
        (_S.OPEN, _I.ANOMALY): _S.KNOCKING,
        (_S.KNOCKING, _I.REFUSE): _S.REFUSED,
        (_S.ANSWERED, _I.REFUSE): _S.REFUSED,
        (_S.OPEN, _I.REFUSE): _S.REFUSED,
        (_S.KNOCKING, _I.LINK_DOWN): _S.UNLINKED,
        (_S.ANSWERED, _I.LINK_DOWN): _S.UNLINKED,
        (_S.OPEN, _I.LINK_DOWN): _S.UNLINKED,
        (_S.REFUSED, _I.LINK_DOWN): _S.UNLINKED,
        (_S.UNLINKED, _I.EXPORT): _S.EXPORTED,
    }
)

SESSION_TRANSITIONS: Final[Mapping[Role, Transitions]] = MappingProxyType(
    {Role.HOST: _HOST, Role.GUEST: _GUEST}
)


def next_state(role: Role, state: SessionState, what: SessionInput) -> SessionState:
    """The state after `what`.

    Raises:
        LocalProtocolError: the table has no such transition.
    """
    following = SESSION_TRANSITIONS[role].get((state, what))
    if following is None:
        raise LocalProtocolError(f"the session is {state.value}: no {what.name} now")
    return following
