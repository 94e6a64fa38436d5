# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannel: what a user of the guest can see and ask: status, fence, watch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum
from typing import Any, Final, TextIO, cast

from fence_vmchannel import __version__
from fence_vmchannel.addresses import DEFAULT_PORT
from fence_vmchannel.blocking.client import BlockingClient
from fence_vmchannel.errors import (
    ChannelClosed,
    ChannelError,
    CloseCode,
    DeadlineExceeded,
    LocalProtocolError,
)
from fence_vmchannel.hub.events import HubEvent, HubStatus, PeerStatus
from fence_vmchannel.links.local import GUEST_SOCKET
from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceCode, FenceProgress
from vmchannel_guest.announce import find_announcement, system_sources
from vmchannel_guest.fencing import (
    FencingClient,
    FencingError,
    HostUnreachable,
    NotPermitted,
    Reach,
    succeeded,
)
from vmchannel_guest.reach import GuestReach
from vmchannel_guest.text import one_line

_ACTIONS: Final = {action.name.lower(): action for action in FenceAction}
_WITHOUT_PLUG: Final = (FenceAction.LIST, FenceAction.MONITOR)
_HUB_S: Final = 10.0
_WATCH_SLICE_S: Final = 10.0
"""The connection is served only within calls, so a watch never waits longer than this in one."""


class Exit(IntEnum):
    """Exit codes, the same for all commands of the product but the fence agent."""

    DONE = 0
    FAILED = 1  # or unknown
    USAGE = 2
    REFUSED = 3
    UNREACHABLE = 4


def main() -> int:
    """The command `vmchannel`."""
    try:
        return run(sys.argv[1:], out=sys.stdout, err=sys.stderr)
    except KeyboardInterrupt:
        return Exit.FAILED
    except BrokenPipeError:  # its reader has left
        sys.stderr.close()
        return Exit.FAILED


def run(
    arguments: Sequence[str], *, out: TextIO, err: TextIO, reach: Callable[[str, str], Reach] | None = None
) -> int:
    """Run one command line; returns its exit code. `reach(socket, port)` stands in for `GuestReach`."""
    options = _parser().parse_args(arguments)
    try:
        match options.command:
            case "status":
                return _status(options, out)
            case "watch":
                return _watch(options, out)
            case _:
                return _fence(options, out, err, reach or _reach)
    except ChannelError as error:
        print(f"vmchannel: {one_line(str(error))}", file=err)
        return _exit_of(error)


def _parser() -> argparse.ArgumentParser:
    common = _common(argparse.SUPPRESS, argparse.SUPPRESS)  # given before the command, they stay
    parser = argparse.ArgumentParser(
        prog="vmchannel",
        description="Channels of this guest to its host.",
        parents=[_common(GUEST_SOCKET, False)],
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("status", parents=[common], help="ports, and whether the host is connected")
    commands.add_parser("watch", parents=[common], help="follow what happens until interrupted")
    fence = commands.add_parser("fence", parents=[common], help="ask the host to fence a VM, or about one")
    fence.add_argument("action", choices=sorted(_ACTIONS))
    fence.add_argument("plug", nargs="?", default="", help="VM (name or UUID) or cluster node")
    fence.add_argument("--port", default=DEFAULT_PORT, metavar="NAME", help="default: %(default)s")
    fence.add_argument(
        "--timeout", type=_seconds, default=40.0, metavar="SECONDS", help="default: %(default)s"
    )
    return parser


def _common(socket: str, as_json: object) -> argparse.ArgumentParser:
    """Options that may stand before the command or after it, with their defaults."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", default=as_json, help="print JSON")
    common.add_argument(
        "--socket", default=socket, metavar="PATH", help=f"of the hub (default: {GUEST_SOCKET})"
    )
    return common


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError("0 to 3600 seconds")
    return value


# --- status and watch ---


def _status(options: argparse.Namespace, out: TextIO) -> int:
    deadline = time.monotonic() + _HUB_S
    with BlockingClient.connect(options.socket, deadline=deadline, resume_s=0) as client:
        status = client.status(deadline=deadline)
    if options.json:
        print(json.dumps(_facts(status)), file=out)
    else:
        for line in _status_lines(status):
            print(line, file=out)
    return Exit.DONE if any(peer.connected for peer in status.peers) else Exit.FAILED


def _status_lines(status: HubStatus) -> list[str]:
    lines = [f"hub: {one_line(status.software, 70)}"]
    lines += [_peer_line(peer) for peer in status.peers]
    if not status.peers:
        lines.append("no port named org.vmchannel.*: add one to the VM")
    lines += [
        f"service {one_line(offer.service, 60)}: offered by {one_line(offer.owner, 40)}"
        for offer in status.services
    ]
    return lines


def _peer_line(peer: PeerStatus) -> str:
    port = one_line(peer.port, 60)
    if peer.connected:
        return f"port {port}: connected to {one_line(peer.software, 60)}, {peer.channels} channels"
    state = "not connected" if peer.present else "not there"
    return f"port {port}: {state}" + (f": {one_line(peer.detail, 200)}" if peer.detail else "")


def _watch(options: argparse.Namespace, out: TextIO) -> int:
    with (
        BlockingClient.connect(options.socket, deadline=time.monotonic() + _HUB_S, resume_s=0) as client,
        client.watch(deadline=time.monotonic() + _HUB_S) as watch,
    ):
        while True:
            try:
                event = watch.next(deadline=time.monotonic() + _WATCH_SLICE_S)
            except DeadlineExceeded:
                continue
            print(_event_line(event, as_json=options.json), file=out, flush=True)


def _event_line(event: HubEvent, *, as_json: bool) -> str:
    kind = re.sub(r"(?<!^)([A-Z])", r"-\1", type(event).__name__).lower()
    facts = _facts(event)
    if as_json:
        return json.dumps({"event": kind, **facts})
    words = [f"{key}={one_line(_word(value), 200)}" for key, value in facts.items() if value != ""]
    return " ".join([kind, *words])


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return f'"{text}"' if " " in text else text


# --- fence ---


def _reach(socket: str, port: str) -> Reach:
    sources = system_sources()
    return GuestReach(socket=socket, port=port, announce=lambda: find_announcement(sources))


def _fence(options: argparse.Namespace, out: TextIO, err: TextIO, reach: Callable[[str, str], Reach]) -> int:
    action = _ACTIONS[options.action]
    if bool(options.plug) == (action in _WITHOUT_PLUG):
        need = "takes no PLUG" if options.plug else "needs a PLUG"
        print(f"vmchannel: {options.action} {need}", file=err)
        return Exit.USAGE

    def show(progress: FenceProgress) -> None:
        print(f"{progress.elapsed_ms / 1000:7.2f} s  {one_line(progress.text, 200)}", file=err, flush=True)

    with FencingClient(reach(options.socket, options.port)) as client:
        answer = client.ask(
            action,
            options.plug,
            deadline=time.monotonic() + options.timeout,
            progress=None if options.json else show,
        )
    done = succeeded(action, answer)
    if options.json:
        print(json.dumps({"done": done, **_facts(answer)}), file=out)
    else:
        _print_answer(action, answer, out if done else err)
    if done:
        return Exit.DONE
    return Exit.REFUSED if answer.code in (FenceCode.REFUSED, FenceCode.VOID) else Exit.FAILED


def _print_answer(action: FenceAction, answer: FenceAnswer, out: TextIO) -> None:
    if action is FenceAction.LIST and answer.ok:
        for target in answer.targets:
            names = ", ".join(one_line(alias, 80) for alias in target.aliases)
            known = f" ({names})" if names else ""
            print(f"{one_line(target.plug, 80)}{known}: {target.state.name.lower()}", file=out)
        return
    for line in answer.evidence:
        print(f"  {one_line(line, 300)}", file=out)
    name = f"{one_line(answer.vm_name or answer.vm_uuid, 80)}: " if answer.vm_uuid else ""
    where = f"op={answer.operation or '-'} host={one_line(answer.host, 80) or '-'}"
    print(f"{name}{one_line(answer.reason) or answer.code.name.lower()} {where}", file=out)


def _exit_of(error: ChannelError) -> int:
    match error:
        case NotPermitted():
            return Exit.REFUSED
        case HostUnreachable():
            return Exit.UNREACHABLE
        case FencingError():
            return Exit.FAILED
        case LocalProtocolError():
            return Exit.USAGE
        case ChannelClosed(code=CloseCode.NOT_PERMITTED):
            return Exit.REFUSED
        case _:
            return Exit.UNREACHABLE


def _facts(value: Any) -> Any:
    """A frozen dataclass as JSON can hold it; enumerations by name, bytes as hexadecimal."""
    match value:
        case Enum():
            return value.name.lower()
        case bytes():
            return value.hex()
        case tuple():
            return [_facts(item) for item in cast(Any, value)]
        case _ if dataclasses.is_dataclass(value):
            return {one.name: _facts(getattr(value, one.name)) for one in dataclasses.fields(value)}
        case _:
            return value


if __name__ == "__main__":
    sys.exit(main())
