# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's thread: a bounded queue of calls, several to a transaction, answered after the commit."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from vmchannel_host.journal.store import JournalStore
from vmchannel_host.journal.types import JournalBusy, JournalError, JournalMisuse, JournalShort

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BATCH = 64  # calls in one transaction: one fsync for all of them


class _Job(Generic[T]):
    """One call and where its result goes."""

    def __init__(self, call: Callable[[JournalStore], T]) -> None:
        self.future: Future[T] = Future()
        self._call = call
        self._result: Callable[[], None] = lambda: None

    def run(self, store: JournalStore) -> None:
        """Make the call; keep its outcome until the commit."""
        try:
            with store.savepoint():
                result = self._call(store)
        except (JournalMisuse, JournalShort) as error:
            refused = error
            self._result = lambda: self.future.set_exception(refused)
        else:
            self._result = lambda: self.future.set_result(result)

    def deliver(self) -> None:
        """Tell the caller, after the commit."""
        self._result()


class StoreThread:
    """Owns a `JournalStore` in a thread of its own.

    The thread is a daemon thread: a disk that never answers must not keep the process from ending.
    """

    def __init__(self, open_store: Callable[[], JournalStore], max_pending: int) -> None:
        self._open_store = open_store
        # One place more than calls: the end mark always fits.
        self._queue: queue.Queue[_Job[object] | None] = queue.Queue(max_pending + 1)
        self._max_pending = max_pending
        self._closed = False
        self.opened: Future[JournalStore] = Future()
        self.ended: Future[None] = Future()
        for told in (self.opened, self.ended):
            told.set_running_or_notify_cancel()  # who waits for them no more cannot cancel them
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        """Start the thread; `opened` tells whether the store could be opened."""
        self._thread.start()

    def submit(self, call: Callable[[JournalStore], T]) -> Future[T]:
        """Queue a call. A future that is cancelled before its turn is never called.

        Raises:
            JournalBusy: `max_pending` calls wait already.
            JournalError: the journal is closed.
        """
        if self._closed:
            raise JournalError("the journal is closed")
        job = _Job(call)
        if self._queue.qsize() >= self._max_pending:
            raise JournalBusy(f"{self._max_pending} calls wait for the disk")
        self._queue.put_nowait(job)  # type: ignore[arg-type]  # a job delivers to its own future only
        return job.future

    def close(self) -> None:
        """Let the thread end after the calls that wait; `ended` tells when."""
        if not self._closed:
            self._closed = True
            self._queue.put_nowait(None)

    def _run(self) -> None:
        try:
            store = self._open_store()
        except Exception as error:  # noqa: BLE001 - the top of a thread: the opener is told
            self.opened.set_exception(error)
            self.ended.set_result(None)
            return
        try:
            self.opened.set_result(store)
            self._serve(store)
        finally:
            store.close()
            self.ended.set_result(None)

    def _serve(self, store: JournalStore) -> None:
        more = True
        while more:
            batch, more = self._next_batch()
            jobs = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if not jobs:
                continue
            if store.short:
                store.make_room()  # somebody may have freed some
            _carry_out(store, jobs)
            store.make_room()  # after the answers: nobody waits for it who need not

    def _next_batch(self) -> tuple[list[_Job[object]], bool]:
        """Wait for a call and take what else waits; False with the last batch."""
        batch: list[_Job[object]] = []
        job = self._queue.get()
        while job is not None:
            batch.append(job)
            if len(batch) == _BATCH:
                return batch, True
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False


def _carry_out(store: JournalStore, jobs: list[_Job[object]]) -> None:
    """Make the calls in one transaction; where it fails, each in its own: one cannot fail another."""
    try:
        with store.transaction():
            for job in jobs:
                job.run(store)
    except Exception as error:
        if len(jobs) > 1:
            for job in jobs:
                _carry_out(store, [job])
            return
        if not isinstance(error, JournalError):
            logger.debug("journal call failed", exc_info=True)  # one line of it is in the caller's hands
            error = JournalError(f"internal error: {error!r}")
        jobs[0].future.set_exception(error)
        return
    for job in jobs:
        job.deliver()
