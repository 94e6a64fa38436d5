# SPDX-License-Identifier: GPL-2.0-or-later
"""The system's fence-agents library: where it is, what we use of it, and the options of our agent.

The library (`fencing.py`, untyped) parses stdin and command line, prints metadata, and keeps Pacemaker's
conventions. Tried with 4.12.1.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol, cast

FENCE_LIBRARY: Final = "/usr/share/fence"
"""Where Debian, Fedora, RHEL and SUSE put fencing.py (configure --with-fenceagentslibdir). A `sys.path` entry
before it wins."""

DEFAULT_TIMEOUT_S: Final = 40
"""Below the 60 s that Pacemaker gives a fence device, so that our reason reaches it."""

Options = dict[str, Any]
Outlets = dict[str, tuple[str, str | None]]


class FenceLibrary(Protocol):
    """What we use of fencing.py."""

    all_opt: dict[str, dict[str, Any]]
    LOG_FORMAT: str

    def process_input(self, device_opt: list[str]) -> Options:
        """Read the command line, or stdin where there is none."""
        ...

    def check_input(self, device_opt: list[str], options: Options, other_conditions: bool) -> Options:
        """Check, fill in defaults and set up logging; exits with 1 on misuse."""
        ...

    def show_docs(self, options: Options, docs: Mapping[str, str]) -> None:
        """Print help, version or metadata and exit, if that is asked for."""
        ...

    def run_delay(self, options: Options) -> None:
        """Sleep for `delay` before `off` and `reboot`."""
        ...

    def fence_action(
        self,
        connection: object,
        options: Options,
        set_power: Callable[[object, Options], None],
        get_power: Callable[[object, Options], str],
        get_outlets: Callable[[object, Options], Outlets],
    ) -> int:
        """Carry out an action by the library's conventions; the exit code."""
        ...

    def atexit_handler(self) -> None:
        """Close stdout; to be registered with atexit."""
        ...


class MissingLibrary(Exception):
    """The fence-agents library, or something that it imports, is not installed."""


def load(folder: str = FENCE_LIBRARY) -> FenceLibrary:
    """Import the library.

    Raises:
        MissingLibrary: it cannot be imported; the text says what to install.
    """
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its regular expressions, from Python 3.12 on
            return cast(FenceLibrary, importlib.import_module("fencing"))
    except ImportError as error:
        raise MissingLibrary(
            f"the fence-agents library cannot be loaded ({error}); install the package fence-agents (Debian) "
            "or fence-agents-common (Fedora, RHEL, SUSE)"
        ) from error


def device_options(library: FenceLibrary) -> list[str]:
    """Define our options in the library; returns the names of all that the agent takes.

    `no_port` keeps the library from asking for a plug (we do, where one is needed): so `validate-all` passes
    without parameters, as does everything that Pacemaker does with a device that has none.
    """
    all_opt = library.all_opt
    all_opt["port"]["required"] = "0"
    all_opt["port"]["help"] = "-n, --plug=[id]                Virtual machine (name or UUID) or cluster node"
    all_opt["port"]["shortdesc"] = "Virtual machine (name or UUID) or cluster node name"
    all_opt["port_name"] = {
        "getopt": ":",
        "longopt": "port-name",
        "help": "--port-name=[name]             Name of the virtio-serial port to the host",
        "required": "0",
        "shortdesc": "Name of the virtio-serial port to the host",
        "default": "org.vmchannel.0",
        "order": 2,
    }
    all_opt["socket"] = {
        "getopt": ":",
        "longopt": "socket",
        "help": "--socket=[path]                Socket of vmchannel-guestd, the guest's hub",
        "required": "0",
        "shortdesc": "Socket of vmchannel-guestd; if nobody serves it, the agent opens the port itself",
        "default": "/run/vmchannel/guest.sock",
        "order": 3,
    }
    all_opt["timeout"] = {
        "getopt": ":",
        "longopt": "timeout",
        "type": "second",
        "help": "--timeout=[seconds]            Give up after X seconds without an answer of the host",
        "required": "0",
        "shortdesc": "Give up after X seconds without an answer of the host (also when run from Pacemaker)",
        "default": str(DEFAULT_TIMEOUT_S),
        "order": 4,
    }
    return ["port", "no_port", "no_password", "port_name", "socket", "timeout"]


DOCS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "shortdesc": "Fence agent for virtual machines over a virtio-serial port",
        "longdesc": (
            "fence_vmchannel is a Power Fencing agent for clusters of virtual machines. It runs in a guest "
            "and asks the host, over a named virtio-serial port, to power another guest off or on. It needs "
            "no network between guest and host, no key and no configuration in the guest. The host's policy "
            "decides which guest may fence which. A virtual machine is reported as off only when the host "
            "has proof; what is unknown is a failure. All parameters may be left out: the plug is then the "
            "name of the cluster node, which each guest announces to its host."
        ),
        "vendorurl": "https://www.linux-kvm.org/page/VMchannel_Requirements",
    }
)
