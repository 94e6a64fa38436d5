# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make bench`: run every measurement and print a table."""

from __future__ import annotations

import sys
from itertools import chain

from benchmarks import core, guest_channel, host_fencing, rig, scale
from benchmarks.figures import machine_line


def main() -> int:
    """Print figures as they come: what, median, p99, unit, number of values."""
    print(machine_line())
    print(f"{'':46} {'median':>9} {'p99':>9}")
    alone = (core.round_trips(5000), core.throughput(5), rig.ends(10), rig.boots(3))
    for measured in chain(alone, host_fencing.fencing(1000, 20), guest_channel.channels(1000, 5)):
        print(measured.row(), flush=True)
    for size in scale.growth((10, 100, 1000), 20, 10):
        for measured in scale.rows(size):
            print(measured.row(), flush=True)
    for measured in scale.crowded(300):
        print(measured.row(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
