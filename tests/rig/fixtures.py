# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pytest fixtures of the rig; a folder's `conftest.py` imports those it wants.

Function-scoped guests: `guest = await boot("vm1", ports=(...), guestd=True)`. For speed a module may share
VMs: a module-scoped fixture calls `boot_shared("vm1")`, which gives a `Vm`, and each test does
`guest = await attach(vm)`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.rig.accel import accelerator
from tests.rig.debian_image import build_debian_image
from tests.rig.guest import Guest
from tests.rig.image import Image, build_image, default_cache, require_tools
from tests.rig.qemu import VmSpec
from tests.rig.vm import Vm, stop_all

Attach = Callable[[Vm], Awaitable[Guest]]


class Boot(Protocol):
    """Start a guest and wait until it answers; the options are those of `VmSpec`."""

    async def __call__(self, name: str, *, wait: bool = True, **options: Any) -> Guest: ...


class BootShared(Protocol):
    """Start a guest and do not wait; the options are those of `VmSpec`."""

    def __call__(self, name: str, **options: Any) -> Vm: ...


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    """The guest image of this checkout, built once per run."""
    require_tools()
    with tempfile.TemporaryDirectory(prefix="vmc-image-") as folder:
        yield build_image(default_cache(), Path(folder))


@pytest.fixture(scope="session")
def debian() -> Iterator[Image]:
    """The Debian image of this checkout, with the host daemon in it too."""
    require_tools()
    with tempfile.TemporaryDirectory(prefix="vmc-image-") as folder:
        yield build_debian_image(default_cache(), Path(folder), host=True)


@pytest.fixture(scope="session")
def accel(image: Image) -> str:
    """TCG unless `$VMCHANNEL_ACCEL` says `kvm` or `auto`: tests mean the same on every machine."""
    return accelerator(default_cache(), image, wanted=os.environ.get("VMCHANNEL_ACCEL", "tcg"))


@pytest.fixture
def rig_dir() -> Iterator[Path]:
    """A short, empty folder (unix socket paths end at 107 bytes); every QEMU that names it is ended."""
    with make_rig_dir() as folder:
        yield folder


@pytest.fixture(scope="module")
def shared_rig_dir() -> Iterator[Path]:
    """`rig_dir` for a whole module."""
    with make_rig_dir() as folder:
        yield folder


@contextmanager
def make_rig_dir() -> Generator[Path, None, None]:
    """What `rig_dir` gives, for a fixture of another scope."""
    folder = Path(tempfile.mkdtemp(prefix="vmc-", dir="/tmp"))
    try:
        yield folder
    finally:
        stop_all(folder)
        shutil.rmtree(folder)


@pytest.fixture
async def attach() -> AsyncIterator[Attach]:
    """Give a ready `Guest` for a running `Vm`; it is disconnected after the test."""
    guests: list[Guest] = []

    async def attach_guest(vm: Vm) -> Guest:
        guests.append(guest := Guest(vm))
        await guest.wait_ready()
        return guest

    yield attach_guest
    for guest in guests:
        await guest.disconnect()
        print(f"--- console of {guest.spec.name}\n{guest.console()[-2000:]}")  # shown when the test failed


@pytest.fixture
async def boot(image: Image, accel: str, rig_dir: Path, attach: Attach) -> AsyncIterator[Boot]:
    """Boot guests for one test."""
    vms: list[Vm] = []

    async def boot_guest(name: str, *, wait: bool = True, **options: Any) -> Guest:
        vms.append(vm := _start(name, rig_dir, {"image": image, "accel": accel} | options))
        return await attach(vm) if wait else Guest(vm)

    yield boot_guest
    for vm in vms:
        vm.stop()


@pytest.fixture(scope="module")
def boot_shared(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[BootShared]:
    """Boot guests for a module."""
    vms: list[Vm] = []

    def boot_guest(name: str, **options: Any) -> Vm:
        vms.append(vm := _start(name, shared_rig_dir, {"image": image, "accel": accel} | options))
        return vm

    yield boot_guest
    for vm in vms:
        vm.stop()


def _start(name: str, folder: Path, options: dict[str, Any]) -> Vm:
    number = len(list(folder.iterdir()))  # names are data: never part of a path
    vm = Vm(VmSpec(name, folder / f"vm{number}", **options))
    vm.start()
    return vm


__all__ = [
    "Attach",
    "Boot",
    "BootShared",
    "accel",
    "attach",
    "boot",
    "boot_shared",
    "debian",
    "image",
    "make_rig_dir",
    "rig_dir",
    "shared_rig_dir",
]
