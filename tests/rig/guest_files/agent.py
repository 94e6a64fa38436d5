# SPDX-License-Identifier: LGPL-2.1-or-later
"""Process 1 of a test guest: does what the rig asks over the serial line, one JSON object a line.

Request: {"id": N, "op": NAME, ...}; answers: {"id": N, "got": true} at once, so that the sender never
overruns the line's 64 KiB, then {"id": N, ...result}. Bytes travel in base64. Started with `-I -S` and few
imports: under TCG each of them costs.
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

LINE = "/dev/ttyS1"
OUTPUT_LIMIT = 1 << 20
JOBS = "/run/rig"
Request = dict[str, Any]


class Job:
    """A program that was started here: its output goes to two files, its end is reported when asked for."""

    def __init__(self, number: int, pid: int, deadline: float | None) -> None:
        self.number = number
        self.pid = pid
        self.deadline = deadline  # time.monotonic() at which it is killed
        self.timed_out = False
        self.code: int | None = None
        self.waiters: list[tuple[int, float | None]] = []  # request ids, and until when each waits

    def report(self) -> Request:
        texts = {name: read_file(f"{JOBS}/{self.number}.{name}", 0, OUTPUT_LIMIT) for name in ("out", "err")}
        return {"job": self.number, "pid": self.pid, "rc": self.code, "timed_out": self.timed_out, **texts}


class Agent:
    """The loop: one line of input, one table of jobs."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.jobs: dict[int, Job] = {}
        self.partial = b""
        self.next_job = 1

    def run(self) -> NoReturn:
        """Serve for ever."""
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, ignore)  # a handler of ours, else nothing reaches the wake-up pipe
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self.line, select.POLLIN)
        poll.register(woken, select.POLLIN)
        while True:
            ready = dict(poll.poll(self.pause_ms()))
            if woken in ready:
                os.read(woken, 4096)
            self.reap()
            self.keep_deadlines()
            if self.line in ready:
                self.take(os.read(self.line, 65536))

    def pause_ms(self) -> int | None:
        times = [j.deadline for j in self.jobs.values() if j.code is None and j.deadline is not None]
        times += [until for j in self.jobs.values() for _, until in j.waiters if until is not None]
        return None if not times else max(0, int((min(times) - time.monotonic()) * 1000) + 1)

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for job in self.jobs.values():
                if job.pid == pid and job.code is None:
                    job.code = os.waitstatus_to_exitcode(status)
                    for request, _ in job.waiters:
                        self.send(request, job.report())
                    job.waiters = []

    def keep_deadlines(self) -> None:
        now = time.monotonic()
        for job in self.jobs.values():
            if job.code is None and job.deadline is not None and job.deadline <= now:
                job.timed_out, job.deadline = True, None
                kill_group(job.pid, signal.SIGKILL)
            for waiter in [w for w in job.waiters if w[1] is not None and w[1] <= now]:
                job.waiters.remove(waiter)
                self.send(waiter[0], job.report())

    def take(self, data: bytes) -> None:
        *lines, self.partial = (self.partial + data).split(b"\n")
        for line in lines:
            try:
                request: Request = json.loads(line)
                number = int(request["id"])
            except (ValueError, KeyError, TypeError):
                continue  # half a line from before a reconnection
            self.send(number, {"got": True})
            try:
                result = self.do(number, request)
            except Exception:  # noqa: BLE001 - told to the rig, which raises it there
                result = {"error": traceback.format_exc()}
            if result is not None:
                self.send(number, result)

    def do(self, number: int, request: Request) -> Request | None:
        match request["op"]:
            case "ping":
                return {"uptime": time.monotonic(), "boot_id": read_text("/proc/sys/kernel/random/boot_id")}
            case "start":
                job = self.start(request)
                return {"job": job.number, "pid": job.pid}
            case "wait":
                return self.wait(number, self.jobs[request["job"]], request.get("timeout"))
            case "signal":
                kill_group(self.jobs[request["job"]].pid, request["signal"])
                return {}
            case "write":
                return write_file(request)
            case "read":
                return {"data": read_file(request["path"], request["offset"], request["limit"])}
            case other:
                raise ValueError(f"unknown op {other!r}")

    def wait(self, number: int, job: Job, timeout: float | None) -> Request | None:
        if job.code is not None or timeout == 0:
            return job.report()
        job.waiters.append((number, None if timeout is None else time.monotonic() + timeout))
        return None

    def start(self, request: Request) -> Job:
        number = self.next_job
        self.next_job += 1
        timeout = request.get("timeout")
        contents = {"in": base64.b64decode(request.get("stdin", "")), "out": b"", "err": b""}
        for name, content in contents.items():  # here, not in the child: a report may come before it runs
            with open(f"{JOBS}/{number}.{name}", "wb") as file:
                file.write(content)
        pid = os.fork()
        if pid == 0:
            become(number, request)
        job = Job(number, pid, None if timeout is None else time.monotonic() + timeout)
        self.jobs[number] = job
        return job

    def send(self, number: int, result: Request) -> None:
        data = json.dumps({"id": number, **result}).encode() + b"\n"
        while data:
            data = data[os.write(self.line, data) :]


def become(number: int, request: Request) -> NoReturn:
    """In the child: take the job's files, user and environment, then run the program or the Python source."""
    code = 127
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        redirect(f"{JOBS}/{number}.in", os.O_RDONLY, 0)
        redirect(f"{JOBS}/{number}.out", os.O_WRONLY, 1)
        redirect(f"{JOBS}/{number}.err", os.O_WRONLY, 2)
        if "gid" in request:
            os.setgroups([])
            os.setgid(request["gid"])
        if "uid" in request:
            os.setuid(request["uid"])
        os.chdir("/")
        environment = os.environ | request.get("env", {})
        if "source" in request:
            code = run_source(request["source"], environment)
        else:
            argv: list[str] = request["argv"]
            os.execvpe(argv[0], argv, environment)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - a forked child must never return into the agent's loop
        traceback.print_exc()
        code = max(code if code != 127 else 1, 1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_source(source: str, environment: dict[str, str]) -> int:
    """Run Python source without a new interpreter, whose start takes most of a second under TCG."""
    os.environ.update(environment)
    sys.path.append("/usr/lib/python3/dist-packages")  # what `site` would have done
    exec(compile(source, "<rig>", "exec"), {"__name__": "__main__"})
    return 0


def redirect(path: str, flags: int, target: int) -> None:
    opened = os.open(path, flags)
    os.dup2(opened, target)
    os.close(opened)


def ignore(_number: int, _frame: object) -> None:
    pass


def kill_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return  # it has ended


def read_text(path: str) -> str:
    with open(path) as file:
        return file.read().strip()


def read_file(path: str, offset: int, limit: int) -> str:
    with open(path, "rb") as file:
        file.seek(offset)
        return base64.b64encode(file.read(limit)).decode()


def write_file(request: Request) -> Request:
    path: str = request["path"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab" if request["append"] else "wb") as file:
        file.write(base64.b64decode(request["data"]))
    os.chmod(path, request["mode"])
    return {}


def raw_line(path: str) -> int:
    import termios

    line = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    mode = termios.tcgetattr(line)
    mode[0] = mode[1] = mode[3] = 0  # no translation, no echo, no signals
    mode[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
    mode[4] = mode[5] = termios.B115200
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
    termios.tcsetattr(line, termios.TCSANOW, mode)
    return line


if __name__ == "__main__":
    Agent(raw_line(LINE)).run()
