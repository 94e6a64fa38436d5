# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text from elsewhere, made fit for one line of a terminal or a log."""

from __future__ import annotations


def one_line(text: str, limit: int = 1000) -> str:
    """`text` with every unprintable character (line breaks, terminal controls) escaped, cut to `limit`."""
    out = "".join(one if one.isprintable() else _escape(one) for one in text[: limit + 1])
    return out if len(out) <= limit else out[: max(0, limit - 3)] + "..."


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
