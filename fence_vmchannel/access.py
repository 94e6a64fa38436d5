# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which local users may open or offer which service: pure rules over the kernel's credentials."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fence_vmchannel.messages import FENCE_SERVICE
from fence_vmchannel.records import Record, field


class Credentials(Record):
    """Who connected to a local socket, by SO_PEERCRED and SO_PEERGROUPS: never by a message."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()  # supplementary ones

    def __str__(self) -> str:
        return f"uid {self.uid}, pid {self.pid}"


class AccessRule(Record):
    """Who may do something. Root always may; `anybody` lets all others in as well."""

    anybody: bool = False
    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()

    def permits(self, who: Credentials) -> bool:
        """Whether the rule lets `who` in."""
        if self.anybody or who.uid == 0 or who.uid in self.uids:
            return True
        return not self.gids.isdisjoint({who.gid, *who.groups})


ANYBODY = AccessRule(anybody=True)
ROOT_ONLY = AccessRule()


def _nothing() -> Mapping[str, AccessRule]:
    return MappingProxyType({})


class AccessRules(Record):
    """The rules of one hub, by service name; a name that no rule names gets the default.

    Names under `org.vmchannel.` are this product's own: offering one needs root unless a rule says otherwise,
    so that no user can pass himself off as, say, the fence service.
    """

    open: Mapping[str, AccessRule] = field(default_factory=_nothing)
    offer: Mapping[str, AccessRule] = field(default_factory=_nothing)
    open_default: AccessRule = ANYBODY
    offer_default: AccessRule = ANYBODY
    reserved_prefix: str = "org.vmchannel."

    def may_open(self, service: str, who: Credentials) -> bool:
        """Whether `who` may open a channel to `service` on the other side."""
        return self.open.get(service, self.open_default).permits(who)

    def may_offer(self, service: str, who: Credentials) -> bool:
        """Whether `who` may offer `service` to the other side."""
        reserved = service.startswith(self.reserved_prefix)
        return self.offer.get(service, ROOT_ONLY if reserved else self.offer_default).permits(who)


def guest_rules(fence_gids: frozenset[int] = frozenset()) -> AccessRules:
    """A guest's default: fencing for root and the groups given (`haclient`), all else for anybody."""
    return AccessRules(open=MappingProxyType({FENCE_SERVICE: AccessRule(gids=fence_gids)}))
