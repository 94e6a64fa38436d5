# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make bench`: run every measurement and print a table. `make bench ARGS=channel` runs one part."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Final

from benchmarks import agent, core, guest_channel, host_fencing, rig, scale
from benchmarks.figures import Figure, machine_line

PARTS: Final[Mapping[str, Callable[[], Iterable[Figure]]]] = MappingProxyType(
    {
        "core": lambda: (core.round_trips(5000), core.throughput(5)),
        "rig": lambda: (rig.ends(10), rig.boots(3)),
        "fencing": lambda: host_fencing.fencing(1000, 20),
        "growth": lambda: chain.from_iterable(map(scale.rows, scale.growth((10, 100, 1000), 20, 10))),
        "crowd": lambda: scale.crowded(100),
        "agent": lambda: agent.starts(30),
        "channel": lambda: guest_channel.channels(1000, 5),
    }
)


def main() -> int:
    """Print figures as they come: what, median, p99, unit, number of values."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks")
    parser.add_argument("part", nargs="*", help=f"what to measure: {', '.join(PARTS)}; all by default")
    wanted = parser.parse_args().part or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    print(machine_line())
    print(f"{'':46} {'median':>9} {'p99':>9}")
    for measured in chain.from_iterable(PARTS[part]() for part in wanted):
        print(measured.row(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
