# SPDX-License-Identifier: LGPL-2.1-or-later
"""The man pages name every command, option, path and key that there is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from vmchannel_host.admin.handlers import AdminHandlers, AdminLimits
from vmchannel_host.admin.metrics import Metrics
from vmchannel_host.admin.view import AdminView
from vmchannel_host.cli.console import ExitCode
from vmchannel_host.cli.main import parser
from vmchannel_host.config.schema import HOST_SCHEMA

MAN = Path(__file__).parents[3] / "docs/man"


def page(name: str) -> str:
    """A page's text without the marks of roff."""
    text = (MAN / name).read_text()
    for mark in ("\\fI", "\\fR", "\\fB"):
        text = text.replace(mark, "")
    return text.replace("\\-", "-").replace("\\(dq", '"')


def commands() -> Mapping[str, argparse.ArgumentParser]:
    """The tool's commands."""
    actions = parser()._actions  # pyright: ignore[reportPrivateUsage]  # argparse has no public list
    [subparsers] = [action for action in actions if isinstance(action.choices, dict)]
    return cast("Mapping[str, argparse.ArgumentParser]", subparsers.choices)


def test_vmchannelctl_names_every_command_and_option() -> None:
    text = page("vmchannelctl.8")
    for name, command in commands().items():
        assert f"\n.B {name}\n" in text or f"\n.BR {name} " in text, name
        for action in command._actions:  # pyright: ignore[reportPrivateUsage]
            for option in action.option_strings:
                assert option == "-h" or option in text, (name, option)


def test_vmchannelctl_names_every_exit_code() -> None:
    text = page("vmchannelctl.8").split(".SH EXIT STATUS")[1]
    for code in ExitCode:
        assert f"\n.B {code.value}\n" in text


def test_vmchanneld_names_every_path_of_the_admin_api() -> None:
    handlers = AdminHandlers(cast("AdminView", _NoView()), Metrics(), AdminLimits())
    text = page("vmchanneld.8")
    for route in handlers.routes():
        assert route.path.replace("{operation}", "ID") in text, route.path


class _NoView:
    """Has every method and calls none."""

    def __getattr__(self, name: str) -> object:
        return lambda: name


def keys(schema: Mapping[str, Any]) -> Iterator[str]:
    """Every key that the schema knows, at any depth."""
    for key, inner in schema.get("properties", {}).items():
        yield key
        yield from keys(inner)
    for branch in ("additionalProperties", "items", "then"):
        if isinstance(schema.get(branch), dict):
            yield from keys(schema[branch])
    for branch in schema.get("allOf", ()):
        yield from keys(branch)


LATER = {"hosts", "host_fencing"}
"""Keys of several hosts: known to the schema, refused by this version."""


@pytest.mark.parametrize("key", sorted(set(keys(HOST_SCHEMA)) - LATER))
def test_host_yaml_names_every_key(key: str) -> None:
    text = page("vmchannel-host.yaml.5")
    marked = [word for line in text.splitlines() if line.startswith((".B", ".SS")) for word in line.split()]
    assert key in marked
