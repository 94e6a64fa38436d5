# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host daemon: every object is built here, each gets its collaborators, then they run together."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import fence_vmchannel
from fence_vmchannel.access import ROOT_ONLY, AccessRules
from fence_vmchannel.core.events import PeerIdentity
from fence_vmchannel.errors import LinkError
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.messages import FENCE_SERVICE, REQUEST_ID_BYTES, FenceAction, FenceAnswer
from fence_vmchannel.pace import Pace
from vmchannel_host.admin.daemon_view import Health, View, journal_state
from vmchannel_host.admin.feed import Feed
from vmchannel_host.admin.listener import AdminSocketError
from vmchannel_host.admin.metrics import Metrics
from vmchannel_host.admin.server import AdminServer
from vmchannel_host.bus.local import LocalBus
from vmchannel_host.config.loading import check_config
from vmchannel_host.config.model import HostConfig
from vmchannel_host.doctor.daemon_facts import Doctor, MachineLook
from vmchannel_host.doctor.facts import MachineFacts
from vmchannel_host.doctor.machine import collect
from vmchannel_host.fence_channel import FenceChannels, Metered
from vmchannel_host.fencing.confirm import OperatorWord
from vmchannel_host.fencing.coordinator import Coordinator
from vmchannel_host.fencing.instances import Instances
from vmchannel_host.fencing.ordered import Ordered
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.fencing.run import Shell
from vmchannel_host.fencing.service import FenceService
from vmchannel_host.fencing.tasks import Tasks
from vmchannel_host.hot_plug import HotPlug
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.launch import Launcher
from vmchannel_host.journal.journal import Journal
from vmchannel_host.journal.types import JournalError, JournalLocked
from vmchannel_host.journal.unusable import UnusableJournal
from vmchannel_host.model import VmUuid
from vmchannel_host.notify import Notifier
from vmchannel_host.parts import Parts, host_hypervisor, port_listeners, real_parts, warn_of_namespace
from vmchannel_host.policy.aliases import AliasTable
from vmchannel_host.port_sockets.listeners import CONNECT_DIRECTORY, PortListeners
from vmchannel_host.port_terms import terms_of_port
from vmchannel_host.registry.registry import VmRegistry
from vmchannel_host.reporter import Reporter
from vmchannel_host.returned_memory import ReturnedMemory
from vmchannel_host.settings import Settings, fence_settings, start_commands
from vmchannel_host.vm_ports import VmPorts

FIRST_LOOK_S: Final = 10.0
"""How long the start waits for the first look. Serving begins also without one: each fence takes its own."""

GRACE_S: Final = 10.0
"""How long a stop waits for running operations. What is left is in the journal for the next daemon."""

CHECK_S: Final = 15.0
"""Between two checks of the journal."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


class StartError(Exception):
    """The daemon cannot start; the text names what is in the way."""


def build(
    config: HostConfig,
    *,
    file: Path | None = None,
    notifier: Notifier | None = None,
    parts: Parts | None = None,
) -> Daemon:
    """Make the daemon of a configuration. Nothing is opened yet. `file` is where it was read from."""
    return Daemon(config, file, notifier or Notifier({}), parts or real_parts())


@dataclass(frozen=True, slots=True)
class _Core:
    """What one run of the daemon is made of, beside its hub."""

    journal: Journal
    instances: Instances
    names: AliasTable
    coordinator: Coordinator
    service: FenceService
    answers: Metered
    tasks: Tasks
    metrics: Metrics
    feed: Feed


class Daemon:
    """The host daemon. `run` once; `stop` and `reload` from the same event loop."""

    def __init__(self, config: HostConfig, file: Path | None, notifier: Notifier, parts: Parts) -> None:
        self._settings = Settings(config)
        self._file = file
        self._notifier = notifier
        self._parts = parts
        self._health = Health()
        self._stop = asyncio.Event()
        self._launcher = Launcher(start_commands(config))
        self._hypervisor = host_hypervisor(config, parts, self._launcher)
        self._coordinator: Coordinator | None = None
        self._registry = VmRegistry(
            config.host,
            standalone=config.cluster.standalone,
            defined=lambda: self._hypervisor.definitions().names,
        )
        self._registry.expect(self._settings.policy.named_uuids())

    def stop(self) -> None:
        """End `run` in order. Idempotent."""
        self._stop.set()

    def reload(self, config: HostConfig) -> None:
        """Take over what a checked configuration changes: policy, aliases, fencing, start commands."""
        self._notifier.reloading()
        config = self._settings.take(config)
        self._registry.expect(self._settings.policy.named_uuids())
        self._launcher.replace(start_commands(config))
        if self._coordinator is not None:
            self._coordinator.set_settings(fence_settings(config))
        logging.getLogger("vmchannel_host").setLevel(config.log.level.value.upper())
        logging.getLogger("fence_vmchannel").setLevel(config.log.level.value.upper())
        _log.info("configuration read again: %d groups", len(config.policy.groups))
        self._notifier.ready()

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            StartError: the journal, a socket or a directory cannot be used; the text names it.
        """
        config = self._settings.config
        warn_of_namespace(self._parts.processes.pid_namespace)
        try:
            config.paths.run.mkdir(mode=0o755, parents=True, exist_ok=True)
            config.paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_connect_directory(config.paths.run / CONNECT_DIRECTORY)
            journal = await self._unless_stopped(self._open_journal(config))
        except (JournalError, OSError) as error:
            raise StartError(str(error)) from error
        if journal is None:
            return
        try:
            await self._run_with(journal)
        except LinkError as error:  # another daemon keeps its sessions where ours are
            raise StartError(str(error)) from error
        finally:
            await journal.close()

    async def _unless_stopped(self, work: Coroutine[object, object, T]) -> T | None:
        """What comes of `work`; None when `stop` comes before: a disk may be dead."""
        task = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            stopping.cancel()
            task.cancel()

    async def _open_journal(self, config: HostConfig) -> Journal:
        """One that cannot be used is taken too: whoever asks for a fence or for what is wrong is told why."""
        try:
            return await Journal.open(
                config.paths.state / "journal.db",
                config.paths.state / "journal.key",
                boot_id=self._parts.processes.boot_id,
                wall_clock=self._parts.wall_clock,
                boottime=self._parts.clock,
            )
        except JournalLocked:
            raise
        except JournalError as error:
            _log.error("every fence is refused until the journal is mended and the daemon started: %s", error)
            return UnusableJournal(error)

    async def _run_with(self, journal: Journal) -> None:
        core = self._build_core(journal)
        try:
            if not journal.problem:
                await core.instances.restore()
                core.names.restore(await journal.aliases())
        except JournalError as error:
            raise StartError(f"the journal cannot be read: {error}") from error
        self._coordinator = core.coordinator
        refuse = partial(core.metrics.input_refused, "port-connection")
        listeners = port_listeners(self._settings.config, self._parts, refuse)
        with closing(listeners):  # last: sockets that nobody serves are removed
            await self._run_hub(core, journal, listeners)

    async def _run_hub(self, core: _Core, journal: Journal, listeners: PortListeners) -> None:
        async with self._build_hub() as hub:
            ports = VmPorts(
                hub,
                self._settings.config.ports.prefix,
                self._parts.peers,
                listeners,
                self._hypervisor.look_at_ports,
                partial(terms_of_port, self._settings.config),
            )
            reporter = Reporter(
                self._registry,
                ports,
                core.service,
                core.feed,
                self._parts.wall_clock,
                core.metrics.session_begun,
            )
            core.instances.subscribe(reporter.on_instance)
            self._hypervisor.follow_defined_ports(ports.define)
            pace = Pace(self._settings.config.limits.requests, self._parts.clock)
            refused = partial(core.metrics.input_refused, "fence-message")
            hub.offer(FENCE_SERVICE, FenceChannels(core.answers, reporter.on_guest, pace, refused).serve)
            returned = ReturnedMemory(journal, hub.status, partial(self._destroy, core.answers), core.tasks)
            followers = (reporter.follow(hub.watch()), returned.follow(hub.watch()))
            await self._serve(core, hub, self._build_admin(core, hub, ports), followers)

    def _build_core(self, journal: Journal) -> _Core:
        """What fences, whoever asks."""
        config, parts = self._settings.config, self._parts
        instances = Instances(
            host=config.host,
            registry=self._registry,
            hypervisor=self._hypervisor,
            absence=parts.processes.absence,
            store=journal,
            clock=parts.clock,
        )
        names, tasks, metrics = AliasTable(), Tasks(), Metrics()
        bus = LocalBus[Ordered](config.host)
        shell = Shell(bus, self._hypervisor, instances, journal, parts.clock, tasks)
        coordinator = Coordinator(shell, fence_settings(config), parts.processes.boot_id)
        service = FenceService(
            host=config.host,
            boot_id=parts.processes.boot_id,
            coordinator=coordinator,
            instances=instances,
            watching=self._hypervisor,
            journal=journal,
            policy=lambda: self._settings.policy,
            names=names,
            clock=parts.clock,
            wall_clock=parts.wall_clock,
            tasks=tasks,
            random_bytes=parts.random_bytes,
        )
        answers = Metered(service, metrics.operation_answered, parts.clock)
        return _Core(journal, instances, names, coordinator, service, answers, tasks, metrics, Feed())

    def _build_hub(self) -> Hub:
        config, parts = self._settings.config, self._parts
        return Hub(
            PeerIdentity(parts.processes.boot_id, f"vmchanneld {fence_vmchannel.__version__}"),
            access=AccessRules(open_default=ROOT_ONLY, offer_default=ROOT_ONLY),
            max_clients=config.limits.clients,
            sessions=str(config.paths.run / "host.sessions"),
            clock=parts.clock,
            random_bytes=parts.random_bytes,
        )

    def _build_admin(self, core: _Core, hub: Hub, ports: VmPorts) -> AdminServer:
        view = View(
            host=self._settings.config.host,
            instances=core.instances,
            policy=lambda: self._settings.policy,
            names=core.names,
            hub=hub,
            ports=ports,
            operations=core.coordinator,
            operator=core.answers,
            rules=lambda: core.coordinator.settings.rules,
            doctor=self._build_doctor(core, hub, ports),
            libvirts=self._hypervisor.libvirts,
            word=OperatorWord(
                instances=core.instances,
                policy=lambda: self._settings.policy,
                names=core.names,
                rules=lambda: core.coordinator.settings.rules,
                running=core.coordinator.running,
            ),
            hot_plug=HotPlug(
                plugs=self._hypervisor,
                directory=self._registry.directory,
                policy=lambda: self._settings.policy,
                names=core.names,
                running=core.coordinator.running,
                log=core.journal,
                prefix=self._settings.config.ports.prefix,
            ),
            journal=core.journal,
            feed=core.feed,
            health=self._health,
            clock=self._parts.clock,
            wall_clock=self._parts.wall_clock,
        )
        return AdminServer(view, core.metrics, self._settings.config.paths.admin_socket)

    def _build_doctor(self, core: _Core, hub: Hub, ports: VmPorts) -> Doctor:
        settings, parts = self._settings, self._parts

        def machine(paths: Sequence[str], timeout_s: float) -> MachineFacts:
            problems = [str(one) for one in check_config(self._file)] if self._file is not None else []
            return collect(
                settings.config,
                ports=paths,
                daemon=os.getpid(),
                problems=problems,
                timeout_s=timeout_s,
                pid_namespace=parts.processes.pid_namespace,
            )

        return Doctor(
            registry=self._registry,
            policy=lambda: settings.policy,
            names=core.names,
            rules=lambda: core.coordinator.settings.rules,
            cluster=lambda: settings.config.cluster,
            hub=hub.status,
            ports=ports,
            journal=core.journal,
            journal_problem=lambda: journal_state(core.journal, self._health),
            state=lambda: self._health.state,
            boot_id=parts.processes.boot_id,
            clock=parts.clock,
            wall_clock=parts.wall_clock,
            machine=MachineLook(machine),
            libvirts=self._hypervisor.libvirts,
        )

    async def _destroy(self, answers: Metered, vm: VmUuid, reason: str) -> FenceAnswer:
        """Fence a VM on the daemon's own account."""
        request = answers.operator_request(
            self._parts.random_bytes(REQUEST_ID_BYTES),
            FenceAction.OFF,
            vm,
            self._settings.config.fencing.timeout_s,
        )
        return await answers.answer(request, Requester(None, f"vmchanneld: {reason}"))

    async def _serve(
        self,
        core: _Core,
        hub: Hub,
        admin: AdminServer,
        followers: Iterable[Coroutine[object, object, None]],
    ) -> None:
        instances, coordinator = core.instances, core.coordinator
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._hypervisor.run(), name="hypervisor")
                group.create_task(instances.run(), name="instances")
                group.create_task(core.tasks.run(), name="fencing")
                for follower in followers:
                    group.create_task(follower, name="follower")
                group.create_task(self._follow_journal(core.journal), name="journal check")
                group.create_task(self._feed_watchdog(), name="watchdog")
                try:
                    if not core.journal.problem:
                        await self._first_look(instances)
                        await coordinator.resume()
                    hub.serve(str(self._settings.config.paths.host_socket), mode=0o660)
                    await admin.start()
                except (JournalError, LinkError, AdminSocketError) as error:
                    failure = error
                    raise _Stopped from error
                self._health.state = "ready"
                self._notifier.ready(f"{len(instances.registry.vms())} VMs known")
                _log.info("ready host=%s", self._settings.config.host)
                await self._stop.wait()
                await self._end(admin, coordinator)
                raise _Stopped
        except* _Stopped:
            pass
        finally:
            await admin.close(timeout_s=1.0)
        if failure is not None:
            raise StartError(str(failure)) from failure

    async def _first_look(self, instances: Instances) -> None:
        try:
            await instances.look(timeout_s=FIRST_LOOK_S)
        except (HypervisorError, TimeoutError) as error:
            _log.warning(
                "the first look failed; each fence will take its own: %s", error or "no answer in time"
            )

    async def _end(self, admin: AdminServer, coordinator: Coordinator) -> None:
        """Accept nothing more, and give what runs a while: its outcome is worth more than a quick stop."""
        self._health.state = "stopping"
        self._notifier.stopping()
        _log.info("stopping; %d operations run", len(coordinator.running()))
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                while coordinator.running():  # noqa: ASYNC110 (ends once in a life; no event is worth it)
                    await asyncio.sleep(0.05)
        await admin.close(timeout_s=1.0)

    async def _follow_journal(self, journal: Journal) -> None:
        """Know whether the journal can be read and pruned, for status and metrics."""
        while True:
            try:
                await journal.prune(self._settings.config.journal.keep_s)
                self._health.journal = journal.short or "ok"
            except JournalError as error:
                self._health.journal = str(error)
                _log.error("journal: %s", error)
            await asyncio.sleep(CHECK_S)

    async def _feed_watchdog(self) -> None:
        interval_s = self._notifier.watchdog_interval_s
        while interval_s is not None:
            self._notifier.watchdog()
            await asyncio.sleep(interval_s)


def _make_connect_directory(path: Path) -> None:
    path.mkdir(exist_ok=True)
    path.chmod(0o711)  # whatever the umask: QEMU's user finds the socket that is his


class _Stopped(Exception):
    """Asked to stop: ends the task group."""
