# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a piece of configuration text may be, and its value: sizes, durations, counts, names, paths.

Pure. Each kind either converts the text or raises `ValueError` that says what is expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from fence_vmchannel.addresses import check_service
from fence_vmchannel.errors import LocalProtocolError
from fence_vmchannel.messages import MAX_PLUG
from vmchannel_host.model import NIL_UUID, VmUuid

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_COUNT = re.compile(r"0|[1-9][0-9]{0,8}")
_AMOUNT = re.compile(r"((?:0|[1-9][0-9]{0,11})(?:\.[0-9]{1,6})?)([A-Za-z]*)")
_LIBVIRT = re.compile(r"qemu(\+unix)?:///(system|session)(\?[!-~]+)?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,253}[A-Za-z0-9])?")

SIZE_UNITS: Mapping[str, int] = MappingProxyType({"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3})
DURATION_UNITS: Mapping[str, float] = MappingProxyType(
    {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
)


def as_vm_uuid(text: str) -> VmUuid | None:
    """The UUID that a text is, in lower case; None when it is none. The nil UUID is one of them."""
    return VmUuid(text.lower()) if _UUID.fullmatch(text) else None


def parse_size(text: str) -> int:
    """Bytes of a text such as 65536, 256KiB or 1.5MiB.

    Raises:
        ValueError: it is no size, or no whole number of bytes.
    """
    amount, unit = _split(text, SIZE_UNITS, "a size such as 65536, 256KiB or 1MiB")
    size = amount * SIZE_UNITS[unit]
    if size != int(size):
        raise ValueError("a whole number of bytes")
    return int(size)


def parse_duration(text: str) -> float:
    """Seconds of a text such as 250ms, 1s, 5min, 2h or 400d. A bare number has no unit, and is refused.

    Raises:
        ValueError: it is no duration.
    """
    amount, unit = _split(text, DURATION_UNITS, "a duration such as 250ms, 1s, 5min, 2h or 400d")
    return amount * DURATION_UNITS[unit]


def parse_count(text: str) -> int:
    """A whole number without sign, separators or leading zeros.

    Raises:
        ValueError: it is none.
    """
    if not _COUNT.fullmatch(text):
        raise ValueError("a whole number such as 1024")
    return int(text)


def parse_vm(text: str) -> str:
    """A VM's name, or its UUID in lower case.

    Raises:
        ValueError: it can be neither.
    """
    uuid = as_vm_uuid(text)
    if uuid == NIL_UUID:
        raise ValueError("a VM's name or UUID; the nil UUID is no identity (S9)")
    return uuid or _name(text, "a VM's name or UUID")


def parse_plug(text: str) -> str:
    """A plug that is an alias: any name that is no UUID.

    Raises:
        ValueError: it is a UUID, empty, too long or holds control characters.
    """
    if as_vm_uuid(text) is not None:
        raise ValueError("a name; a UUID names its own VM and cannot stand for another")
    return _name(text, "a name")


def _split(text: str, units: Mapping[str, object], expects: str) -> tuple[float, str]:
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2] not in units:
        raise ValueError(expects)
    return float(match[1]), match[2]


def _name(text: str, expects: str) -> str:
    if not text or len(text) > MAX_PLUG:
        raise ValueError(f"{expects} of 1 to {MAX_PLUG} characters")
    if not text.isprintable():
        raise ValueError(f"{expects} without control characters")
    return text


def _host_name(text: str) -> str:
    if not _HOST.fullmatch(text):
        raise ValueError("a host name: letters, digits, dots and hyphens")
    return text


def _port_name(text: str) -> str:
    if not text or len(text) > 255 or not text.isprintable() or "/" in text or " " in text:
        raise ValueError(
            "a port name such as org.vmchannel.0: 1 to 255 printable characters, no blank, no slash"
        )
    return text


def _service_name(text: str) -> str:
    try:
        check_service(text)
    except LocalProtocolError:
        raise ValueError("a service's name such as org.example.clipboard") from None
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/") or not text.isprintable() or len(text) > 4096 or ".." in text.split("/"):
        raise ValueError("an absolute path without ..")
    return text


def _libvirt_uri(text: str) -> str:
    # Processes are found on this host, so no other host's libvirt is of use.
    if not _LIBVIRT.fullmatch(text):
        raise ValueError("a URI of this host's libvirt: qemu:///system or qemu:///session")
    return text


def _argument(text: str) -> str:
    return text


KINDS: Mapping[str, Callable[[str], object]] = MappingProxyType(
    {
        "size": parse_size,
        "duration": parse_duration,
        "count": parse_count,
        "vm": parse_vm,
        "plug": parse_plug,
        "group": lambda text: _name(text, "a group's name"),
        "host": _host_name,
        "port": _port_name,
        "service": _service_name,
        "path": _absolute,
        "libvirt": _libvirt_uri,
        "argument": _argument,
    }
)
"""The kinds that a schema may name."""
