# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest of the rig as a domain of libvirt's: the same image, ports and serial line."""

from __future__ import annotations

from xml.sax.saxutils import quoteattr

from tests.rig.kernel import RigError
from tests.rig.libvirtd import Domain, Libvirtd
from tests.rig.qemu import KERNEL_LINE, VmSpec
from tests.rig.vm import Vm, find_processes


class LibvirtVm(Vm):
    """Starts by `virsh start`. Its libvirtd runs as root, for the image is nobody else's."""

    def __init__(self, spec: VmSpec, libvirtd: Libvirtd) -> None:
        super().__init__(spec)
        self._libvirtd = libvirtd

    def start(self, *, timeout_s: float = 20) -> None:
        self.spec.folder.mkdir(parents=True, exist_ok=True)
        self._libvirtd.create(domain_of(self.spec))

    def pids(self) -> list[int]:
        return find_processes("qemu-system", self.spec.uuid)


def domain_of(spec: VmSpec) -> Domain:
    """The domain of a VM with a guest.

    Raises:
        RigError: it has none.
    """
    if spec.image is None:
        raise RigError(f"{spec.name} has no guest")
    line = f"{KERNEL_LINE} rig_hostname={spec.hostname or spec.name}"
    line += " rig_guestd=yes" if spec.guestd else ""
    console, control = quoteattr(str(spec.console_log)), quoteattr(str(spec.control))
    return Domain(
        spec.name,
        spec.uuid,
        tuple((port, spec.port_socket(port)) for port in spec.ports),
        extra="<features><acpi/></features><cpu mode='maximum'/>",
        devices=f"<serial type='file'><source path={console}/><target port='0'/></serial>"
        f"<serial type='unix'><source mode='bind' path={control}/><target port='1'/></serial>",
        memory_mib=spec.memory_mib,
        kernel=(spec.image.kernel, spec.image.initrd, f"{line} {spec.kernel_line}".strip()),
    )
