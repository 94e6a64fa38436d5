# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the daemon may make a socket, whatever a command line or a definition says."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.port_sockets.listeners import default_directories
from vmchannel_host.port_sockets.places import MAX_PATH, Place, SocketProblem, find_place

DIRECTORIES = ("/run/vms/*", "/run/vmchannel/connect/")


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/run/vms/vm1/p.sock", Place("/run/vms/vm1", "p.sock")),
        ("/run/vms//vm1/./p.sock", Place("/run/vms/vm1", "p.sock")),
        ("/run/vms/x/../vm1/p.sock", Place("/run/vms/vm1", "p.sock")),
        ("/run/vmchannel/connect/p", Place("/run/vmchannel/connect", "p")),
    ],
)
def test_an_allowed_path_is_one_name_in_an_allowed_directory(path: str, place: Place) -> None:
    assert find_place(path, DIRECTORIES) == place


@pytest.mark.parametrize(
    "path",
    [
        "/etc/p.sock",
        "/run/vms/p.sock",
        "/run/vms/vm1/deeper/p.sock",
        "/run/vms/vm1/../../../etc/p.sock",
        "/run/vmchannel/connect",
    ],
)
def test_any_other_directory_is_refused_with_the_key_that_allows_it(path: str) -> None:
    with pytest.raises(SocketProblem, match=r"ports\.listen_in") as refused:
        find_place(path, DIRECTORIES)
    assert "ports.listen_in" in refused.value.remedy


@pytest.mark.parametrize("path", ["", "/", "p.sock", "/run/vms/vm1/", "/run/vms/vm1/\0", "//run/vms/vm1/p"])
def test_what_is_no_absolute_path_of_a_file_is_refused(path: str) -> None:
    with pytest.raises(SocketProblem):
        find_place(path, DIRECTORIES)


def test_a_path_that_no_socket_can_have_is_refused() -> None:
    longest = "/run/vms/vm1/" + "x" * (MAX_PATH - len("/run/vms/vm1/"))
    assert find_place(longest, DIRECTORIES).path == longest
    with pytest.raises(SocketProblem, match="1 bytes"):
        find_place(longest + "x", DIRECTORIES)


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(SocketProblem, match="no file"):
        find_place("/run/vms/vm1/\ud800", DIRECTORIES)
    assert find_place("/run/vms/vm1/\udcff", DIRECTORIES).name == "\udcff"  # a byte that is no UTF-8


@given(st.lists(st.sampled_from(["..", ".", "", "a", "vms", "run", "*"]), max_size=8).map("/".join))
def test_no_spelling_leads_out_of_the_allowed_directories(rest: str) -> None:
    try:
        place = find_place(f"/run/vms/{rest}", ("/run/vms/*",))
    except SocketProblem:
        return
    assert posixpath.dirname(place.directory) == "/run/vms"
    assert "/" not in place.name
    assert place.name not in ("", ".", "..")


def test_sockets_may_be_beside_monitors_in_libvirts_directories_and_in_our_own() -> None:
    monitors = ["/run/vms/*/qmp.sock", "/run/vm.sock", "/vm.sock"]
    found = default_directories("/run/vmchannel", monitors, ["/var/lib/ch"])
    assert found == ("/run/vmchannel/connect", "/run/vms/*", "/var/lib/ch")
