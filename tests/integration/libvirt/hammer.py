# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that asks a libvirtd from many threads while it hangs: `python -m ... URI PID`.

In a process of its own, for what it shows is that the process lives on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

from vmchannel_host.hypervisors.libvirt.binding import open_link
from vmchannel_host.hypervisors.libvirt.link import Closed, LibvirtError, LibvirtEvent

THREADS = 6
KEEPALIVE = (1, 1)
CALM_S = 0.3  # for calls to be under way


def main(uri: str, pid: int) -> None:
    """Hammer on it until its keepalive has run out and it has answered again."""
    left, over = threading.Event(), threading.Event()

    def sink(event: LibvirtEvent) -> None:
        if isinstance(event, Closed):
            left.set()

    def ask() -> None:
        while not over.is_set():
            with suppress(LibvirtError):
                link.domains()
                link.settle()

    link = open_link(uri, sink, keepalive=KEEPALIVE)
    threads = [threading.Thread(target=ask) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    time.sleep(CALM_S)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert left.wait(60), "keepalive noticed nothing"
    finally:
        os.kill(pid, signal.SIGCONT)
    time.sleep(CALM_S)
    over.set()
    for thread in threads:
        thread.join()
    link.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
