# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which chardevs of a command line connect to a unix socket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmchannel_host.hypervisors.chardev_words import Connecting, parse_connecting
from vmchannel_host.hypervisors.cmdline import parse_command_line


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("socket,id=c,path=/run/c.sock", Connecting("c", "/run/c.sock", reconnects=False)),
        ("socket,id=c,path=/run/c.sock,server=off,reconnect=1", Connecting("c", "/run/c.sock")),
        ("socket,path=c.sock,id=c,reconnect-ms=500", Connecting("c", "c.sock")),
        ("backend=socket,id=c,path=/c,reconnect=0", Connecting("c", "/c", reconnects=False)),
        ("socket,id=a,,b,path=/run/a,,b,reconnect=1", Connecting("a,b", "/run/a,b")),
        ("socket,id=c,path=/c,noserver,reconnect=5", Connecting("c", "/c")),
        ("socket,id=c,path=/c,server=on,wait=off", None),
        ("socket,id=c,path=/c,server,nowait", None),
        ("socket,id=c,path=c,abstract=on,reconnect=1", None),
        ("socket,id=c,host=127.0.0.1,port=1,reconnect=1", None),
        ("socket,id=c,fd=7", None),
        ("file,id=c,path=/c", None),
        ("", None),
        ("{", None),
        ("{}", None),
    ],
)
def test_a_chardev_connects_where_it_is_no_server(value: str, found: Connecting | None) -> None:
    assert parse_connecting([value]) == (() if found is None else (found,))


JSON = (
    '{"id": "c", "backend": {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": "/c"}}%s}}}'
)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (', "server": false, "reconnect": 1', (Connecting("c", "/c"),)),
        (', "server": false', (Connecting("c", "/c", reconnects=False),)),
        (', "server": true', ()),
        ("", ()),
    ],
)
def test_a_chardev_may_be_written_as_json(more: str, found: tuple[Connecting, ...]) -> None:
    assert parse_connecting([JSON % more]) == found


@given(st.lists(st.text(max_size=60) | st.builds("socket,{},{}".format, st.text(), st.text()), max_size=3))
def test_any_text_is_a_chardev_or_none(values: list[str]) -> None:
    assert all(one.path for one in parse_connecting(values))


def test_a_command_line_tells_its_chardevs_that_connect() -> None:
    line = ("qemu", "-chardev", "socket,id=a,path=/a,reconnect=1", "-chardev", "pty,id=b")
    assert parse_command_line("\0".join(line).encode()).connecting == (Connecting("a", "/a"),)
