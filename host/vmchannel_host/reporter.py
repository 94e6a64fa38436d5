# SPDX-License-Identifier: LGPL-2.1-or-later
"""Passes on what happens to VMs and ports: to the hub's ports, to the fence service, and to live views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, assert_never

from fence_vmchannel.hub.events import (
    HubEvent,
    Overflow,
    PeerConnected,
    PeerDisconnected,
    PortAdded,
    PortRemoved,
    PortUnusable,
    ServiceOffered,
    ServiceWithdrawn,
    SessionWasReset,
    Synced,
)
from fence_vmchannel.hub.watch import Watch
from vmchannel_host.admin.feed import Feed
from vmchannel_host.admin.metrics import SessionBegin
from vmchannel_host.admin.view import AdminEvent
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.hypervisors import Ended, HypervisorEvent, Seen
from vmchannel_host.model import ProcessIdentity, RunState, VmUuid
from vmchannel_host.registry.registry import VmRegistry
from vmchannel_host.vm_ports import VmPorts


class Interrupted(Protocol):
    """Who must know that a VM's own requests have gone stale (S6): the fence service."""

    def requester_interrupted(self, vm: VmUuid) -> None: ...


class Reporter:
    """Hears of everything once, in order, and tells whom it concerns. Never blocks."""

    def __init__(
        self,
        registry: VmRegistry,
        ports: VmPorts,
        service: Interrupted,
        feed: Feed,
        wall_clock: Callable[[], float],
        count: Callable[[SessionBegin], None] = lambda _: None,
    ) -> None:
        """`count` hears of every session that begins."""
        self._registry = registry
        self._ports = ports
        self._service = service
        self._feed = feed
        self._wall_clock = wall_clock
        self._count = count
        self._run_states: dict[ProcessIdentity, RunState] = {}
        self._interruptions: dict[ProcessIdentity, int] = {}
        self._boots: dict[VmUuid, str] = {}  # the kernel boot with which a VM's guest last spoke

    def on_instance(self, event: HypervisorEvent) -> None:
        """A hypervisor saw an instance, or its end; the registry has it already."""
        match event:
            case Seen(instance):
                vm, identity = instance.vm_uuid, instance.identity
                before = self._run_states.get(identity)
                self._run_states[identity] = instance.run_state
                paused = before is RunState.RUNNING and instance.run_state is not RunState.RUNNING
                known = self._interruptions.get(identity, 0)
                self._interruptions[identity] = instance.interruptions
                if paused or instance.interruptions != known:  # a short pause shows in the count only
                    self._service.requester_interrupted(vm)
                if before is not instance.run_state:
                    kind = "vm.seen" if before is None else "vm.changed"
                    self._tell(kind, f"{instance.run_state.value}, {identity}", vm)
            case Ended(end):
                vm = end.identity.vm_uuid
                self._run_states.pop(end.identity, None)
                self._interruptions.pop(end.identity, None)
                self._tell(
                    "vm.ended", f"{end.identity}: {end.proof.value}, {end.cause.value}, io {end.io.value}", vm
                )
            case _:
                assert_never(event)
        self._ports.update(vm, [one for one in self._registry.instances(vm) if one.configured])

    def on_guest(self, requester: Requester) -> None:
        """A guest opened the fence service; another kernel boot ends its earlier requests (S6)."""
        if requester.vm is None:
            return
        before = self._boots.get(requester.vm)
        self._boots[requester.vm] = requester.guest_boot_id
        if before is not None and before != requester.guest_boot_id:
            self._service.requester_interrupted(requester.vm)

    async def follow(self, watch: Watch) -> None:
        """Tell live views of ports and sessions, until cancelled."""
        with watch as events:
            async for event in events:
                self._on_hub(event)

    def _on_hub(self, event: HubEvent) -> None:
        match event:
            case PeerConnected():
                self._ports.greeted(VmUuid(event.key), event.port)
                self._count("resumed" if event.resumed else "new")
                text = f"session {event.session[:8]}{' resumed' if event.resumed else ''}"
                self._tell("port.connected", f"{event.port}: {text}", VmUuid(event.key))
            case PeerDisconnected():
                self._tell("port.disconnected", f"{event.port}: {event.reason}", VmUuid(event.key))
            case SessionWasReset():
                self._count("reset")
                self._tell("session.reset", f"{event.port}: {event.reason}", VmUuid(event.key))
            case PortAdded():
                self._tell("port.added", event.port, VmUuid(event.key))
            case PortRemoved():
                self._tell("port.removed", event.port, VmUuid(event.key))
            case PortUnusable():
                self._tell("port.unusable", f"{event.port}: {event.reason}", VmUuid(event.key))
            case ServiceOffered() | ServiceWithdrawn() | Synced() | Overflow():
                pass  # of the hub's own applications; live views show VMs
            case _:
                assert_never(event)

    def _tell(self, kind: str, text: str, vm: VmUuid) -> None:
        if not self._registry.knows(vm):
            return  # somebody else's VM
        self._feed.publish(AdminEvent(self._wall_clock(), kind, text, vm, self._registry.name(vm)))
