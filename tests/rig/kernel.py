# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guests' kernel: Debian's cloud kernel, downloaded and unpacked into the cache, never installed here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

META_PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_console")
"""Loaded at boot, with what they need. All others wait in the image for `modprobe`."""
SHIPPED = (*MODULES, "virtio_blk")

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_DEADLINE_S = 300


class RigError(Exception):
    """The rig cannot do its work; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel."""

    boot: Path  # what QEMU loads
    version: str  # as `uname -r` says
    modules: Path  # the folder with `modules.dep`

    def load_order(self, names: tuple[str, ...]) -> list[str]:
        """Modules as paths below `modules`, each after what it needs.

        Raises:
            RigError: the kernel has no such module.
        """
        needs = _read_dependencies(self.modules / "modules.dep")
        order: list[str] = []
        for name in names:
            path = next((p for p in needs if Path(p).name == f"{name}.ko"), None)
            if path is None:
                raise RigError(f"kernel {self.version} has no module {name}")
            # depmod lists the needs of a module so that the last one is loaded first
            order += [p for p in (*reversed(needs[path]), path) if p not in order]
        return order


def _read_dependencies(path: Path) -> dict[str, list[str]]:
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return {module: needs.split() for module, _, needs in lines}


def kernel(cache: Path) -> Kernel:
    """The kernel in the cache; the first call downloads it (27 MB). The caller holds the cache's lock.

    Raises:
        RigError: it cannot be had.
    """
    home = cache / "kernel"
    if not home.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            unpacked = Path(scratch) / "unpacked"
            _unpack(_download(Path(scratch)), unpacked)
            unpacked.rename(home)
    version = next((home / "lib/modules").iterdir()).name
    elf = home / "boot" / "vmlinux"
    boot = elf if elf.exists() else home / "boot" / f"vmlinuz-{version}"
    return Kernel(boot, version, home / "lib/modules" / version)


def _download(folder: Path) -> Path:
    try:
        return _try_download(folder)
    except RigError:
        if os.geteuid() != 0:
            raise
    call("apt-get", "update", "-q")  # stale package lists name a file that is gone
    return _try_download(folder)


def _try_download(folder: Path) -> Path:
    meta = call("apt-cache", "show", "--no-all-versions", META_PACKAGE)
    package = re.search(r"^Depends:.*?\b(linux-image-[^ ,(]+)", meta, re.MULTILINE)
    if package is None:
        raise RigError(f"{META_PACKAGE} names no kernel package; try apt-get update")
    call("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package[1], cwd=folder)
    return next(folder.glob("linux-image-*.deb"))


def _unpack(package: Path, target: Path) -> None:
    call("dpkg-deb", "-x", str(package), str(target))
    version = next((target / "lib/modules").iterdir()).name
    call("depmod", "-b", str(target), version)
    _extract_elf(target / "boot" / f"vmlinuz-{version}", target / "boot" / "vmlinux")


def _extract_elf(compressed: Path, elf: Path) -> None:
    """Take the ELF kernel out of a bzImage; QEMU starts it through PVH.

    Without it each boot runs the kernel's decompressor under TCG: 0.5 s, and 40-105 s when a guest is reset
    after a panic. Another compression than LZ4 leaves the bzImage in use.
    """
    start = compressed.read_bytes().find(_LZ4_LEGACY)
    if start < 0 or shutil.which("lz4") is None:
        return
    with compressed.open("rb") as source, elf.open("wb") as target:
        source.seek(start)
        # lz4 complains about what follows the payload; the check below is what counts
        subprocess.run(
            ["lz4", "-dc"],
            input=source.read(),
            stdout=target,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
    with elf.open("rb") as result:
        is_elf = result.read(4) == b"\x7fELF"
    if not is_elf:
        elf.unlink()


def call(*command: str, cwd: Path | None = None) -> str:
    """Run a program of this machine and give its standard output.

    Raises:
        RigError: it is missing or fails; the message carries its last line.
    """
    env = os.environ | {"LC_ALL": "C.UTF-8", "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=_DEADLINE_S, check=True
        )
    except FileNotFoundError as error:
        raise RigError(f"{command[0]} is not installed; `make deps` installs it") from error
    except subprocess.TimeoutExpired as error:
        raise RigError(f"{' '.join(command)}: no end in {_DEADLINE_S} s") from error
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr).strip().splitlines() or ["no message"]
        raise RigError(f"{' '.join(command[:4])}: {lines[-1]}") from error
    return done.stdout
