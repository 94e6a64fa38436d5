# SPDX-License-Identifier: LGPL-2.1-or-later
"""One execution of a domain with its process: what libvirt tells becomes what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vmchannel_host.hypervisors.instances import InstanceTable, Watched
from vmchannel_host.hypervisors.libvirt import words
from vmchannel_host.hypervisors.libvirt.link import Lifecycle, MonitorEvent
from vmchannel_host.hypervisors.libvirt.monitor import LibvirtMonitor
from vmchannel_host.hypervisors.libvirt.words import DomainRecord, DomainXml
from vmchannel_host.hypervisors.qmp_state import MonitorFacts
from vmchannel_host.model import Migration, RunState


class Followed:
    """A process of which libvirt tells."""

    def __init__(
        self, table: InstanceTable, watched: Watched, record: DomainRecord, monitor: LibvirtMonitor
    ) -> None:
        self.watched = watched
        self.record = record
        self.monitor = monitor
        self._table = table
        self._xml = DomainXml()
        self._ran = False  # it was seen to run, so it receives no memory any more
        self._stopped = False  # libvirt has said how it ended: answers that are under way still are older
        watched.configured = True
        watched.attach(monitor)

    @property
    def alive(self) -> bool:
        """Whether its process has not ended and this is what tells of it."""
        return not self.watched.process.ended() and self.watched.monitor is self.monitor

    @property
    def ending(self) -> bool:
        """Whether its process has ended, and how is not settled yet: libvirt's word of it counts."""
        watched = self.watched
        return watched.process.ended() and watched.evidence is None and watched.monitor is self.monitor

    @property
    def asked_at(self) -> int:
        """To be given to `learn`: what was heard of a migration when its answers were asked for."""
        return self.watched.migration_events

    def receives(self, record: DomainRecord) -> bool:
        """Whether its process still receives the memory of another."""
        if self._ran or not self.watched.process.command.incoming:
            return False
        return words.migration(record, None, receives=True) is Migration.INCOMING

    def learn(
        self, record: DomainRecord, job: int | None, xml: DomainXml | None, *, probed: bool, asked_at: int
    ) -> None:
        """Take libvirt's answers.

        Args:
            record: the domain.
            job: the job that is under way, if it was asked for.
            xml: None when it was not asked for.
            probed: its QEMU has answered too, and `job` is what there is; else a migration stays as it was.
            asked_at: see `asked_at`.
        """
        if self._stopped:
            return
        watched = self.watched
        self.record, self._xml = record, xml or self._xml
        run_state = words.run_state(record)
        self._ran = self._ran or run_state is RunState.RUNNING
        receives = watched.process.command.incoming and not self._ran
        migration = words.migration(record, job, receives=receives)
        if not probed and migration is Migration.NONE and watched.last_migration is not Migration.UNKNOWN:
            migration = watched.last_migration
        facts = MonitorFacts(
            name=record.name,
            run_state=run_state,
            migration=migration,
            ports=tuple(channel.port for channel in self._xml.channels),
            resettable=self._xml.resettable,
        )
        watched.learn(facts, asked_at=asked_at)
        self._table.changed(watched)

    def mute(self) -> None:
        """libvirt, or its QEMU, does not answer."""
        if self._stopped:
            return
        self.watched.mute = True
        self._table.changed(self.watched)

    def hear(self, event: MonitorEvent) -> None:
        """Take an event of its QEMU at once: there may be no time for a question before it is gone."""
        watched = self.watched
        if event.name == "MIGRATION":
            watched.migration_events += 1
            status = event.data.get("status")
            watched.last_migration = words.migration_after_event(status, watched.last_migration)
        elif event.name == "VSERPORT_CHANGE":
            self._port_changed(event.data)
        else:
            watched.hear(event.name, event.data)
        self.monitor.hear(event)
        self._table.changed(watched)

    def stopped(self, event: Lifecycle, *, managed_save: bool | None) -> None:
        """libvirt says that it has ended, and how. That is no proof of the end.

        Args:
            event: what it says.
            managed_save: whether libvirt keeps the memory; None when it did not say.
        """
        watched, self._stopped = self.watched, True
        if event.detail == words.STOPPED_MIGRATED:
            watched.last_migration = Migration.COMPLETED
        elif event.detail == words.STOPPED_SAVED:
            # What libvirt keeps is removed by an off; a file elsewhere can be continued, on any host (S0).
            watched.last_migration = Migration.NONE if managed_save else Migration.COMPLETED
        if watched.monitor is self.monitor:
            watched.mute = False
        self._table.changed(watched)
        self.monitor.close()

    def lose(self) -> None:
        """The connection is lost."""
        self.monitor.close()
        if self.watched.monitor is self.monitor:
            self.watched.monitor = None
            self._table.changed(self.watched)

    def _port_changed(self, data: Mapping[str, object]) -> None:
        """libvirt brings its XML up to date later than it passes the event on."""
        channels = tuple(
            replace(channel, port=replace(channel.port, guest_open=data.get("open") is True))
            if channel.alias and channel.alias == data.get("id")
            else channel
            for channel in self._xml.channels
        )
        self._xml = replace(self._xml, channels=channels)
        if self.watched.facts is not None:
            ports = tuple(channel.port for channel in channels)
            self.watched.facts = replace(self.watched.facts, ports=ports)
