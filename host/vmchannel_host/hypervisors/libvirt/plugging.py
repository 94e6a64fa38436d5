# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports attached to domains, and detached: in what runs and in its definition, both or neither.

Nothing here keeps a state: what we attach bears an alias of ours, so that it is found again. A call that did
not return in time may still take effect; until it has returned, nothing else is ordered for that domain.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol, TypeVar

from vmchannel_host.hypervisors import HypervisorError, PlugError, Plugged, PlugProblem
from vmchannel_host.hypervisors.libvirt.link import LibvirtError, Link, NoSuchDomain
from vmchannel_host.hypervisors.libvirt.plug_words import (
    Devices,
    VirtioChannel,
    channel_xml,
    name_problem,
    read_devices,
)
from vmchannel_host.hypervisors.monitors import MonitorClosed, MonitorMute
from vmchannel_host.hypervisors.plug_words import moving_problem
from vmchannel_host.model import Migration, PortName, ProcessIdentity, RunState, VmUuid

T = TypeVar("T")

UNDO_S: Final = 2.0
"""How long undoing a failed order may take, seconds, also when its time is over."""

POLL_S: Final = 0.1
"""Between two looks whether QEMU has let a port go, in seconds."""

_AGAIN: Final = "do it again: that is safe"
_MEND: Final = "mend what it names; doing it again is safe"


class Domains(Protocol):
    """The libvirt that has the domains."""

    @property
    def uri(self) -> str: ...

    @property
    def problem(self) -> str:
        """Why it may have domains that are not known; "" when it has told all."""
        ...

    def defined(self) -> Mapping[VmUuid, str]:
        """The domains that it defines or runs, with their names."""
        ...

    def follows(self, identity: ProcessIdentity) -> bool:
        """Whether it tells of that process."""
        ...

    async def state_of(self, vm: VmUuid, *, timeout_s: float) -> tuple[RunState, Migration]:
        """Ask libvirt and QEMU. MonitorError: no answer."""
        ...

    async def call_link(
        self,
        name: str,
        function: Callable[[Link], T],
        *,
        timeout_s: float,
        on_return: Callable[[], None] = ...,
    ) -> T:
        """Make one call to libvirt. MonitorError: it failed, or did not return in time."""
        ...


class LibvirtPlugging:
    """Implements `Definer`."""

    def __init__(self, domains: Domains, directory: str) -> None:
        """
        Args:
            domains: the libvirt.
            directory: where it keeps the sockets of channels whose path nobody chose.
        """
        self._domains = domains
        self._directory = directory
        self._late: set[VmUuid] = set()  # a call that changes them has not returned

    def __str__(self) -> str:
        return self._domains.uri

    @property
    def problem(self) -> str:
        """See `Definer`."""
        return self._domains.problem

    def defined(self) -> Mapping[VmUuid, str]:
        """See `Definer`."""
        return self._domains.defined()

    def follows(self, identity: ProcessIdentity) -> bool:
        """See `Definer`."""
        return self._domains.follows(identity)

    async def attach(self, vm: VmUuid, port: PortName, *, timeout_s: float) -> Plugged:
        """See `Hypervisor.attach_port`."""
        async with self._order(vm, timeout_s) as order:
            before = await order.read()
            lacking = any(before.lacks(port))
            if lacking:
                self._check_place(vm, port, before)
                await order.check_state(before)
                await _add(order, before, port)
            return Plugged(lacking, (port,), before.advice)

    async def detach(self, vm: VmUuid, port: PortName | None, *, force: bool, timeout_s: float) -> Plugged:
        """See `Hypervisor.detach_port`."""
        async with self._order(vm, timeout_s) as order:
            before = await order.read()
            found = before.wanted(port)
            if not force and not all(one.ours for one in found):
                raise PlugError(
                    PlugProblem.NOT_OURS,
                    "the domain was defined with that port, or got it by another hand",
                    "take it out of its definition (`virsh edit`); `--force` takes it away for good",
                )
            names = tuple(dict.fromkeys(PortName(one.name) for one in found))
            if names:
                await order.check_state(before)
            for name in names:
                await _remove(order, before, name, ours=port is None)
            if names:
                await _until_gone(order, port)
            return Plugged(bool(names), names)

    def _check_place(self, vm: VmUuid, port: PortName, domain: _Domain) -> None:
        """Refuse what libvirt would refuse when it is half done, or at the domain's next start."""
        problem = name_problem(port, self.defined().get(vm, ""), self._directory)
        if problem:
            raise PlugError(PlugProblem.FAILED, problem, "choose another name")
        if domain.lacks(port)[0] and domain.live is not None and not domain.live.has_controller:
            reason = "it runs without a virtio-serial controller, and libvirt plugs none in"
            remedy = "shut it off, attach the port to its definition, and start it again"
            raise PlugError(PlugProblem.NO_SLOT, reason, remedy)

    @asynccontextmanager
    async def _order(self, vm: VmUuid, timeout_s: float) -> AsyncGenerator[_Order, None]:
        if vm in self._late:
            reason = f"busy: an earlier call to {self} for this VM has not returned"
            raise PlugError(PlugProblem.BUSY, reason, _AGAIN)
        order = _Order(self._domains, vm, timeout_s, self._late)
        try:
            yield order
        except HypervisorError as error:
            raise _as_problem(error, unknown=order.changing) from error


@dataclass(frozen=True, slots=True)
class _Domain:
    """A domain's channels where it runs and where it is defined; None: it does not, or is not."""

    live: Devices | None
    config: Devices | None
    managed_save: bool

    def lacks(self, port: PortName) -> tuple[bool, bool]:
        """Whether the port is missing in what runs, and in the definition.

        Raises:
            PlugError: there is one that cannot be served.
        """
        halves = [half.named(port) if half is not None else None for half in (self.live, self.config)]
        if any(not one.usable for half in halves if half is not None for one in half):
            reason = f"it has a channel named {port!r} that is no unix socket"
            remedy = "give the channel type='unix', or detach it"
            raise PlugError(PlugProblem.UNSUITABLE, reason, remedy)
        live, config = (half is not None and not half for half in halves)
        return live, config

    def wanted(self, port: PortName | None) -> tuple[VirtioChannel, ...]:
        """What a detach of the port (None: of all that are ours) is about."""
        return tuple(
            one
            for half in (self.live, self.config)
            if half is not None
            for one in half.channels
            if (one.name == port if port is not None else one.ours)
        )

    @property
    def advice(self) -> tuple[str, ...]:
        """What an operator is to know after an attach."""
        if self.config is None:
            return (
                "it is there until the VM ends: the domain is transient, it has no definition to keep it",
            )
        if self.managed_save:
            return ("libvirt keeps a managed save of it, which continues without the port",)
        return () if self.live is not None else ("it does not run: it has the port from its next start on",)


class _Order:
    """One order: what is asked of libvirt for it, within its time."""

    def __init__(self, domains: Domains, vm: VmUuid, timeout_s: float, late: set[VmUuid]) -> None:
        self._domains = domains
        self._late = late
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self.vm = vm
        self.changing = False  # something has been asked for that may have, or take, effect

    @property
    def left_s(self) -> float:
        return max(self._deadline - asyncio.get_running_loop().time(), 0.01)

    def extend(self, seconds: float) -> None:
        """Have at least so much time."""
        self._deadline = max(self._deadline, asyncio.get_running_loop().time() + seconds)

    async def read(self) -> _Domain:
        vm = self.vm
        texts = await self._domains.call_link(
            "read definitions", lambda link: link.definitions(vm), timeout_s=self.left_s
        )
        live, config = (None if one is None else read_devices(one) for one in (texts.live, texts.config))
        return _Domain(live, config, texts.managed_save)

    async def check_state(self, domain: _Domain) -> None:
        if domain.live is not None:
            state = await self._domains.state_of(self.vm, timeout_s=self.left_s)
            if problem := moving_problem(*state):
                raise PlugError(PlugProblem.MIGRATING, problem, "wait for its end")

    async def attach(self, xml: str, *, live: bool, config: bool) -> None:
        vm = self.vm
        await self._change("attach", lambda link: link.attach_device(vm, xml, live=live, config=config))

    async def detach(self, xml: str, *, live: bool) -> None:
        """Take a channel out of what runs, or out of the definition."""
        vm = self.vm
        await self._change("detach", lambda link: link.detach_device(vm, xml, live=live))

    async def _change(self, name: str, function: Callable[[Link], None]) -> None:
        self.changing = True
        self._late.add(self.vm)
        await self._domains.call_link(
            name, function, timeout_s=self.left_s, on_return=lambda: self._late.discard(self.vm)
        )


async def _add(order: _Order, before: _Domain, port: PortName) -> None:
    """Add the port where it is missing."""
    live, config = before.lacks(port)
    try:
        await order.attach(channel_xml(port), live=live, config=config)
    except LibvirtError as error:
        await _restoring(order, error, lambda: _take_back(order, before, port))
    if any((await order.read()).lacks(port)):
        reason = "it was started, ended or defined anew meanwhile, and has the port in part"
        raise PlugError(PlugProblem.FAILED, reason, _AGAIN)


async def _take_back(order: _Order, before: _Domain, port: PortName) -> None:
    now = await order.read()
    for then, half, live in ((before.config, now.config, False), (before.live, now.live, True)):
        if half is None or (then is not None and then.named(port)):
            continue
        for one in half.named(port):
            if one.ours:
                await order.detach(one.xml, live=live)


async def _remove(order: _Order, before: _Domain, port: PortName, *, ours: bool) -> None:
    """Take the port out of the definition, which can be undone, and then out of what runs, which cannot."""
    config, live = (
        [] if half is None else [one for one in half.named(port) if one.ours or not ours]
        for half in (before.config, before.live)
    )
    for one in config:
        await order.detach(one.xml, live=False)
    try:
        for one in live:
            await order.detach(one.xml, live=True)
    except LibvirtError as error:
        await _restoring(order, error, lambda: _put_back(order, config))


async def _put_back(order: _Order, config: list[VirtioChannel]) -> None:
    for one in config:
        await order.attach(one.xml, live=False, config=True)


async def _restoring(order: _Order, error: LibvirtError, undo: Callable[[], Awaitable[None]]) -> NoReturn:
    """Undo what was done before libvirt refused the rest, and tell of the refusal."""
    order.extend(UNDO_S)
    try:
        await undo()
    except HypervisorError as worse:
        reason = f"unknown: {error}; and what was done before is not known to be undone: {worse}"
        raise PlugError(PlugProblem.DEADLINE, reason, _AGAIN) from error
    raise error


async def _until_gone(order: _Order, port: PortName | None) -> None:
    """libvirt's detach may return before QEMU has let the port go."""
    while (await order.read()).wanted(port):
        if order.left_s <= POLL_S:
            raise MonitorMute("QEMU has not let the port go yet")
        await asyncio.sleep(POLL_S)


def _as_problem(error: HypervisorError, *, unknown: bool) -> PlugError:
    match error:
        case PlugError():
            return error
        case MonitorMute() | MonitorClosed() if unknown:
            return PlugError(PlugProblem.DEADLINE, f"unknown: {error}", _AGAIN)
        case MonitorMute():
            return PlugError(PlugProblem.DEADLINE, f"{error}; nothing was changed", _AGAIN)
        case MonitorClosed():
            return PlugError(PlugProblem.NO_MONITOR, str(error), "see `vmchannelctl doctor`")
        case NoSuchDomain():
            return PlugError(PlugProblem.NOT_RUNNING, str(error), "see `virsh list --all`")
        case _:
            return PlugError(PlugProblem.FAILED, str(error), _MEND)
