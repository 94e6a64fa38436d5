# SPDX-License-Identifier: LGPL-2.1-or-later
"""Making untrusted text fit for a log line or a terminal: nothing unprintable, nothing endless."""

from __future__ import annotations


def printable(text: str, limit: int = 200) -> str:
    """The text with each unprintable character as an escape, cut to `limit` characters.

    Line breaks, terminal controls, direction overrides and lone surrogates are escaped, the backslash too:
    what comes out names one text only.
    """
    out = "".join(map(_escape, text[: limit + 1]))
    return out if len(out) <= limit else out[: max(0, limit - 3)] + "..."


def _escape(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
