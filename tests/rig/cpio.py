# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write cpio archives (newc) for an initramfs: no root needed, the same input gives the same bytes.

Format: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

_ALIGN = 512  # the kernel skips zeros between archives; 512 is what cpio(1) writes


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory or symbolic link."""

    mode: int  # type and permission bits
    data: bytes = b""  # contents, or the target of a link


def regular(data: bytes, *, executable: bool = False) -> Entry:
    """A file with that content."""
    return Entry(stat.S_IFREG | (0o755 if executable else 0o644), data)


def link(target: str) -> Entry:
    """A symbolic link."""
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def directory(mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(stat.S_IFDIR | mode)


@dataclass(slots=True)
class Tree:
    """What an archive shall hold: absolute path in the guest -> entry. Parents come by themselves."""

    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])

    def add(self, path: str, entry: Entry) -> None:
        self.entries[str(PurePosixPath(path)).lstrip("/")] = entry

    def copy(self, source: Path, path: str) -> None:
        """Put a file of this machine into the tree, with its x bit; a link is followed."""
        self.add(path, regular(source.read_bytes(), executable=os.access(source, os.X_OK)))

    def write(self, out: BinaryIO) -> None:
        """Write the archive, padded so that another may follow."""
        size = 0
        for number, (name, entry) in enumerate(_with_parents(self.entries), start=1):
            size += out.write(_record(name, entry, number))
        size += out.write(_record("TRAILER!!!", Entry(0), 0))
        out.write(b"\0" * (-size % _ALIGN))


def _with_parents(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    parents = {str(parent) for name in entries for parent in PurePosixPath(name).parents} - {"."}
    merged = {parent: directory() for parent in parents} | dict(entries)
    yield from sorted(merged.items())


def _record(name: str, entry: Entry, inode: int) -> bytes:
    raw = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + raw
    return _padded(head) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
