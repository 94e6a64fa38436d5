# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the docs take from the code is what the code says now."""

from __future__ import annotations

import runpy
from enum import Enum
from pathlib import Path

from fence_vmchannel.core.channel_state import ChannelState
from fence_vmchannel.core.session_state import SessionState

DOCS = Path(__file__).parents[3] / "docs"


def test_diagrams_and_tables_in_the_docs_are_up_to_date() -> None:
    stale = runpy.run_path(str(DOCS / "make_diagrams.py"))["stale"]
    assert stale() == [], "run: PYTHONPATH=.:host python docs/make_diagrams.py"


def test_every_state_is_drawn_and_explained() -> None:
    text = (DOCS / "state-machines.md").read_text("utf-8")
    states: list[Enum] = [*SessionState, *ChannelState]
    for state in states:
        assert f"| `{state.name}` | |" not in text
        assert f"| `{state.name}` | " in text
