# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host as the system tests use it: the real daemon, real QEMU processes, the real tools.

A `Site` is bound to no event loop: a module may share one. Its VMs have names that no other run on this
machine uses, because the daemon sees every QEMU there is.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from tests.rig.guest import Completed, Guest, qmp_client
from tests.rig.image import Image
from tests.rig.kernel import RigError
from tests.rig.programs import Result, environment, program, run_program
from tests.rig.qemu import VmSpec, write_start_script
from tests.rig.vm import Vm, stop_all
from vmchannel_host.cli.http_client import AdminClient, Doc

_START_S = 30
_STOP_S = 30
_SETTLE_S = 60

Input = Literal["stdin", "long", "short"]
"""How a fence agent is told what to do."""

ACTIONS = ["off", "on", "reboot", "status", "list"]
"""All that a policy group can allow."""


class HostDaemon:
    """vmchanneld as a process that can be stopped, killed and started again."""

    def __init__(self, config: Path, socket_path: Path, log: Path) -> None:
        self._config = config
        self._socket = socket_path
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the daemon was not started"
        return self._process.pid

    @property
    def log(self) -> str:
        """All that it has said, over all its starts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def start(self) -> None:
        """Start it, and wait until its admin socket answers.

        Raises:
            RigError: it ended, or does not serve in time.
        """
        assert not self.running, "the daemon runs already"
        command = program("vmchanneld", "--config", str(self._config))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not _listens(self._socket):
            if not self.running or time.monotonic() > deadline:
                raise RigError(f"vmchanneld did not come up:\n{self.log[-3000:]}")
            time.sleep(0.01)

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal; returns its exit code, negative for a signal.

        Raises:
            RigError: it does not end.
        """
        assert self._process is not None, "the daemon was not started"
        self._process.send_signal(number)
        try:
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            self._process.wait()
            raise RigError(f"vmchanneld does not end:\n{self.log[-3000:]}") from error

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self.end(signal.SIGKILL)

    def restart(self, number: int = signal.SIGTERM) -> None:
        """End it with a signal and start it again."""
        self.end(number)
        self.start()


@dataclass(slots=True)
class Site:
    """One host: where its files are, its VMs, its daemon, and how to ask it."""

    folder: Path
    image: Image | None = None  # None: its VMs run no guests
    accel: str = "tcg"
    host: str = "hv1"
    config: dict[str, Any] = field(default_factory=dict[str, Any])  # what host.yaml says beside the usual
    groups: dict[str, Any] = field(default_factory=dict[str, Any])
    start: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # VM name to start command
    vms: list[Vm] = field(default_factory=list[Vm])
    daemon: HostDaemon = field(init=False)

    def __post_init__(self) -> None:
        self.daemon = HostDaemon(self.config_file, self.admin_socket, self.folder / "daemon.log")

    @property
    def config_file(self) -> Path:
        return self.folder / "host.yaml"

    @property
    def admin_socket(self) -> Path:
        return self.folder / "run" / "admin.sock"

    # VMs

    def name(self, word: str) -> str:
        """A name that no VM of another run has."""
        return f"{word}-{self.folder.name[-4:]}"

    def spec(self, word: str, **options: Any) -> VmSpec:
        """A VM with a name of its own; the options are those of `VmSpec`. Its guest's hub runs by default."""
        guest: dict[str, Any] = {"image": self.image, "accel": self.accel, "guestd": True}
        usual: dict[str, Any] = guest if self.image is not None else {"machine": "none", "ports": ()}
        options = usual | {"hostname": f"node-{word}"} | options
        return VmSpec(self.name(word), self.folder / f"vm{len(self.vms)}", **options)

    def vm(self, word: str, **options: Any) -> Vm:
        """Start a VM; a guest in it is not waited for."""
        vm = Vm(self.spec(word, **options))
        self.vms.append(vm)
        vm.start()
        return vm

    async def migrate_away(self, vm: Vm) -> None:
        """Complete a migration of the VM to nowhere: the daemon sees its source only."""
        async with qmp_client(vm.spec) as monitor, asyncio.timeout(_SETTLE_S):
            await monitor.execute("migrate", {"uri": "exec:cat > /dev/null"})
            status = ""
            while status != "completed":
                await asyncio.sleep(0.02)
                info: Any = await monitor.execute("query-migrate")
                status = info.get("status")
                assert status != "failed", info

    def restartable(self, vm: Vm, *words: str) -> None:
        """Give the VM a start command: its start script, or these words."""
        script = vm.spec.folder / "start"
        self.start[vm.spec.name] = list(words) or [str(write_start_script(vm.spec, script))]

    def group(self, name: str, *members: Vm | str, actions: Sequence[str] = ACTIONS, **more: Any) -> None:
        """Let these VMs do these actions to each other."""
        names = [member if isinstance(member, str) else member.spec.uuid for member in members]
        self.groups[name] = {"members": names, "actions": list(actions), **more}

    # the daemon

    def write_config(self) -> None:
        """Write host.yaml, in one step. YAML is a superset of JSON: no quoting to get wrong."""
        qmp = {"type": "qmp", "sockets": f"{self.folder}/vm*/qmp.sock", "start": self.start}
        body: dict[str, Any] = {
            "host": self.host,
            "hypervisors": [qmp],
            "policy": {"groups": self.groups},
            "cluster": {"bus": "local", "standalone": True},
            "paths": {"state": f"{self.folder}/state", "run": f"{self.folder}/run"},
            **self.config,
        }
        draft = self.folder / "host.yaml.new"
        draft.write_text(json.dumps(body, indent=1))
        draft.replace(self.config_file)

    def serve(self) -> None:
        """Write the configuration and start the daemon."""
        self.write_config()
        self.daemon.start()

    async def reload(self) -> None:
        """Write the configuration and let the daemon read it again; wait until it has taken it over."""
        self.write_config()
        said = await self.hang_up()
        assert "configuration read again" in said, said

    async def hang_up(self) -> str:
        """SIGHUP; returns what the daemon says to that."""
        before = len(self.daemon.log)
        os.kill(self.daemon.pid, signal.SIGHUP)
        answers = ("configuration read again", "configuration not taken over")
        await self.until(lambda: any(one in self.daemon.log[before:] for one in answers), "answer to SIGHUP")
        return self.daemon.log[before:]

    def check(self) -> None:
        """What must hold at the end of every test run: the journal verifies, nothing failed unseen.

        Raises:
            AssertionError: it does not; or the daemon does not stop in order.
        """
        if not self.daemon.running:
            self.daemon.start()
        command = program("vmchannelctl", "--socket", str(self.admin_socket), "verify-journal")
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"the journal does not verify: {done.stdout}{done.stderr}"
        assert self.daemon.end() == 0, f"the daemon did not stop in order:\n{self.daemon.log[-3000:]}"
        for word in ("Traceback", "never retrieved", "never awaited", "was destroyed but it is pending"):
            assert word not in self.daemon.log, self.daemon.log[-10_000:]

    # questions

    async def ctl(self, *arguments: str, timeout_s: float = 60) -> Result:
        """`vmchannelctl ARGUMENTS`."""
        return await run_program(
            "vmchannelctl", "--socket", str(self.admin_socket), *arguments, timeout_s=timeout_s
        )

    @asynccontextmanager
    async def ctl_running(self, *arguments: str) -> AsyncGenerator[asyncio.Task[Result], None]:
        """`vmchannelctl ARGUMENTS` beside the block; it has ended when the block is left."""
        task = asyncio.create_task(self.ctl(*arguments), name="vmchannelctl")
        try:
            yield task
        finally:
            await task

    async def ctl_json(self, *arguments: str) -> Any:
        """`vmchannelctl ARGUMENTS --json`, parsed."""
        done = await self.ctl(*arguments, "--json")
        try:
            return json.loads(done.stdout)
        except ValueError as error:
            raise RigError(f"{arguments}: {done}\n{self.daemon.log[-3000:]}") from error

    async def ask(self, path: str, **query: str) -> Any:
        """What `GET /v1/PATH` of the admin API says: for questions that are asked often."""
        answer = await asyncio.to_thread(AdminClient(str(self.admin_socket)).get, f"/v1/{path}", query)
        return answer.checked()

    async def fence(self, action: str, vm: Vm | str, *, timeout_s: float = 40) -> dict[str, Any]:
        """The operator's `vmchannelctl fence`: its answer."""
        plug = vm if isinstance(vm, str) else vm.spec.name
        answer = await self.ctl_json("fence", action, plug, "--timeout", str(timeout_s))
        return cast("dict[str, Any]", answer)

    async def status(self, vm: Vm | str) -> str:
        """on, off or unknown, as the daemon can prove it now."""
        plug = vm if isinstance(vm, str) else vm.spec.name
        order = {"request_id": os.urandom(16).hex(), "action": "status", "vm": plug, "timeout_s": 40}
        return await asyncio.to_thread(self._status, order)

    def _status(self, order: Mapping[str, object]) -> str:
        client = AdminClient(str(self.admin_socket))
        for kind, value in client.stream("POST", "/v1/fence", order, timeout_s=_SETTLE_S):
            if kind == "answer":
                return Doc(value).text("state")
        raise RigError(f"no answer to {order}")

    async def run_state(self, vm: Vm) -> str:
        """The run state of the VM's one instance as the daemon last saw it; "" for none, or for several."""
        vms = await self.ask("vms")
        states = [
            str(instance["run_state"])
            for one in vms
            if one["uuid"] == vm.spec.uuid
            for instance in one["instances"]
        ]
        return states[0] if len(states) == 1 else ""

    async def until_run_state(self, vm: Vm, wanted: str) -> None:
        """Wait until the daemon sees the VM in that run state."""
        deadline = time.monotonic() + _SETTLE_S
        while (seen := await self.run_state(vm)) != wanted:
            if time.monotonic() > deadline:
                raise RigError(f"{vm.spec.name} is {seen!r}, not {wanted!r}\n{self.daemon.log[-3000:]}")
            await asyncio.sleep(0.05)

    async def until_connected(self, *vms: Vm) -> None:
        """Wait until the hubs of these VMs have greeted the daemon."""
        wanted = {vm.spec.uuid for vm in vms}
        async with asyncio.timeout(_SETTLE_S):
            while True:
                ports = await self.ask("ports")
                if wanted <= {port["vm_uuid"] for port in ports if port["connected"]}:
                    return
                await asyncio.sleep(0.05)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is so.

        Raises:
            RigError: it is not, in a minute.
        """
        deadline = time.monotonic() + _SETTLE_S
        while not condition():
            if time.monotonic() > deadline:
                raise RigError(f"no {what} in {_SETTLE_S} s\n{self.daemon.log[-3000:]}")
            await asyncio.sleep(0.02)

    async def operations(self, vm: Vm) -> list[dict[str, Any]]:
        """The operations on that VM in the journal, oldest first."""
        found = await self.ask("ops", limit="1000")
        return [one for one in reversed(found) if one["vm_uuid"] == vm.spec.uuid]


@contextmanager
def open_site(folder: Path, image: Image | None = None, accel: str = "tcg") -> Generator[Site, None, None]:
    """A site; in the end its journal must verify, and its daemon and VMs are gone."""
    site = Site(folder, image, accel)
    try:
        yield site
        if site.config_file.exists():
            site.check()
    finally:
        if site.daemon.running:
            site.daemon.kill()
        stop_all(folder)
        for vm in site.vms:
            vm.stop()
        print(f"--- vmchanneld of {folder}\n{site.daemon.log[-6000:]}")  # shown when the test failed


async def agent(
    guest: Guest,
    action: str,
    plug: str = "",
    *,
    by: Input = "stdin",
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60,
    **options: str,
) -> Completed:
    """Run the fence agent in a guest, told what to do in one of three ways; options by their long names."""
    words: list[str] = []
    lines = ""
    match by:
        case "stdin":
            given = {"action": action, **({"plug": plug} if plug else {}), **options}
            lines = "".join(f"{name}={value}\n" for name, value in given.items())
        case "long":
            words = [f"--action={action}", *([f"--plug={plug}"] if plug else [])]
            words += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        case "short":
            assert not options, "not every option has a short name"
            words = ["-o", action, *(["-n", plug] if plug else [])]
    return await guest.run("fence_vmchannel", *words, stdin=lines, env=env, timeout_s=timeout_s)


def script(path: Path, source: str) -> str:
    """Write an executable; returns its path as a word of a command."""
    path.write_text(source)
    path.chmod(0o755)
    return str(path)


def _listens(path: Path) -> bool:
    """A socket file alone says little: a killed daemon leaves one."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
