# SPDX-License-Identifier: GPL-2.0-or-later
"""fence_vmchannel: the fence agent that Pacemaker runs in a guest.

`off`, `on` and `reboot` go to the host as one request for each plug. The library's own `fence_action` would
ask the status first: it calls `off` a success without a fence when the status is off, and fails a VM of
unknown state without trying (fencing.py 4.12.1, lines 990-999). The questions go through the library.

The last line on stderr is the reason, with `op=ID host=HOST`.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Final

from vmchannel_agents.alarm import Alarm, OutOfTime, Terminated, process_age_s
from vmchannel_agents.library import (
    DOCS,
    FENCE_LIBRARY,
    FenceLibrary,
    MissingLibrary,
    Options,
    Outlets,
    device_options,
    load,
)
from vmchannel_agents.outcome import EC_GENERIC_ERROR, EC_OK, AgentError, reason_line

if TYPE_CHECKING:
    from vmchannel_agents.requests import Requests

MONITOR_S: Final = 18
"""Pacemaker gives a monitor, and the start of a fence device, 20 s: our reason must come before that."""

_SHORTEST_MONITOR_S: Final = 2.0

_GRACE_S: Final = 2.0
"""After the deadline, before the whole process is given up."""

_DESTRUCTIVE: Final = ("off", "on", "reboot")
_NEEDS_PLUG: Final = (*_DESTRUCTIVE, "status")

log = logging.getLogger("vmchannel_agents")


def main(folder: str = FENCE_LIBRARY) -> int:
    """The command `fence_vmchannel`; returns its exit code. `folder` is where fencing.py is."""
    try:
        library = load(folder)
    except MissingLibrary as error:
        print(f"fence_vmchannel: {error}", file=sys.stderr)
        return EC_GENERIC_ERROR
    atexit.register(library.atexit_handler)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names are bytes to everybody but us
    errors = _ErrorRecorder()
    logging.getLogger().addHandler(errors)
    log.setLevel(logging.INFO)  # the outcome is always told
    try:
        return _run(library)
    except SystemExit as end:  # the library has said why, maybe not in its last line
        if end.code not in (None, EC_OK) and errors.first:
            log.error("%s", reason_line(errors.first))
        raise
    except AgentError as error:
        log.error("%s", reason_line(str(error), error.op, error.host))
    except (OutOfTime, Terminated) as error:
        log.error("%s", reason_line(f"{error}; the outcome is unknown"))
    except KeyboardInterrupt:
        log.error("%s", reason_line("interrupted; the outcome is unknown"))
    except Exception as error:  # Pacemaker shows the last line: a traceback says nothing there
        log.debug("internal error", exc_info=True)
        log.error("%s", reason_line(f"internal error: {type(error).__name__}: {error}"))
    return EC_GENERIC_ERROR


def _run(library: FenceLibrary) -> int:
    options = _read_options(library)
    action = str(options["--action"])
    plugs = _check_options(options)
    if action == "validate-all":
        return EC_OK
    library.run_delay(options)
    timeout_s = float(options["--timeout"])
    if action == "monitor":  # on a slow node the start of Python alone takes seconds of Pacemaker's twenty
        timeout_s = min(timeout_s, max(_SHORTEST_MONITOR_S, MONITOR_S - process_age_s()))
    with Alarm(timeout_s + _GRACE_S), _requests(options, timeout_s, patient=action == "monitor") as requests:
        if action in _DESTRUCTIVE:
            _carry_out(requests, action, plugs)
        else:
            return _answer_question(library, options, requests)
    time.sleep(int(options["--power-wait"]))
    return EC_OK


def _read_options(library: FenceLibrary) -> Options:
    """Parse the input; ends the process for help, version and metadata, and on misuse."""
    device_opt = device_options(library)
    # check_input adds its handlers; what process_input has to say comes before that.
    early = logging.StreamHandler(sys.stderr)
    early.setFormatter(logging.Formatter(library.LOG_FORMAT))
    logging.getLogger().addHandler(early)
    given = library.process_input(device_opt)
    logging.getLogger().removeHandler(early)
    # other_conditions: the library would end here with validate-all, before our own checks
    options = library.check_input(device_opt, given, True)
    library.show_docs(options, dict(DOCS))
    return options


def _check_options(options: Options) -> list[str]:
    """Check what the library does not; returns the plugs.

    Raises:
        AgentError: what is wrong.
    """
    for name, label in (("--separator", "separator"), ("--plug-separator", "plug_separator")):
        if not options[name]:
            raise AgentError(f"{label} is empty")
    for name, label in (("--port-name", "port_name"), ("--socket", "socket")):
        if not options[name]:
            raise AgentError(f"{label} is empty; leave it out for the default")
    if int(options["--timeout"]) < 1:
        raise AgentError(f"timeout is {options['--timeout']}; it must be 1 second or more")
    if int(options["--delay"]) < 0 or int(options["--power-wait"]) < 0:
        raise AgentError("delay and power_wait cannot be negative")
    action = options["--action"]
    if "--plug" not in options:
        if action in _NEEDS_PLUG:
            raise AgentError(f"{action} needs a plug: the name of a virtual machine or of a cluster node")
        return []
    plugs = str(options["--plug"]).split(options["--plug-separator"])
    if not all(plugs) and action in _NEEDS_PLUG:
        raise AgentError(f"plug {options['--plug']!r} names nothing, or has an empty part")
    return list(dict.fromkeys(plugs))


def _requests(options: Options, timeout_s: float, *, patient: bool) -> Requests:
    # imported late: metadata, help and validate-all need no client
    from vmchannel_agents.requests import Requests

    return Requests(
        socket=str(options["--socket"]),
        port=str(options["--port-name"]),
        timeout_s=timeout_s,
        patient=patient,
    )


def _carry_out(requests: Requests, action: str, plugs: list[str]) -> None:
    """Ask for `action` on each plug, and print what the library would.

    Raises:
        AgentError: it failed for a plug; the others have been tried as well.
    """
    failure: AgentError | None = None
    already = True
    for plug in plugs:
        try:
            done = requests.carry_out(action, plug)
        except AgentError as error:
            if failure is not None:
                log.error("%s", reason_line(str(failure), failure.op, failure.host))
            failure = error
            continue
        already = already and done.already
        level = logging.WARNING if done.not_started else logging.INFO
        log.log(level, "%s", reason_line(f"{plug}: {done.reason}", done.op, done.host))
    if failure is not None:
        raise failure
    if action == "reboot":
        print("Success: Rebooted")
    else:
        print(f"Success: {'Already' if already else 'Powered'} {action.upper()}")
    sys.stdout.flush()


def _answer_question(library: FenceLibrary, options: Options, requests: Requests) -> int:
    def set_power(_: object, __: Options) -> None:
        raise AssertionError("off, on and reboot never go through the library")

    def get_power(_: object, given: Options) -> str:
        return requests.status(str(given["--plug"]))

    def get_outlets(_: object, given: Options) -> Outlets:
        if given.get("--original-action") == "monitor":
            requests.monitor()
            return {}
        return requests.outlets(str(given["--separator"]))

    code = library.fence_action(None, options, set_power, get_power, get_outlets)
    return code or EC_OK


class _ErrorRecorder(logging.Handler):
    """Keeps the first error that was logged: the library adds hints after it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first = ""

    def emit(self, record: logging.LogRecord) -> None:
        if not self.first:
            self.first = record.getMessage().strip()


if __name__ == "__main__":
    sys.argv[0] = os.path.join(os.path.dirname(sys.argv[0]), "fence_vmchannel")
    sys.exit(main())
