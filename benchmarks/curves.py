# SPDX-License-Identifier: LGPL-2.1-or-later
"""Growth curves as SVG: what a daemon costs with more and more VMs. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_WIDTH: Final = 300
_HEIGHT: Final = 220
_LEFT: Final = 50
_BELOW: Final = 40
_ABOVE: Final = 34
_RIGHT: Final = 14


@dataclass(frozen=True, slots=True)
class Curve:
    """One panel."""

    title: str
    points: tuple[tuple[float, float], ...]  # number of VMs, value
    goal: float  # drawn as a dashed line


def draw(curves: Sequence[Curve]) -> str:
    """The panels side by side; the number of VMs on a logarithmic axis."""
    panels = "\n".join(_panel(curve, number * _WIDTH) for number, curve in enumerate(curves))
    size = f'width="{_WIDTH * len(curves)}" height="{_HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11" fill="#333"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{panels}\n</svg>\n'
    )


def _panel(curve: Curve, left: int) -> str:
    most = max([curve.goal, *(value for _, value in curve.points)]) * 1.1
    lowest, highest = (math.log10(curve.points[at][0]) for at in (0, -1))

    def place(vms: float, value: float) -> tuple[float, float]:
        share = (math.log10(vms) - lowest) / ((highest - lowest) or 1)
        across = _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BELOW - value / most * (_HEIGHT - _BELOW - _ABOVE)

    floor, goal = _HEIGHT - _BELOW, place(curve.points[0][0], curve.goal)[1]
    edge = _WIDTH - _RIGHT
    parts = [
        f'<g transform="translate({left} 0)">',
        f'<text x="{_LEFT}" y="18" font-weight="bold">{curve.title}</text>',
        f'<path d="M{_LEFT} {_ABOVE}V{floor}H{edge}" fill="none" stroke="#888"/>',
        f'<path d="M{_LEFT} {goal:.1f}H{edge}" stroke="#c33" stroke-dasharray="4 3"/>',
        f'<text x="{edge}" y="{goal - 4:.1f}" text-anchor="end" fill="#c33">goal {curve.goal:g}</text>',
    ]
    places = [place(*point) for point in curve.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="2"/>')
    for (vms, value), (x, y) in zip(curve.points, places, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#06c"/>')
        parts.append(f'<text x="{x:.1f}" y="{y - 7:.1f}" text-anchor="middle">{value:.3g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{vms:,.0f}</text>')
    parts.append(f'<text x="{(_LEFT + edge) / 2}" y="{floor + 31}" text-anchor="middle">VMs</text></g>')
    return "\n".join(parts)
