# SPDX-License-Identifier: LGPL-2.1-or-later
"""A measured figure, and the machine that it was measured on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of a table of measurements."""

    name: str
    unit: str
    median: float
    p99: float
    count: int

    def row(self) -> str:
        """The row as text, 80 columns."""
        return f"{self.name:46} {self.median:9.3f} {self.p99:9.3f} {self.unit:6} n={self.count}"


def figure(name: str, unit: str, values: Sequence[float]) -> Figure:
    """Sum up measured values (at least one)."""
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return Figure(name, unit, statistics.median(ordered), p99, len(ordered))


def ratio(name: str, figure: Figure, base: Figure) -> Figure:
    """One figure against another of the same run, median by median and p99 by p99."""
    return Figure(name, "x", figure.median / base.median, figure.p99 / base.p99, figure.count)


def machine_line() -> str:
    """Processor, cores, kernel and Python: without it a figure means nothing."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown CPU")
    load = os.getloadavg()[0]
    python = platform.python_version()
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {python}, load {load:.2f}"
