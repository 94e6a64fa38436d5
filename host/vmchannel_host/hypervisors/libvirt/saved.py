# SPDX-License-Identifier: LGPL-2.1-or-later
"""Managed saves on the disk: whose memory libvirt keeps, when libvirt itself does not answer (S0).

An image begins with a header and the domain's XML (virQEMUSaveHeader in qemu_saveimage.h), so whose it is
stands in it, whatever the file is called.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.libvirt.words import MAX_XML, read_uuid
from vmchannel_host.model import VmUuid

_HEADER: Final = struct.Struct("16s19I")
_MAGICS: Final = (b"LibvirtQemudSave", b"LibvirtQemudPart")  # whole, and being written

MAX_IMAGES: Final = 4096


@dataclass(frozen=True, slots=True)
class SavedMemory:
    """The managed saves that a directory holds."""

    vm_uuids: frozenset[VmUuid]
    problem: str = ""  # why there may be others; "" when these are all


def read_saved_memory(directory: Path) -> SavedMemory:
    """Look at the images of a directory. Blocks; never raises.

    A directory that is not there is a problem: it may be another one that libvirt uses.
    """
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".save"))
    except OSError as error:
        return SavedMemory(frozenset(), f"{directory}: {error.strerror}")
    found: set[VmUuid] = set()
    problem = f"{directory} holds more than {MAX_IMAGES} images" if len(names) > MAX_IMAGES else ""
    for name in names[:MAX_IMAGES]:
        try:
            found.add(_whose(directory / name))
        except FileNotFoundError:
            continue
        except (OSError, HypervisorError, ValueError) as error:
            problem = f"{name!r} in {directory} cannot be read: {error}"[:300]
    return SavedMemory(frozenset(found), problem)


def _whose(path: Path) -> VmUuid:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise ValueError("it is too short")
        magic, _version, length, *_ = _HEADER.unpack(header)
        if magic not in _MAGICS or length > MAX_XML:
            raise ValueError("it is no image of libvirt's")
        text = file.read(length).rstrip(b"\0").split(b"\0", 1)[0]
    vm = read_uuid(text.decode("utf-8", "replace"))
    if vm is None:
        raise ValueError("it names no UUID")
    return vm
