# SPDX-License-Identifier: LGPL-2.1-or-later
"""What counts as open for writing, and what the image locks of a real QEMU say before and after its end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.integration.hypervisors.qemu_rig import Qemu, Rig
from vmchannel_host.hypervisors.cmdline import CommandLine, parse_command_line
from vmchannel_host.hypervisors.image_locks import OpenStorage, look_at_storage, wait_settled


def image(directory: Path, name: str = "disk.img") -> Path:
    path = directory / name
    path.touch()
    os.truncate(path, 1 << 20)
    return path


def look(qemu: Qemu) -> OpenStorage:
    qemu.wait_ready()
    command = parse_command_line(Path(f"/proc/{qemu.pid}/cmdline").read_bytes())
    return look_at_storage(qemu.pid, command)


@pytest.mark.parametrize("options", ["", ",aio=native,cache=none", ",aio=io_uring", ",cache=writeback"])
def test_a_writable_image_is_locked_while_qemu_lives_and_free_after_its_death(rig: Rig, options: str) -> None:
    disk = image(Path("/var/tmp"), f"{rig.directory.name}.img")  # O_DIRECT needs a real file system
    try:
        qemu = rig.qemu("-drive", f"file={disk},format=raw,if=virtio{options}")
        storage = look(qemu)
        assert [file.path for file in storage.files] == [str(disk)]
        assert storage.unprovable == ""
        assert not storage.free()
        qemu.close()
        assert storage.free()
        storage.close()
    finally:
        disk.unlink()


def test_the_lock_is_probed_on_the_file_that_was_open_not_on_its_name(rig: Rig) -> None:
    disk = image(rig.directory)
    qemu = rig.qemu("-drive", f"file={disk},format=raw,if=virtio")
    storage = look(qemu)
    disk.rename(rig.directory / "moved.img")
    image(rig.directory)
    assert not storage.free()
    storage.close()


def test_logs_pid_file_serial_output_and_guest_memory_are_not_storage(rig: Rig) -> None:
    directory = rig.directory
    qemu = rig.qemu(
        *("-serial", f"file:{directory}/serial", "-D", f"{directory}/log", "-pidfile", f"{directory}/pid"),
        *("-object", "memory-backend-memfd,id=ram,size=32M,share=on"),
        *("-object", "memory-backend-file,id=shm,size=4M,share=on,mem-path=/dev/shm"),
    )
    storage = look(qemu)
    assert storage.nothing, storage


def test_a_read_only_image_is_not_open_for_writing(rig: Rig) -> None:
    qemu = rig.qemu("-drive", f"file={image(rig.directory)},format=raw,if=virtio,readonly=on")
    assert look(qemu).nothing


def test_an_unlocked_image_cannot_be_proven(rig: Rig) -> None:
    disk = image(Path("/var/tmp"), f"{rig.directory.name}.img")
    try:
        qemu = rig.qemu("-drive", f"file={disk},format=raw,if=virtio,file.locking=off")
        assert "without image locks" in look(qemu).unprovable
    finally:
        disk.unlink()


def test_a_listening_port_with_a_client_is_no_storage(rig: Rig) -> None:
    port = f"socket,id=c,path={rig.directory}/c.sock,server=on,wait=off"
    qemu = rig.qemu("-vnc", "127.0.0.1:97", "-chardev", port)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{rig.directory}/c.sock")
        assert look(qemu).nothing


def test_network_storage_on_the_command_line_cannot_be_proven() -> None:
    storage = look_at_storage(os.getpid(), CommandLine((), "", network_storage=True))
    assert not storage.free()
    assert storage.unprovable


def test_a_process_that_is_gone_proves_nothing() -> None:
    storage = look_at_storage(2**22 - 1, CommandLine((), ""))
    assert storage.unprovable
    assert not storage.free()
    assert not storage.nothing


async def test_waiting_ends_when_the_locks_are_free_or_time_is_over() -> None:
    answers = iter([False, False, True])

    async def probe() -> bool:
        return next(answers)

    async def never() -> bool:
        return False

    assert await wait_settled(probe, until=float("inf"), poll_s=0.001)
    assert not await wait_settled(never, until=0.0, poll_s=0.001)
