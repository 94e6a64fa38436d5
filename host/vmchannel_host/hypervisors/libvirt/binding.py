# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt-python behind `Link`. Its modules are imported when the first connection is opened."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final, TypeVar, cast

from vmchannel_host.hypervisors.libvirt.events import EventThread, event_thread
from vmchannel_host.hypervisors.libvirt.link import (
    Closed,
    DomainChanged,
    DomainTexts,
    LibvirtError,
    Lifecycle,
    Link,
    MonitorEvent,
    NoSuchDomain,
    Sink,
)
from vmchannel_host.hypervisors.libvirt.pool import ConnectionPool
from vmchannel_host.hypervisors.libvirt.words import DomainRecord
from vmchannel_host.model import VmUuid

log = logging.getLogger(__name__)

KEEPALIVE: Final = (5, 3)
"""Seconds between two keepalive messages, how many may be unanswered: a mute libvirtd is left after 20 s."""

SETTLE_S: Final = 5.0

T = TypeVar("T")


def open_link(uri: str, sink: Sink, *, keepalive: tuple[int, int] = KEEPALIVE) -> Link:
    """Implements `OpenLink`."""
    try:
        thread = event_thread()
        libvirt: Any = import_module("libvirt")
        qemu: Any = import_module("libvirt_qemu")
    except ImportError as error:
        raise LibvirtError(f"{uri}: libvirt's Python module is missing: {error}") from error
    libvirt.registerErrorHandler(_quiet, None)
    link = _PythonLink(uri, libvirt, qemu, thread)
    try:
        link.subscribe(sink)
        link.watch(sink, keepalive)
    except BaseException:
        link.close()
        raise
    return link


class _PythonLink:
    """Implements `Link`, with connections of three kinds, so that no two threads meet in one (see `pool`).

    One tells events, and has no calls but those of `settle`, which are about their order. One has keepalive,
    which libvirt's event thread sends. The pool's are for all other calls.
    """

    def __init__(self, uri: str, libvirt: Any, qemu: Any, thread: EventThread) -> None:
        self._uri = uri
        self._libvirt = libvirt
        self._qemu = qemu
        self._thread = thread
        self._pool: ConnectionPool[Any] = ConnectionPool(self._open, self._leave)
        self._telling: Any = None  # the connection that events come through
        self._settling = threading.Lock()  # held for each call on it
        self._watchdog: Any = None  # the one with keepalive
        self._callbacks: list[int] = []
        self._monitor_callback: int | None = None

    def subscribe(self, sink: Sink) -> None:
        """Have all events given to `sink`."""
        library = self._libvirt

        def lifecycle(_: object, domain: Any, event: int, detail: int, __: object) -> None:
            sink(Lifecycle(_uuid(domain), domain.ID(), event, detail))

        def changed(_: object, domain: Any, *__: object) -> None:
            sink(DomainChanged(_uuid(domain)))

        def monitor(
            _: object, domain: Any, event: str, seconds: int, micros: int, text: str | None, __: object
        ) -> None:
            sink(MonitorEvent(_uuid(domain), domain.ID(), event, _data(text), seconds + micros / 1e6))

        def register() -> None:
            for event, handler in (
                (library.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
                (library.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, changed),
                (library.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, changed),
            ):
                self._callbacks.append(self._telling.domainEventRegisterAny(None, event, handler, None))
            self._monitor_callback = self._qemu.qemuMonitorEventRegister(
                self._telling, None, None, monitor, None
            )

        self._telling = self._open()
        self._call(lambda: self._tell_end(self._telling, sink))
        self._call(register)

    def watch(self, sink: Sink, keepalive: tuple[int, int]) -> None:
        """Tell `sink` when libvirtd does not answer any more: seconds between questions, how many."""
        self._watchdog = self._open()
        self._call(lambda: self._tell_end(self._watchdog, sink))
        self._call(lambda: self._watchdog.setKeepAlive(*keepalive))

    def _tell_end(self, connection: Any, sink: Sink) -> None:
        def closed(_: object, reason: int, __: object) -> None:
            sink(Closed(f"{self._uri}: the connection has ended ({_CLOSE_REASONS.get(reason, reason)})"))

        connection.registerCloseCallback(closed, None)

    def domains(self) -> Sequence[DomainRecord]:
        library = self._libvirt
        with self._pool.borrow() as connection:

            def listed(flags: int) -> list[Any]:
                return cast("list[Any]", self._call(lambda: connection.listAllDomains(flags)))

            saved = {_uuid(one) for one in listed(library.VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)}
            auto = {_uuid(one) for one in listed(library.VIR_CONNECT_LIST_DOMAINS_AUTOSTART)}
            found: list[DomainRecord] = []
            for domain in listed(0):
                try:
                    found.append(self._record(domain, _uuid(domain) in saved, _uuid(domain) in auto))
                except NoSuchDomain:
                    continue  # it ended, or was undefined, meanwhile
            return found

    def domain(self, vm: VmUuid) -> DomainRecord:
        with self._borrowed(vm) as domain:

            def flags() -> tuple[bool, bool]:
                return bool(domain.hasManagedSaveImage()), bool(domain.autostart())

            try:
                saved, auto = self._call(flags)
            except NoSuchDomain:
                raise
            except LibvirtError:  # a transient domain has neither
                saved, auto = False, False
            return self._record(domain, saved, auto)

    def xml(self, vm: VmUuid) -> str:
        with self._borrowed(vm) as domain:
            return cast(str, self._call(domain.XMLDesc))

    def probe(self, vm: VmUuid) -> int | None:
        # These ask QEMU, whether the domain has such threads or not.
        wanted = self._libvirt.VIR_DOMAIN_STATS_IOTHREAD
        with self._borrowed(vm) as domain:
            self._call(lambda: domain.connect().domainListGetStats([domain], wanted, 0))
            job = self._call(domain.jobStats)
        if not job.get("type"):
            return None
        return int(job.get("operation", 0))

    def settle(self) -> None:
        # libvirtd hands out events in its main loop, which also reads requests. An event that it had before
        # the first of these is on its way to us before it reads the third, so before that one's answer.
        with self._settling:
            for _ in range(3):
                self._call(self._telling.numOfDomains)
        try:
            self._thread.settle(timeout_s=SETTLE_S)
        except TimeoutError as error:
            raise LibvirtError(f"{self._uri}: its events are not delivered") from error

    def remove_managed_save(self, vm: VmUuid) -> bool:
        with self._borrowed(vm) as domain:
            if not self._call(domain.hasManagedSaveImage):
                return False
            self._call(domain.managedSaveRemove)
            return True

    def create(self, vm: VmUuid) -> None:
        # S0: whatever was saved meanwhile is not continued.
        flags = self._libvirt.VIR_DOMAIN_START_FORCE_BOOT
        with self._borrowed(vm) as domain:
            self._call(lambda: domain.createWithFlags(flags))

    def reset(self, vm: VmUuid) -> None:
        with self._borrowed(vm) as domain:
            self._call(domain.reset)

    def definitions(self, vm: VmUuid) -> DomainTexts:
        with self._borrowed(vm) as domain:

            def read() -> DomainTexts:
                live = domain.XMLDesc(0) if domain.isActive() else None
                if not domain.isPersistent():
                    return DomainTexts(live, None, False)
                config = domain.XMLDesc(self._libvirt.VIR_DOMAIN_XML_INACTIVE)
                return DomainTexts(live, config, bool(domain.hasManagedSaveImage()))

            return self._call(read)

    def attach_device(self, vm: VmUuid, xml: str, *, live: bool, config: bool) -> None:
        library = self._libvirt
        flags = (live and library.VIR_DOMAIN_AFFECT_LIVE) | (config and library.VIR_DOMAIN_AFFECT_CONFIG)
        with self._borrowed(vm) as domain:
            self._call(lambda: domain.attachDeviceFlags(xml, flags))

    def detach_device(self, vm: VmUuid, xml: str, *, live: bool) -> None:
        library = self._libvirt
        flags = library.VIR_DOMAIN_AFFECT_LIVE if live else library.VIR_DOMAIN_AFFECT_CONFIG
        with self._borrowed(vm) as domain:
            self._call(lambda: domain.detachDeviceFlags(xml, flags))

    def close(self) -> None:
        def forget_events() -> None:
            self._telling.unregisterCloseCallback()
            for callback in self._callbacks:
                self._telling.domainEventDeregisterAny(callback)
            if self._monitor_callback is not None:
                self._qemu.qemuMonitorEventDeregister(self._telling, self._monitor_callback)

        def forget_watchdog() -> None:
            self._watchdog.unregisterCloseCallback()
            self._watchdog.setKeepAlive(0, 0)

        self._pool.close()
        if self._watchdog is not None:
            self._try(forget_watchdog)
            self._leave(self._watchdog)
        if self._telling is not None:
            with self._settling:
                self._try(forget_events)
                self._leave(self._telling)

    def _open(self) -> Any:
        return self._call(lambda: self._libvirt.open(self._uri))

    def _leave(self, connection: Any) -> None:
        self._try(connection.close)

    def _try(self, step: Callable[[], object]) -> None:
        try:
            self._call(step)
        except LibvirtError as error:
            log.debug("closing: %s", error)

    @contextmanager
    def _borrowed(self, vm: VmUuid) -> Generator[Any]:
        """The domain, on a connection that no other call uses meanwhile."""
        with self._pool.borrow() as connection:
            yield self._call(lambda: connection.lookupByUUIDString(vm))

    def _record(self, domain: Any, saved: bool, auto: bool) -> DomainRecord:
        state, reason = self._call(domain.state)
        return DomainRecord(_uuid(domain), str(domain.name()), domain.ID(), state, reason, saved, auto)

    def _call(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except self._libvirt.libvirtError as error:
            kind = NoSuchDomain if error.get_error_code() == self._libvirt.VIR_ERR_NO_DOMAIN else LibvirtError
            raise kind(f"{self._uri}: {_reason(error)}") from error
        except UnicodeDecodeError as error:
            raise LibvirtError(f"{self._uri}: it answers with text that is no UTF-8") from error


_CLOSE_REASONS: Final = {0: "error", 1: "end of file", 2: "no answer", 3: "closed"}  # virConnectCloseReason


def _uuid(domain: Any) -> VmUuid:
    return VmUuid(str(domain.UUIDString()).lower())


def _data(text: str | None) -> dict[str, object]:
    try:
        value: object = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _reason(error: Exception) -> str:
    return str(error).strip()[:300] or type(error).__name__


def _quiet(_context: object, _error: object) -> None:
    """libvirt prints every error otherwise; they are raised as well."""
