# SPDX-License-Identifier: LGPL-2.1-or-later
"""Paths held against the patterns of the configuration (pure)."""

from __future__ import annotations

import fnmatch


def matches_glob(path: str, pattern: str) -> bool:
    """As `glob` would match an existing file: a wildcard stands for no slash."""
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
