# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Debian guest with this checkout installed as packages would install it; boots systemd or a plain shell.

The root disk (`debian_root`) is shared and read-only; the initramfs made here lays a tmpfs over it and copies
the product into that. So a guest that is reset is as it was first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.rig.cpio import Entry, Tree, directory, link, regular
from tests.rig.debian_root import root_disk
from tests.rig.image import BUSYBOX, CHECKOUT, DIST_PACKAGES, PACKAGES, Image, byte_code, locked
from tests.rig.kernel import Kernel, call, kernel
from vmchannel_agents.launcher import AGENT, AGENT_FOLDER, launcher_text

_MODULES = ("virtio_pci", "virtio_blk", "overlay")  # for the disk; udev loads the others
_FILES = Path(__file__).parent / "guest_files"
_COMMANDS = {
    "/usr/bin/vmchannel-guestd": "vmchannel_guest.main",
    "/usr/bin/vmchannel": "vmchannel_guest.cli",
}
_HOST_COMMANDS = {
    "/usr/bin/vmchanneld": "vmchannel_host.main",
    "/usr/bin/vmchannelctl": "vmchannel_host.cli.main",
}
_GUEST_UNITS = ("vmchannel-guestd.service", "pacemaker.service.d/50-vmchannel.conf")
_PRODUCT = "/product"


def build_debian_image(
    cache: Path, folder: Path, files: Mapping[str, Entry] = MappingProxyType({}), *, host: bool = False
) -> Image:
    """Build the image from this checkout into `folder`; the disk comes from the cache, else takes a minute.

    Args:
        cache: keeps kernel, disk and byte code.
        folder: where the initramfs goes.
        files: more files of the guest's, by absolute path.
        host: install the host daemon too.

    Raises:
        RigError: something is missing; the message names it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    tree = Tree()
    with locked(cache):
        linux = kernel(cache)
        disk = root_disk(cache, linux)
        _add_start(tree, linux)
        _add_product(tree, cache, host=host)
    for path, entry in files.items():
        tree.add(_PRODUCT + path, entry)
    initrd = folder / "debian-initrd"
    with initrd.open("wb") as out:
        tree.write(out)
    return Image(linux.boot, initrd, disk)


def _add_start(tree: Tree, linux: Kernel) -> None:
    for name in ("proc", "sys", "dev", "disk", "new", "root"):
        tree.add(f"/{name}", directory())
    tree.copy(BUSYBOX, "/usr/bin/busybox")
    for applet in call(str(BUSYBOX), "--list").split():
        if applet != "busybox":
            tree.add(f"/usr/bin/{applet}", link("busybox"))
    tree.add("/init", regular((_FILES / "debian_init").read_bytes(), executable=True))
    order = linux.load_order(_MODULES)
    for module in order:
        tree.copy(linux.modules / module, f"/modules/{module}")
    tree.add("/rig/modules", regular("".join(f"/modules/{module}\n" for module in order).encode()))
    tree.add(f"{_PRODUCT}/rig/start", regular((_FILES / "plain_start").read_bytes(), executable=True))
    tree.copy(_FILES / "agent.py", f"{_PRODUCT}/rig/agent.py")
    units = f"{_PRODUCT}/etc/systemd/system"
    tree.copy(_FILES / "rig-agent.service", f"{units}/rig-agent.service")
    tree.add(f"{units}/sysinit.target.wants/rig-agent.service", link("../rig-agent.service"))


def _add_product(tree: Tree, cache: Path, *, host: bool) -> None:
    """Packages, commands, units, udev rule and the agent, each where a package would put it."""
    packages = {**PACKAGES, **({"vmchannel_host": CHECKOUT / "host/vmchannel_host"} if host else {})}
    for name, folder in packages.items():
        _add_package(tree, cache, name, folder)
    for command, module in {**_COMMANDS, **(_HOST_COMMANDS if host else {})}.items():
        text = f"#!/usr/bin/python3\nimport sys\n\nfrom {module} import main\n\nsys.exit(main())\n"
        tree.add(_PRODUCT + command, regular(text.encode(), executable=True))
    agent = regular(launcher_text([str(DIST_PACKAGES)]).encode(), executable=True)
    tree.add(f"{_PRODUCT}{AGENT_FOLDER}/{AGENT}", agent)
    units = "/usr/lib/systemd/system"
    shipped = {
        **{f"guest/systemd/{name}": f"{units}/{name}" for name in _GUEST_UNITS},
        "guest/udev/60-vmchannel-guest.rules": "/usr/lib/udev/rules.d/60-vmchannel-guest.rules",
    }
    if host:
        _add_qmp(tree, cache)
        shipped["host/systemd/vmchanneld.service"] = f"{units}/vmchanneld.service"
        shipped["host/systemd/vmchannel-host.sysusers.conf"] = "/usr/lib/sysusers.d/vmchannel-host.conf"
        shipped["host/config/host.yaml"] = "/etc/vmchannel/host.yaml"
    for source, target in shipped.items():
        tree.add(_PRODUCT + target, regular((CHECKOUT / source).read_bytes()))


def _add_package(tree: Tree, cache: Path, name: str, folder: Path) -> None:
    for source in (*folder.rglob("*.py"), *folder.rglob("*.xml")):
        path = DIST_PACKAGES / name / source.relative_to(folder)
        tree.copy(source, f"{_PRODUCT}{path}")
        if source.suffix == ".py" and (compiled := byte_code(cache, source, path)):
            target = path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
            tree.copy(compiled, f"{_PRODUCT}{target}")


def _add_qmp(tree: Tree, cache: Path) -> None:
    """qemu.qmp is no Debian package; it is pure Python, taken from where the tests import it."""
    import qemu.qmp

    _add_package(tree, cache, "qemu/qmp", Path(qemu.qmp.__file__ or "").parent)
