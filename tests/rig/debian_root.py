# SPDX-License-Identifier: LGPL-2.1-or-later
"""A root disk with Debian 12: systemd, udev and D-Bus, corosync, Pacemaker and pcs. Nothing of this checkout.

mmdebstrap builds it in about a minute, from the package sources of this machine. It is cached under a key of
what goes into it. All guests share it read-only; each writes into a tmpfs (`guest_files/debian_init`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from tests.rig.kernel import Kernel, RigError, call

SUITE = "bookworm"
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "overlay", "softdog")
_INSTALLED = (
    *("systemd", "systemd-sysv", "dbus", "udev", "kmod", "iproute2", "procps", "psmisc"),
    *("corosync", "pacemaker", "pacemaker-cli-utils", "libxml2-utils"),
    *("python3", "python3-pexpect", "python3-pycurl"),  # fencing.py wants the last two
    *("python3-aiohttp", "python3-cryptography", "python3-jsonschema"),  # these and the next: the host daemon
    *("python3-prometheus-client", "python3-yaml"),
    *(
        "python3-dacite",
        "python3-dateutil",
        "python3-lxml",
        "python3-openssl",
        "python3-pkg-resources",
    ),  # pcs
    *("python3-pyparsing", "python3-tornado"),
)
_UNPACKED = {
    "pcs": ("usr/sbin/pcs", "usr/lib", "usr/share/pcs", "var/lib/pcsd"),
    "fence-agents": ("usr/share/fence", "usr/share/cluster/relaxng"),
}
"""Only these parts: the dependencies of pcs bring Ruby, those of fence-agents the SDKs of clouds."""
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_RECIPE = 1  # raise it when the code below changes what the disk holds
_ROOM = 1.15  # of the disk over its content: inodes, and blocks that are not full


def root_disk(cache: Path, linux: Kernel) -> Path:
    """The disk in the cache; the first call builds it. Blocks. The caller holds the cache's lock.

    Raises:
        RigError: it cannot be built: not root, no mmdebstrap, or packages cannot be had.
    """
    key = hashlib.sha256(f"{_RECIPE} {linux.version} {MODULES} {_packages()}".encode()).hexdigest()[:16]
    disk = cache / f"debian-{key}.ext4"
    if not disk.exists():
        if os.geteuid() != 0:
            raise RigError("the Debian guest image can be built by root only")
        for stale in cache.glob("debian-*.ext4"):
            stale.unlink()
        with tempfile.TemporaryDirectory(dir=cache, prefix="debian-") as scratch:
            root = Path(scratch) / "root"
            _bootstrap(Path(scratch), root)
            _unpack(Path(scratch), root)
            _add_modules(root, linux)
            _prepare(root)
            _make_disk(root, Path(scratch) / "disk").rename(disk)
    return disk


def _packages() -> str:
    """The named packages with their versions, as this machine's apt would install them now."""
    question = ("apt-cache", "show", "--no-all-versions", *_INSTALLED, *_UNPACKED)
    try:
        shown = call(*question)
    except RigError:
        call("apt-get", "update", "-q")  # a machine that never had a package list
        shown = call(*question)
    return " ".join(re.findall(r"^SHA256: (\S+)$", shown, re.MULTILINE))


def _bootstrap(scratch: Path, root: Path) -> None:
    """Debian's packages, from this machine's own sources of them."""
    entry = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    found = call("apt-get", "indextargets", "--format", entry, "Created-By: Packages", "Origin: Debian")
    sources = scratch / "sources.list"
    sources.write_text("".join(f"{line}\n" for line in found.splitlines() if f" {SUITE}" in line))
    if not sources.read_text():
        raise RigError(f"this machine's apt has no source of Debian's {SUITE}; try apt-get update")
    call(
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        f"--include={','.join(_INSTALLED)}",
        '--aptopt=APT::Install-Recommends "false"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
        SUITE,
        str(root),
        str(sources),
    )


def _unpack(scratch: Path, root: Path) -> None:
    call("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *_UNPACKED, cwd=scratch)
    for package, parts in _UNPACKED.items():
        unpacked = scratch / package
        call("dpkg-deb", "-x", str(next(scratch.glob(f"{package}_*.deb"))), str(unpacked))
        for part in parts:
            if (unpacked / part).is_dir():
                shutil.copytree(unpacked / part, root / part, dirs_exist_ok=True, symlinks=True)
            else:
                shutil.copy(unpacked / part, root / part)


def _add_modules(root: Path, linux: Kernel) -> None:
    target = root / "lib/modules" / linux.version
    for module in linux.load_order(MODULES):
        (target / module).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(linux.modules / module, target / module)
    for listed in linux.modules.glob("modules.builtin*"):
        shutil.copy(listed, target)
    shutil.copy(linux.modules / "modules.order", target)
    call("depmod", "-b", str(root), linux.version)


def _prepare(root: Path) -> None:
    """Byte-compile what dpkg did not; start nothing at boot by itself but what systemd itself wants."""
    library = "/usr/lib/python3/dist-packages"
    compiled = ("/usr/share/fence", f"{library}/pcs")
    call("chroot", str(root), "/usr/bin/python3", "-m", "compileall", "-q", *compiled)
    for folder in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / folder, ignore_errors=True)
    (root / "etc/machine-id").write_text("")  # each guest makes its own
    units = root / "etc/systemd/system"
    for wanted in units.glob("*.wants"):  # a test enables what it wants
        shutil.rmtree(wanted)
    (units / "serial-getty@ttyS0.service").symlink_to("/dev/null")


def _make_disk(root: Path, disk: Path) -> Path:
    size = sum(max(4096, path.lstat().st_size) for path in root.rglob("*") if not path.is_dir())
    megabytes = int(size * _ROOM / (1 << 20)) + 32
    call("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(root), str(disk), f"{megabytes}M")
    return disk
