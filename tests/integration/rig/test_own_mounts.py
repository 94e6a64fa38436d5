# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mounts that nobody else sees, also from a root that is no mount point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig import own_mounts

pytestmark = pytest.mark.skipif(bool(own_mounts.why_not()), reason=own_mounts.why_not())

MOUNT = "mount -t tmpfs none /mnt && touch /mnt/seen && ls /mnt"

CHROOT = """
for folder in usr etc var proc dev $2; do
    mkdir -p "$1/$folder"
    mount --rbind "/$folder" "$1/$folder"
done
for link in bin sbin lib lib64; do
    [ ! -e "/$link" ] || cp -a "/$link" "$1/$link"
done
mkdir -p "$1/mnt"
if chroot "$1" unshare --mount true; then echo "its root is a mount point" >&2; exit 1; fi
chroot "$1" {inside}
ls -A "$1/mnt"
"""


def run(*command: str) -> str:
    done = subprocess.run(
        own_mounts.command(*command), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


def test_a_mount_is_seen_by_its_command_only() -> None:
    assert run("sh", "-ec", MOUNT) == "seen\n"
    assert not Path("/mnt/seen").exists()


def test_in_a_chroot_whose_root_is_no_mount_point_it_is_so_too(tmp_path: Path) -> None:
    checkout = str(Path(own_mounts.__file__).parents[2])
    inside = f"{sys.executable} {own_mounts.__file__} sh -ec '{MOUNT}'"
    folder = checkout.strip("/").split("/")[0]
    assert run("sh", "-ec", CHROOT.format(inside=inside), "sh", str(tmp_path / "root"), folder) == "seen\n"
