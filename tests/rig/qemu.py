# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test VM is, as data, and the QEMU command line and start script that follow from it."""

from __future__ import annotations

import shlex
import uuid as uuids
from dataclasses import dataclass, field
from pathlib import Path

from tests.rig.image import Image

QEMU = "qemu-system-x86_64"
PORT = "org.vmchannel.0"

KERNEL_LINE = (
    "console=ttyS0 quiet loglevel=4 panic=0 mitigations=off tsc=unstable cryptomgr.notests "
    "random.trust_cpu=on lpj=4000000 rdinit=/init"  # lpj: to measure it takes half a second
)


def new_uuid() -> str:
    """A random VM UUID."""
    return str(uuids.uuid4())


@dataclass(frozen=True, slots=True)
class VmSpec:
    """One VM. Its sockets and logs lie in `folder`, its own and short: unix paths end at 107 bytes."""

    name: str
    folder: Path
    uuid: str = field(default_factory=new_uuid)
    image: Image | None = None  # None: no guest; the machine only
    ports: tuple[str, ...] = (PORT,)
    controller: bool = True  # a virtio-serial controller; without, there can be no ports
    port_ids: bool = True  # as libvirt gives them; without, QEMU sends no VSERPORT_CHANGE
    connects: bool = False  # QEMU connects to the ports' sockets, again and again, and listens on none
    machine: str = "q35"  # "none" starts fastest; it has no bus, so no ports
    accel: str = "tcg"
    memory_mib: int = 320
    paused: bool = False  # -S
    guestd: bool = False  # start vmchannel-guestd at boot
    hostname: str = ""  # default: the name
    kernel_line: str = ""  # added to the kernel's command line
    extra: tuple[str, ...] = ()  # added to QEMU's

    @property
    def qmp(self) -> Path:
        """The monitor for the daemon under test."""
        return self.folder / "qmp.sock"

    @property
    def rig_qmp(self) -> Path:
        """The rig's own monitor: one monitor serves one client."""
        return self.folder / "rig.sock"

    @property
    def control(self) -> Path:
        """The rig's serial line into the guest."""
        return self.folder / "ctl.sock"

    @property
    def console_log(self) -> Path:
        return self.folder / "console.log"

    @property
    def qemu_log(self) -> Path:
        return self.folder / "qemu.log"

    @property
    def pid_file(self) -> Path:
        return self.folder / "pid"

    def port_socket(self, port: str = PORT) -> Path:
        """The chardev socket of a port. Its name is the port's number: port names are no paths."""
        return self.folder / f"port{self.ports.index(port)}.sock"

    @property
    def sockets(self) -> tuple[Path, ...]:
        """All that QEMU makes, in no order."""
        listens = self.machine != "none" and not self.connects
        ports = tuple(self.port_socket(port) for port in self.ports) if listens else ()
        control = (self.control,) if self.image is not None else ()
        return (self.qmp, self.rig_qmp, *ports, *control)


def qemu_command(spec: VmSpec) -> list[str]:
    """The command that runs this VM in the foreground. No network card, ever."""
    machine = spec.machine if spec.machine == "none" else f"{spec.machine},accel={spec.accel}"
    command = [
        QEMU,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-nic",
        "none",
        "-machine",
        machine,
    ]
    command += ["-name", f"guest={_quoted(spec.name)}", "-uuid", spec.uuid, "-pidfile", str(spec.pid_file)]
    for path in (spec.qmp, spec.rig_qmp):
        command += ["-qmp", f"unix:{_quoted(str(path))},server=on,wait=off"]
    if spec.machine != "none":
        cpu = "host" if spec.accel == "kvm" else "max"
        memory = spec.memory_mib if spec.image else 16
        command += ["-cpu", cpu, "-smp", "1", "-m", str(memory), *_ports(spec)]
    if spec.image:
        command += _guest(spec, spec.image)
    if spec.paused:
        command += ["-S"]
    return [*command, *spec.extra]


def _ports(spec: VmSpec) -> list[str]:
    assert spec.controller or not spec.ports, "ports need a controller"
    options = ["-device", "virtio-serial-pci,id=vserial"] if spec.controller else []
    for number, port in enumerate(spec.ports):
        path = _quoted(str(spec.port_socket(port)))
        mode = "server=off,reconnect=1" if spec.connects else "server=on,wait=off"
        options += ["-chardev", f"socket,id=port{number},path={path},{mode}"]
        device = f"virtserialport,bus=vserial.0,chardev=port{number},name={_quoted(port)}"
        options += ["-device", f"{device},id=vport{number}" if spec.port_ids else device]
    return options


def _guest(spec: VmSpec, image: Image) -> list[str]:
    line = f"{KERNEL_LINE} rig_hostname={spec.hostname or spec.name}"
    line += " rig_guestd=yes" if spec.guestd else ""
    log = f"file,id=console,path={_quoted(str(spec.console_log))},append=on"
    control = f"socket,id=control,path={_quoted(str(spec.control))},server=on,wait=off"
    return [
        *_disk(image),
        *(
            "-kernel",
            str(image.kernel),
            "-initrd",
            str(image.initrd),
            "-append",
            f"{line} {spec.kernel_line}".strip(),
        ),
        *("-chardev", log, "-serial", "chardev:console", "-chardev", control, "-serial", "chardev:control"),
    ]


def _disk(image: Image) -> list[str]:
    if image.disk is None:
        return []
    drive = f"if=none,id=disk,format=raw,readonly=on,file={_quoted(str(image.disk))}"
    return ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]


def _quoted(text: str) -> str:
    return text.replace(",", ",,")  # QEMU's option syntax


def write_start_script(spec: VmSpec, path: Path | None = None) -> Path:
    """Write an executable that starts this VM again, daemonized: for `start:` in host.yaml.

    It ends with 0 when QEMU has its sockets open. `stop_all` of `tests.rig.vm` ends what it started.
    """
    path = path or spec.folder / "start"
    command = shlex.join([*qemu_command(spec), "-daemonize"])
    path.write_text(f"#!/bin/sh\n# starts {shlex.quote(spec.name)} as it was first started\nexec {command}\n")
    path.chmod(0o755)
    return path
