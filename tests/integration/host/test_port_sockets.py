# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sockets at paths that others have named: what is made, what is left alone, whose connection is taken."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fence_vmchannel.errors import LinkError
from tests.integration.host.connecting_rig import until
from tests.unit.host.registry_builders import VM1
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.process import ProcessGone, ProcessKey
from vmchannel_host.model import BootId, PortName, ProcessIdentity
from vmchannel_host.port_sockets.expected import Claim, ExpectedLink
from vmchannel_host.port_sockets.listeners import PortListeners
from vmchannel_host.port_sockets.path_listener import PathListener
from vmchannel_host.port_sockets.places import Place, SocketProblem
from vmchannel_host.port_sockets.socket_file import PortSocket

NOBODY = 65_534
ME = os.getpid()

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="ps-") as directory:
        yield Place(directory, "p.sock")


# --- the file


def refusal(place: Place, uid: int | None = None) -> str:
    """Why no socket is made."""
    with pytest.raises(SocketProblem) as refused:
        PortSocket.listen(place, uid=uid)
    assert refused.value.remedy
    return str(refused.value)


def test_the_socket_is_for_its_owner_alone_whatever_the_umask_and_is_removed(place: Place) -> None:
    before = os.umask(0)
    try:
        made = PortSocket.listen(place, uid=None)
    finally:
        os.umask(before)
    with closing(made):
        assert stat.S_IMODE(os.stat(place.path).st_mode) == 0o600
        assert made.in_place()
    assert os.listdir(place.directory) == []


@as_root
def test_the_socket_is_given_to_the_user_of_the_qemu_or_else_to_the_directorys_owner(place: Place) -> None:
    with closing(PortSocket.listen(place, uid=NOBODY)) as made:
        assert made.owner() == NOBODY
    os.chown(place.directory, NOBODY, -1)
    with closing(PortSocket.listen(place, uid=None)) as made:
        assert made.owner() == NOBODY


def test_a_file_that_took_the_sockets_place_is_not_removed(place: Place) -> None:
    made = PortSocket.listen(place, uid=None)
    Path(place.path).unlink()
    Path(place.path).write_text("another's")
    assert not made.in_place()
    made.close()
    assert Path(place.path).read_text() == "another's"


@as_root
def test_a_file_that_took_the_sockets_place_is_not_given_away(place: Place) -> None:
    with closing(PortSocket.listen(place, uid=None)) as made:
        Path(place.path).unlink()
        Path(place.path).write_text("another's")
        with pytest.raises(SocketProblem, match="replaces"):
            made.give_to(NOBODY)
        assert os.stat(place.path).st_uid == 0


@as_root
def test_a_socket_that_somebody_removed_cannot_be_given_away(place: Place) -> None:
    with closing(PortSocket.listen(place, uid=None)) as made:
        Path(place.path).unlink()
        with pytest.raises(SocketProblem, match="cannot be made"):
            made.give_to(NOBODY)


@as_root
def test_a_socket_that_has_a_second_name_is_not_given_away(place: Place) -> None:
    with closing(PortSocket.listen(place, uid=None)) as made:
        os.link(place.path, f"{place.directory}/second")
        with pytest.raises(SocketProblem, match="replaces"):
            made.give_to(NOBODY)


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
def test_what_is_no_socket_is_left_alone(place: Place, kind: str) -> None:
    path, target = Path(place.path), Path(place.directory, "target")
    target.write_text("kept")
    match kind:
        case "file":
            path.write_text("kept")
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case _:
            path.symlink_to(target)
    before = path.lstat()
    assert "something is there" in refusal(place)
    assert path.lstat() == before
    assert target.read_text() == "kept"


def test_a_dead_socket_is_replaced_and_one_on_which_somebody_listens_is_not(place: Place) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as foreign:
        foreign.bind(place.path)
        foreign.listen()
        inode = os.stat(place.path).st_ino
        assert f"(pid {ME})" in refusal(place)
        assert os.stat(place.path).st_ino == inode
    with closing(PortSocket.listen(place, uid=None)) as made:
        assert made.in_place()


def test_a_directory_that_is_missing_or_behind_a_link_is_refused(place: Place) -> None:
    link = f"{place.directory}/link"
    os.symlink(place.directory, link)
    assert "symbolic link" in refusal(Place(link, "p.sock"))
    assert "there is no directory" in refusal(Place(f"{place.directory}/missing", "p.sock"))
    assert os.listdir(place.directory) == ["link"]


def test_a_directory_where_strangers_can_write_is_refused(place: Place) -> None:
    os.chmod(place.directory, 0o1777)
    assert "every user may write" in refusal(place)


@as_root
def test_a_directory_of_another_user_than_qemus_is_refused(place: Place) -> None:
    os.chown(place.directory, NOBODY, -1)
    assert f"belongs to uid {NOBODY}" in refusal(place, uid=1000)
    with closing(PortSocket.listen(place, uid=NOBODY)) as made, pytest.raises(SocketProblem):
        made.check_directory(1000)


def test_a_directory_that_is_renamed_is_still_the_one_that_was_allowed(place: Place) -> None:
    inside = Path(place.directory, "vm1")
    inside.mkdir()
    made = PortSocket.listen(Place(str(inside), "p.sock"), uid=None)
    inside.rename(Path(place.directory, "moved"))
    inside.mkdir()
    Path(inside, "p.sock").write_text("another's")
    made.close()
    assert Path(inside, "p.sock").read_text() == "another's"
    assert not Path(place.directory, "moved", "p.sock").exists()


# --- the connections


@dataclass(slots=True)
class MadeUpProcesses:
    """Every process is a QEMU that began at `start_time`, unless it is said to be another."""

    start_time: int = 7
    qemus: bool = True
    gone: bool = False

    def key_of(self, pid: int) -> ProcessKey:
        if self.gone:
            raise ProcessGone(f"pid {pid} does not exist")
        return (pid, self.start_time)

    def may_be_vm(self, pid: int) -> bool:
        return self.qemus

    def user_of(self, pid: int) -> int | None:
        return None


@dataclass(slots=True)
class Listening:
    """A listener under test; this process is the one that connects."""

    place: Place
    processes: MadeUpProcesses = field(default_factory=MadeUpProcesses)
    refused: list[str] = field(default_factory=list[str])
    wait_s: float = 60.0
    max_waiting: int = 32

    def listener(self) -> PathListener:
        return PathListener(
            self.place,
            self.processes,
            refused=lambda: self.refused.append("one"),
            report=lambda claim, problem: None,
            wait_s=self.wait_s,
            max_waiting=self.max_waiting,
        )

    def link(self, *, start_time: int = 7, right: bool = True) -> ExpectedLink:
        def verify(pid: int) -> None:
            if not right:
                raise HypervisorError("another process")

        claim = Claim(VM1, "vm1", PortName("org.vmchannel.0"), self.place.path)
        return ExpectedLink(
            claim,
            ProcessIdentity(ME, start_time, "/usr/bin/qemu", VM1, BootId("boot")),
            verify,
            patience_s=0.05,
        )

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.place.path)
        sock.setblocking(False)
        return sock


@pytest.fixture
def listening(place: Place) -> Listening:
    return Listening(place)


async def ended(sock: socket.socket) -> bool:
    """Whether the other end has closed it, in time."""
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1), 20) == b""


async def test_a_qemu_that_connects_before_it_is_known_is_served_once_it_is(listening: Listening) -> None:
    link = listening.link()
    with closing(listening.listener()) as listener:
        listener.claim(link.claim, None)
        with listening.connect() as mine:
            await until(lambda: listener.waiting == 1, "its connection")
            listener.expect(link)
            taken = await link.connect()
            mine.send(b"hello")
            assert taken.receive() == b"hello"
            taken.close()
    assert listening.refused == []


@pytest.mark.parametrize("known_first", [True, False])
@pytest.mark.parametrize("wrong", ["start time", "verify"])
async def test_a_process_that_is_not_the_instance_is_refused(
    listening: Listening, wrong: str, known_first: bool
) -> None:
    link = listening.link(start_time=8 if wrong == "start time" else 7, right=wrong != "verify")
    with closing(listening.listener()) as listener:
        listener.claim(link.claim, None)
        if known_first:
            listener.expect(link)
        with listening.connect() as mine:
            if not known_first:
                await until(lambda: listener.waiting == 1, "its connection")
                listener.expect(link)
            assert await ended(mine)
    assert listening.refused == ["one"]
    with pytest.raises(LinkError):
        await link.connect()


@pytest.mark.parametrize("why", ["no QEMU", "gone", "nobody's"])
async def test_a_connection_that_is_no_ports_is_refused(listening: Listening, why: str) -> None:
    listening.processes.qemus = why != "no QEMU"
    listening.processes.gone = why == "gone"
    listening.wait_s = 0.01
    with closing(listening.listener()) as listener:
        listener.claim(listening.link().claim, None)
        with listening.connect() as mine:
            assert await ended(mine)
        assert (listening.refused, listener.waiting) == (["one"], 0)


async def test_a_process_waits_with_one_connection_only(listening: Listening) -> None:
    with closing(listening.listener()) as listener:
        listener.claim(listening.link().claim, None)
        older = listening.connect()
        await until(lambda: listener.waiting == 1, "its connection")
        newer = listening.connect()
        assert await ended(older)
        assert (listening.refused, listener.waiting) == ([], 1)
        older.close()
        newer.close()


async def test_no_more_processes_wait_than_may(listening: Listening) -> None:
    listening.max_waiting = 0
    with closing(listening.listener()) as listener:
        listener.claim(listening.link().claim, None)
        with listening.connect() as mine:
            assert await ended(mine)
    assert listening.refused == ["one"]


@as_root
async def test_qemus_of_two_users_cannot_share_a_socket_unless_it_is_given_on(listening: Listening) -> None:
    first, other = listening.link().claim, listening.link().claim
    with closing(listening.listener()) as listener:
        listener.claim(first, None)
        listener.claim(first, NOBODY)
        assert os.stat(listening.place.path).st_uid == NOBODY
        with pytest.raises(SocketProblem, match=f"uid {NOBODY}"):
            listener.claim(other, 1000)
        os.chown(listening.place.path, 1000, -1)  # as libvirt does when it starts the domain
        listener.claim(other, 1000)


@as_root
async def test_a_socket_that_was_removed_is_made_anew_for_the_qemu_that_starts(listening: Listening) -> None:
    claim = listening.link().claim
    with closing(listening.listener()) as listener:
        listener.claim(claim, None)
        Path(listening.place.path).unlink()
        listener.claim(claim, NOBODY)
        assert listener.problem_of(claim) is None
        assert os.stat(listening.place.path).st_uid == NOBODY


async def test_the_newest_connection_of_a_port_is_the_one_that_counts(listening: Listening) -> None:
    link = listening.link()
    with closing(listening.listener()) as listener:
        listener.claim(link.claim, None)
        listener.expect(link)
        with listening.connect() as older, listening.connect() as newer:
            assert await ended(older)
            taken = await link.connect()
            newer.send(b"hello")
            assert taken.receive() == b"hello"
            taken.close()


async def test_what_nobody_takes_is_closed_when_the_port_goes(listening: Listening) -> None:
    link, other = listening.link(), listening.link()
    with closing(listening.listener()) as listener:
        for one in (link, other):
            listener.claim(one.claim, None)
        listener.expect(link)
        with listening.connect() as mine, listening.connect() as second:
            assert await ended(mine)
            listener.release(link.claim)
            assert await ended(second)
        listener.expect(other)
        with listening.connect() as third:
            taken = await other.connect()
            taken.close()
            assert await ended(third)


async def test_a_qemu_that_names_ever_new_paths_does_not_fill_the_log(
    listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    link = listening.link()
    with closing(PortListeners((), listening.processes)) as listeners:
        for number in range(100):
            path = f"/nowhere/{number}"
            mine = listeners.expect(path, link.identity, "vm1", link.claim.port, link.verify)
            assert [one.claim.path for one in listeners.troubles()] == [path]
            listeners.release(mine)
        assert listeners.troubles() == ()
    assert 1 <= len(caplog.records) < 100
