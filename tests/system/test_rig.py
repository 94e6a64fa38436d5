# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rig itself: a guest boots, its port works, and nothing is left of it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.rig.accel import boots
from tests.rig.fixtures import Attach, Boot, BootShared
from tests.rig.image import Image
from tests.rig.kernel import RigError
from tests.rig.qemu import PORT, VmSpec, write_start_script
from tests.rig.vm import Vm, find_processes, running

ECHO = """
import os, select
port = next(f"/dev/{n}" for n in os.listdir("/sys/class/virtio-ports")
            if open(f"/sys/class/virtio-ports/{n}/name").read().strip() == "org.vmchannel.0")
fd = os.open(port, os.O_RDWR | os.O_NONBLOCK)
print("open", flush=True)
epoll = select.epoll()
epoll.register(fd, select.EPOLLIN | select.EPOLLET)
data = b""
while not data.endswith(b"\\n"):
    epoll.poll(20)
    try:
        data += os.read(fd, 4096)
    except BlockingIOError:
        pass
os.write(fd, data.upper())
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def vm(boot_shared: BootShared) -> Vm:
    return boot_shared("node1")


async def test_a_guest_sees_its_port_by_name_and_has_no_network_card(vm: Vm, attach: Attach) -> None:
    guest = await attach(vm)
    names = await guest.sh("cat /sys/class/virtio-ports/*/name")
    cards = await guest.sh("ls /sys/class/net")
    assert (names.stdout, cards.stdout) == (f"{PORT}\n", "lo\n")
    assert (await guest.run("hostname")).stdout == "node1\n"


async def test_bytes_go_both_ways_through_the_raw_port(vm: Vm, attach: Attach) -> None:
    guest = await attach(vm)
    job = await guest.start_python(ECHO, timeout_s=40)
    reader, writer = await asyncio.open_unix_connection(str(vm.spec.port_socket()))
    writer.write(b"hello through the port\n")
    assert await asyncio.wait_for(reader.readline(), 30) == b"HELLO THROUGH THE PORT\n"
    writer.close()
    await writer.wait_closed()
    assert (await job.wait()).check().stdout == "open\ndone\n"


async def test_the_agents_library_and_the_commands_are_in_the_image(vm: Vm, attach: Attach) -> None:
    guest = await attach(vm)
    (await guest.python("import sys; sys.path.append('/usr/share/fence'); import fencing")).check()
    (
        await guest.sh(
            "test -x /usr/sbin/fence_vmchannel -a -x /usr/sbin/vmchannel-guestd -a -x /usr/bin/vmchannel"
        )
    ).check()


async def test_files_arrive_whole_and_results_tell_how_a_program_ended(vm: Vm, attach: Attach) -> None:
    guest = await attach(vm)
    data = bytes(range(256)) * 300
    await guest.push("/tmp/deep/file", data)
    assert await guest.pull("/tmp/deep/file") == data
    assert (await guest.sh("exit 3")).code == 3
    assert (await guest.run("sh", "-c", "cat; id -u", stdin="in\n", uid=1000)).stdout == "in\n1000\n"
    late = await guest.run("sleep", "60", timeout_s=0.3)
    assert (late.code, late.timed_out) == (-signal.SIGKILL, True)
    with pytest.raises(RigError, match="exit code 3"):
        (await guest.sh("exit 3")).check()


async def test_a_background_program_is_watched_and_stopped(vm: Vm, attach: Attach) -> None:
    guest = await attach(vm)
    job = await guest.start("sh", "-c", "echo began; exec sleep 60")
    seen = await job.peek()
    while not seen.stdout:
        seen = await job.peek()
    assert (seen.code, seen.stdout) == (None, "began\n")
    await job.signal(signal.SIGTERM)
    assert (await job.wait(20)).code == -signal.SIGTERM


async def test_a_killed_guest_comes_back_by_its_start_script_and_leaves_nothing(boot: Boot) -> None:
    guest = await boot("node2")
    first = (guest.vm.pid, await guest.boot_id())
    script = write_start_script(guest.spec)
    guest.vm.signal(signal.SIGKILL)
    await asyncio.to_thread(_wait_ended, guest.vm)
    await asyncio.to_thread(subprocess.run, [str(script)], check=True, timeout=30)
    await guest.wait_ready()
    assert guest.vm.pid != first[0]
    assert await guest.boot_id() != first[1]
    assert await guest.qmp("query-uuid") == {"UUID": guest.spec.uuid}
    guest.vm.stop()
    assert find_processes(str(guest.spec.folder)) == []


def _wait_ended(vm: Vm) -> None:
    while vm.running:
        time.sleep(0.01)


def test_a_machine_without_a_guest_starts_at_once(rig_dir: Path) -> None:
    bare = VmSpec("odd, name", rig_dir / "a", machine="none", ports=())
    stopped = VmSpec("stopped", rig_dir / "b", paused=True)
    with running(bare, stopped) as vms:
        assert all(vm.running for vm in vms)
        assert stopped.port_socket().is_socket()
    assert find_processes(str(rig_dir)) == []


def test_the_accelerator_probe_believes_only_a_kernel_that_boots(image: Image) -> None:
    assert boots(image, "tcg", timeout_s=60)
    assert not boots(image, "no-such-accelerator")
