# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make bench`: run every measurement, print it, and write it into docs/benchmarks.md. `make bench
ARGS=channel` runs one part."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from benchmarks import agent, core, guest_channel, host_fencing, rig, scale
from benchmarks.curves import draw
from benchmarks.figures import Figure, machine_line
from benchmarks.page import DOCS, PAGE, header, with_figures


def growth() -> Iterator[Figure]:
    """The figures of each size; draws the curves when all are known."""
    sizes: list[scale.Size] = []
    for size in scale.growth((10, 100, 1000), 20, 10):
        sizes.append(size)
        yield from scale.rows(size)
    (DOCS / "growth.svg").write_text(draw(scale.curves(sizes)))


PARTS: Final[Mapping[str, Callable[[], Iterable[Figure]]]] = MappingProxyType(
    {
        "core": lambda: (core.round_trips(5000), core.throughput(5)),
        "rig": lambda: (rig.ends(10), rig.boots(3)),
        "fencing": lambda: host_fencing.fencing(1000, 20),
        "growth": growth,
        "crowd": lambda: scale.crowded(100),
        "agent": lambda: agent.starts(30),
        "channel": lambda: guest_channel.channels(1000, 5),
    }
)


def main() -> int:
    """Print figures as they come: what, median, p99, unit, number of values; then write each part's."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks")
    parser.add_argument("part", nargs="*", help=f"what to measure: {', '.join(PARTS)}; all by default")
    wanted = parser.parse_args().part or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for part in wanted:
        machine, figures = machine_line(), list[Figure]()
        print(f"{part}: {machine}\n{header()}")
        for measured in PARTS[part]():
            print(measured.row(), flush=True)
            figures.append(measured)
        PAGE.write_text(with_figures(PAGE.read_text(), part, machine, figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
