# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirtd of its own, without systemd: of a user's session, or of the system in a mount namespace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from tests.rig import libvirtd_keeper, own_mounts
from tests.rig.kernel import RigError

_QEMU_CONF = """\
stdio_handler = "file"
namespaces = []
security_driver = "none"
cgroup_controllers = []
"""
_NOBODY = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--")
_BOUND = {
    "etc": "/etc/libvirt",
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
}
_GROUPS = "libvirt-qemu:x:64055:\nkvm:x:64056:"
READY_S = 60


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain to be defined. It runs no guest: its firmware finds none."""

    name: str
    uuid: str
    ports: tuple[tuple[str, Path], ...] = ()  # name and socket of each channel
    extra: str = ""  # elements of <domain>
    devices: str = ""  # elements of <devices>
    memory_mib: int = 32
    firmware: Path | None = None  # in flash memory, which is migrated too
    kernel: tuple[Path, Path, str] | None = None  # kernel, initrd and command line of a guest

    @property
    def xml(self) -> str:
        boot = ""
        if self.firmware is not None:
            boot = f"<loader readonly='yes' type='pflash' stateless='yes'>{self.firmware}</loader>"
        if self.kernel is not None:
            kernel, initrd, line = self.kernel
            boot += f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{escape(line)}</cmdline>"
        channels = "".join(
            f"<channel type='unix'><source mode='bind' path={quoteattr(str(path))}/>"
            f"<target type='virtio' name={quoteattr(name)}/></channel>"
            for name, path in self.ports
        )
        return (
            f"<domain type='qemu'><name>{escape(self.name)}</name><uuid>{self.uuid}</uuid>"
            f"<memory unit='MiB'>{self.memory_mib}</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os>{self.extra}"
            "<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>"
            "<controller type='usb' model='none'/><memballoon model='none'/>"
            f"{channels}{self.devices}</devices></domain>"
        )


class Libvirtd:
    """One libvirtd and its domains. Everything is gone after `close`."""

    def __init__(self, directory: Path, *, system: bool = False) -> None:
        """`directory`: a short path of ours; a unix socket's is limited to 107 bytes."""
        self.directory = directory
        self.system = system
        self.pid = 0
        base = directory / "run" if system else directory / "run/libvirt"
        self.uri = f"qemu:///{'system' if system else 'session'}?socket={base / 'libvirt-sock'}"
        self.saves = directory / ("lib/qemu/save" if system else "config/libvirt/qemu/save")
        self.sockets = directory / "ch"  # for channels
        self._prepare()
        self._keeper = subprocess.Popen(
            [sys.executable, libvirtd_keeper.__file__, *self._command()],
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def entry(self) -> dict[str, str]:
        """What `hypervisors` of host.yaml says of it."""
        return {"type": "libvirt", "uri": self.uri, "saves": str(self.saves)}

    def start(self) -> None:
        """Start libvirtd and wait until it answers."""
        self.pid = int(self._tell("start"))
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + READY_S
        while self._virsh("version").returncode:
            if time.monotonic() > deadline:
                raise RigError(f"libvirtd does not answer: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill libvirtd; its domains go on."""
        self._tell("kill")
        deadline = time.monotonic() + READY_S
        while Path(f"/proc/{self.pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def pause(self) -> None:
        """Let it hang."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def virsh(self, *arguments: str) -> str:
        """Run virsh; what it prints.

        Raises:
            RigError: it failed.
        """
        done = self._virsh(*arguments)
        if done.returncode:
            raise RigError(f"virsh {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def define(self, domain: Domain) -> None:
        """Define a domain."""
        file = self.directory / f"{uuid.uuid4()}.xml"
        file.write_text(domain.xml, "utf-8")
        self.virsh("define", str(file))

    def create(self, domain: Domain) -> None:
        """Define and start a domain."""
        self.define(domain)
        self.virsh("start", domain.uuid)

    def qemus(self, domain: Domain) -> list[int]:
        """The processes of a domain that live."""
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
            except OSError:
                continue
            if arguments and b"qemu-system" in arguments[0] and domain.uuid.encode() in arguments:
                found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Kill libvirtd and all that it has started."""
        try:
            if self.pid and Path(f"/proc/{self.pid}").exists():
                self.resume()
            self._keeper.communicate("", timeout=READY_S)
        finally:
            self._keeper.kill()
            self._keeper.wait()

    def _tell(self, word: str) -> str:
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.write(f"{word}\n")
        self._keeper.stdin.flush()
        return self._keeper.stdout.readline()

    def _virsh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["virsh", "-q", "-c", self.uri, *arguments],
            capture_output=True,
            text=True,
            timeout=READY_S,
            env={"PATH": "/usr/bin:/bin", "HOME": str(self.directory), "LC_ALL": "C.UTF-8"},
        )

    def _prepare(self) -> None:
        for name in ("run", "config/libvirt", "cache", "data", "home", "ch", "etc", "lib"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        settings = self.directory / ("etc" if self.system else "config/libvirt")
        user = 'user = "root"\ngroup = "root"\n' if self.system else ""
        (settings / "qemu.conf").write_text(_QEMU_CONF + user)
        (settings / "libvirtd.conf").write_text(
            f'host_uuid = "{uuid.uuid4()}"\nlog_outputs = "3:file:{self.directory}/log"\n'
            'auth_unix_rw = "none"\n'
            'unix_sock_group = "root"\nunix_sock_rw_perms = "0700"\n'
        )
        (self.directory / "log").touch()
        if self.system:  # the user that the driver wants comes with another package
            for name, line in (("passwd", "libvirt-qemu:x:64055:64055::/:/bin/false"), ("group", _GROUPS)):
                (self.directory / name).write_text(Path("/etc", name).read_text().rstrip() + f"\n{line}\n")
        if not self.system and os.geteuid() == 0:
            for path in (self.directory, *self.directory.rglob("*")):
                shutil.chown(path, "nobody", "nogroup")

    def _command(self) -> Sequence[str]:
        if not self.system:
            return (*(_NOBODY if os.geteuid() == 0 else ()), "libvirtd")
        steps: list[str] = []
        for name, path in _BOUND.items():
            Path(path).mkdir(parents=True, exist_ok=True)
            steps.append(f"mount --bind '{self.directory}/{name}' {path}")
        steps += [f"mount --bind '{self.directory}/{name}' /etc/{name}" for name in ("passwd", "group")]
        pid_file = f"{self.directory}/libvirtd.pid"
        script = " && ".join([*steps, f"exec libvirtd --pid-file '{pid_file}'"])
        return own_mounts.command("sh", "-ec", script)

    def _environment(self) -> dict[str, str]:
        paths = {"RUNTIME_DIR": "run", "CONFIG_HOME": "config", "CACHE_HOME": "cache", "DATA_HOME": "data"}
        xdg = {f"XDG_{name}": str(self.directory / path) for name, path in paths.items()}
        return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.directory / "home"), **xdg}


@contextmanager
def running_libvirtd(directory: Path, *, system: bool = False) -> Generator[Libvirtd]:
    """A libvirtd that runs in a directory of ours with a short path, which everybody may enter."""
    directory.chmod(0o755)
    libvirtd = Libvirtd(directory, system=system)
    try:
        libvirtd.start()
        yield libvirtd
    finally:
        libvirtd.close()
