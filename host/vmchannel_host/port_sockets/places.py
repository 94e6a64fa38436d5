# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the daemon may make sockets for ports, and why it cannot make one (pure).

A path comes from a QEMU's command line or a domain's definition: whoever wrote that must not have a daemon of
root's make or remove a file anywhere else than the configuration says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vmchannel_host.globs import matches_glob

KEY: Final = "ports.listen_in"
"""The key of host.yaml that names the directories."""

MAX_PATH: Final = 107
"""Longest path of a unix socket, bytes (sockaddr_un, unix(7))."""


class SocketProblem(Exception):
    """No socket can be had at a path; nothing there was changed.

    Attributes:
        remedy: what to do about it.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Place:
    """An allowed path of a socket."""

    directory: str
    name: str

    @property
    def path(self) -> str:
        """The whole path, without `..` and double slashes."""
        return f"{self.directory.rstrip('/')}/{self.name}"


def find_place(path: str, directories: Iterable[str]) -> Place:
    """Where exactly a socket would be made.

    Args:
        path: absolute, as a QEMU or a definition says it.
        directories: patterns of directories in which it may be; a wildcard stands for no slash.

    Raises:
        SocketProblem: not there.
    """
    directory, _, name = os.path.normpath(path).rpartition("/")
    directory = directory or "/"
    if not path.startswith("/") or "\0" in path or path.endswith("/") or not name:
        raise SocketProblem("it is no absolute path of a file", "give the chardev one")
    if not any(matches_glob(directory, pattern.rstrip("/") or "/") for pattern in directories):
        reason = f"{KEY} of host.yaml does not allow sockets in {directory}"
        raise SocketProblem(reason, f"add the directory to {KEY}, or give the chardev a path that it allows")
    place = Place(directory, name)
    try:
        over = len(os.fsencode(place.path)) - MAX_PATH
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise SocketProblem("no file can have that name", "give the chardev another path") from None
    if over > 0:
        raise SocketProblem(
            f"a unix socket's path ends {over} bytes before", "give the chardev a shorter one"
        )
    return place
