# SPDX-License-Identifier: LGPL-2.1-or-later
"""All fuzz targets, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.fuzz import channel_targets, host_targets, hostile_peer
from tests.fuzz.planted import fuzz_planted
from tests.fuzz.target import Target

TARGETS: Final[Mapping[str, Target]] = {
    target.name: target for target in (*channel_targets.TARGETS, *hostile_peer.TARGETS, *host_targets.TARGETS)
}

PLANTED: Final = Target("planted", fuzz_planted, (b"",))
"""Not among the others: it must fail."""
