# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which accelerator guests run under. KVM counts only after a kernel was seen to boot under it here.

`/dev/kvm` proves little: nested virtualisation may open, start and hang.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

from tests.rig.image import Image
from tests.rig.kernel import RigError
from tests.rig.qemu import VmSpec
from tests.rig.vm import Vm, running

PROBE_S = 30
_MARK = "the-probe-boots"


def accelerator(cache: Path, image: Image, *, wanted: str) -> str:
    """The accelerator to use: "kvm" or "tcg".

    Args:
        cache: remembers the probe's result for this kernel and machine.
        image: what the probe boots.
        wanted: "tcg", "kvm" (then a failed probe is an error) or "auto".

    Raises:
        RigError: KVM is demanded and does not boot, or `wanted` is no such word.
    """
    match wanted:
        case "tcg":
            return "tcg"
        case "auto":
            return "kvm" if _remembered_probe(cache, image) else "tcg"
        case "kvm":
            if not boots(image, "kvm"):
                raise RigError("no guest boots under KVM on this machine")
            return "kvm"
        case _:
            raise RigError(f"VMCHANNEL_ACCEL is {wanted!r}, not tcg, kvm or auto")


def _remembered_probe(cache: Path, image: Image) -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()  # the answer may differ after a reboot
    known = cache / f"kvm-{hashlib.sha256(f'{boot} {image.kernel}'.encode()).hexdigest()[:16]}"
    if not known.exists():
        known.write_text("yes" if boots(image, "kvm") else "no")
    return known.read_text() == "yes"


def boots(image: Image, accel: str, *, timeout_s: float = PROBE_S) -> bool:
    """Whether the guest's first program runs under that accelerator within `timeout_s`."""
    with tempfile.TemporaryDirectory(prefix="vmc-probe-") as folder:
        line = f"rig_say={_MARK}"  # init writes it to the console
        spec = VmSpec("probe", Path(folder), image=image, ports=(), accel=accel, kernel_line=line)
        try:
            with running(spec) as [vm]:
                return _says(vm, f"init: {_MARK}", timeout_s)
        except RigError:
            return False


def _says(vm: Vm, text: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and vm.running:
        if vm.spec.console_log.exists() and text in vm.spec.console_log.read_text(errors="replace"):
            return True
        time.sleep(0.1)
    return False
