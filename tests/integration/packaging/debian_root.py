# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Debian root to install packages in, at no cost: this machine's own, under a layer that is thrown away."""

from __future__ import annotations

import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MOUNT: Final = """\
set -e
mount -t tmpfs -o mode=0755 tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t proc proc "$1/root/proc"
mount --bind /dev "$1/root/dev"
mount -t tmpfs tmpfs "$1/root/run"
mkdir -p "$1/root$2"
mount --bind "$2" "$1/root$2"
echo mounted
exec cat
"""


class NoRoot(Exception):
    """This machine cannot mount one; the text says why."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a command came to."""

    status: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class DebianRoot:
    """Where commands run as root, seeing Debian's own programs and what was installed."""

    folder: Path
    keeper: int  # pid of the process that holds the mounts

    def run(self, *command: str) -> Run:
        """Run a command to its end."""
        enter = ("nsenter", "--mount", f"--target={self.keeper}", "chroot", str(self.folder))
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        done = subprocess.run(
            [*enter, *command], capture_output=True, text=True, timeout=240, check=False, env=environment
        )
        return Run(done.returncode, done.stdout, done.stderr)

    def copy(self, file: Path) -> str:
        """Bring a file in; its path there."""
        self.write(f"/root/{file.name}", file.read_bytes())
        return f"/root/{file.name}"

    def write(self, path: str, content: bytes) -> None:
        """Make a file there."""
        enter = ("nsenter", "--mount", f"--target={self.keeper}", "chroot", str(self.folder))
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1"'
        subprocess.run([*enter, "sh", "-c", script, "sh", path], input=content, check=True, timeout=60)

    def has(self, path: str) -> bool:
        """Whether something is there."""
        return self.run("test", "-e", path).status == 0


@contextmanager
def debian_root(folder: Path, shared: Path) -> Generator[DebianRoot]:
    """A root below `folder`, in which the directory `shared` is seen too. Nothing of it outlives the context.

    Raises:
        NoRoot: it cannot be mounted here.
    """
    command = [
        "unshare",
        "--mount",
        "--propagation=private",
        "sh",
        "-c",
        _MOUNT,
        "sh",
        str(folder),
        str(shared),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        try:
            if keeper.stdout.readline() != "mounted\n":
                raise NoRoot(keeper.stderr.read().strip())
            yield DebianRoot(folder / "root", keeper.pid)
        finally:
            keeper.stdin.close()  # ends it, and with it the mounts
