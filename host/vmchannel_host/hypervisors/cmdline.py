# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a QEMU command line says of the VM: UUIDs, name, and options that limit what may be concluded (pure).

QEMU accepts `-uuid` and `--uuid` with the value in the next argument, never `-uuid=VALUE` (tried with 7.2);
of several the last one holds. An argument that only looks like an option (`-append -uuid`) cannot be told
apart without QEMU's own option table, so every candidate is reported and two different ones are no identity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmchannel_host.hypervisors.chardev_words import Connecting, parse_connecting
from vmchannel_host.model import NIL_UUID, VmUuid

_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")

_PASSTHROUGH = ("vfio", "vhost-user", "vhost-vdpa")
"""Devices whose state `system_reset` does not prove reset (S8)."""

_SOCKET = re.compile(r"(?:^|[,:])(?:unix:|path=)((?:[^,]|,,)+)")
"""`-qmp unix:PATH,server=on` and `-chardev socket,path=PATH`; a comma in a path is doubled."""

_LIBVIRT = re.compile(
    r"(?:\{\"qom-type\":\"secret\"|secret,).*\bmasterKey0\b.*?[\"=](/[^\"]*)/domain-(\d{1,9})-[^/]*/master-key\.aes(?:\"\})?"
)
"""Since 1.3 every QEMU of libvirt's gets a key in a directory with the number of its execution."""

_NETWORK_STORAGE = re.compile(
    r"(?:^|[=,:\"'])(?:rbd|nbd|nbd\+unix|nbd\+tcp|iscsi|iser|https?|ftps?|gluster(?:\+\w+)?|ssh|sftp|nfs|sheepdog"
    r"|nvme|vitastor|blkio)(?::|\")"
    r"|(?:driver|\"driver\")\s*[=:]\s*\"?(?:rbd|nbd|iscsi|https?|ftps?|gluster|ssh|nfs|nvme|virtio-blk-\w|io_uring)"
    r"|vhost-user-(?:blk|scsi|fs)|vhost-scsi|vhost-vdpa|scsi-generic|scsi-block"
)
"""Storage whose writes leave the process by other ways than a local file with image locks."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The facts of one QEMU command line."""

    uuids: tuple[VmUuid, ...]  # different `-uuid` values, in order; one is an identity, none or two are not
    name: str  # guest name, "" without; untrusted text
    no_reboot: bool = False  # a reset ends the process instead
    no_guest: bool = False  # `-machine none`: no CPU, so no VM (libvirt probes capabilities like this)
    passthrough: bool = False  # names a vfio, vhost-user or vdpa device
    network_storage: bool = False  # names storage that is reached over a network or another process
    sockets: tuple[str, ...] = ()  # paths of unix sockets, of monitors and others; relative ones as written
    incoming: bool = False  # begins by receiving memory: a migration's destination, or restored from a file
    domain_id: int | None = None  # libvirt's number of this execution; None: libvirt did not start it
    libvirt_home: str = ""  # the directory of the libvirt that did
    connecting: tuple[Connecting, ...] = ()  # its chardevs that connect to a unix socket

    @property
    def vm_uuid(self) -> VmUuid | None:
        """The VM's UUID, or None when there is none, a nil one, or more than one."""
        if len(self.uuids) == 1 and self.uuids[0] != NIL_UUID:
            return self.uuids[0]
        return None


def parse_command_line(raw: bytes) -> CommandLine:
    """Read the NUL-separated text of /proc/PID/cmdline."""
    arguments = raw.decode("utf-8", "surrogateescape").rstrip("\0").split("\0")
    pairs = [(_option(first), second) for first, second in zip(arguments, [*arguments[1:], ""], strict=True)]
    uuids = [VmUuid(value.lower()) for option, value in pairs if option == "uuid" and _UUID.fullmatch(value)]
    names = [value for option, value in pairs if option == "name"]
    machines = [value for option, value in pairs if option in ("machine", "M")]
    options = {option for option, _ in pairs}
    actions = [value for option, value in pairs if option == "action"]
    text = "\0".join(arguments[1:])
    domains = {(int(found[2]), found[1]) for found in map(_LIBVIRT.fullmatch, arguments[1:]) if found}
    domain_id, home = domains.pop() if len(domains) == 1 else (None, "")
    return CommandLine(
        uuids=tuple(dict.fromkeys(uuids)),
        name=_printable(next((n for n in map(_guest_name, reversed(names)) if n), "")),
        no_reboot="no-reboot" in options or any("reboot=shutdown" in value for value in actions),
        no_guest=any(re.match(r"(type=)?none(,|$)", value) for value in machines),
        passthrough=any(word in text for word in _PASSTHROUGH),
        network_storage=any(_NETWORK_STORAGE.search(argument) for argument in arguments[1:]),
        sockets=tuple(
            path.replace(",,", ",") for argument in arguments[1:] for path in _SOCKET.findall(argument)
        ),
        incoming="incoming" in options,
        domain_id=domain_id,
        libvirt_home=home,
        connecting=parse_connecting(value for option, value in pairs if option == "chardev"),
    )


def _option(argument: str) -> str:
    """The option's name, or "": QEMU takes one dash or two."""
    if not argument.startswith("-"):
        return ""
    return argument[2:] if argument.startswith("--") else argument[1:]


def _guest_name(value: str) -> str:
    """The guest's name in `-name VALUE`: `vm1`, `guest=vm1,process=x`; a comma in it is doubled."""
    for position, part in enumerate(_hide(value).split(",")):
        key, equals, rest = part.partition("=")
        if equals and key == "guest":
            return _show(rest)
        if not equals and position == 0:
            return _show(part)
    return ""


def _hide(value: str) -> str:
    return value.replace(",,", "\x01")


def _show(value: str) -> str:
    return value.replace("\x01", ",")


def _printable(name: str) -> str:
    """A name that can be encoded again; bytes that are no UTF-8 are shown as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
