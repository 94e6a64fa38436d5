# SPDX-License-Identifier: GPL-2.0-or-later
"""Every action of the agent, by stdin, short and long options, against a host on a real hub."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceCode, PowerState
from tests.fakes.fence_service import PaperVm, refused
from tests.integration.agents.agent_rig import Agent, Ran, Site

WAYS = ("stdin", "short", "long")


async def act(agent: Agent, way: str, action: str, plug: str = "", **more: str) -> Ran:
    """Run an action by one of the three ways of input."""
    if way == "stdin":
        given = {"action": action, "plug": plug, **more}
        return await agent.lines(*(f"{key}={value}" for key, value in given.items() if value))
    options = [f"--{key.replace('_', '-')}={value}" for key, value in more.items()]
    if way == "short":
        return await agent.options("-o", action, *(["-n", plug] if plug else []), *options)
    return await agent.options(f"--action={action}", *([f"--plug={plug}"] if plug else []), *options)


def asked(place: Site) -> list[tuple[FenceAction, str]]:
    return [(request.action, request.plug) for request in place.service.requests]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("action", "before", "said", "after"),
    [
        ("off", PowerState.ON, "Success: Powered OFF", PowerState.OFF),
        ("off", PowerState.OFF, "Success: Already OFF", PowerState.OFF),
        ("on", PowerState.OFF, "Success: Powered ON", PowerState.ON),
        ("on", PowerState.ON, "Success: Already ON", PowerState.ON),
        ("reboot", PowerState.ON, "Success: Rebooted", PowerState.ON),
        ("reboot", PowerState.OFF, "Success: Rebooted", PowerState.ON),
    ],
)
async def test_an_action_is_one_request_whatever_the_state_was(
    place: Site, way: str, action: str, before: PowerState, said: str, after: PowerState
) -> None:
    vm = PaperVm("vm2", before)
    place.service.vms = [vm]
    ran = await act(place.agent, way, action, "vm2")
    assert (ran.code, ran.out) == (0, f"{said}\n"), ran.err
    assert vm.state is after
    assert asked(place) == [(FenceAction[action.upper()], "vm2")]
    assert re.search(r"vm2: .+ op=op-1 host=hv1$", ran.reason), ran.err


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("state", "code", "said"), [(PowerState.ON, 0, "Status: ON\n"), (PowerState.OFF, 2, "Status: OFF\n")]
)
async def test_status_tells_by_its_exit_code(
    place: Site, way: str, state: PowerState, code: int, said: str
) -> None:
    place.service.vms = [PaperVm("vm2", state)]
    ran = await act(place.agent, way, "status", "vm2")
    assert (ran.code, ran.out) == (code, said), ran.err


@pytest.mark.parametrize("way", WAYS)
async def test_list_prints_each_name_and_alias(place: Site, way: str) -> None:
    place.service.vms = [PaperVm("vm2", aliases=("node2",)), PaperVm("vm3", PowerState.OFF)]
    ran = await act(place.agent, way, "list")
    assert (ran.code, ran.out) == (0, "vm2,node2\nnode2,vm2\nvm3,\n"), ran.err


@pytest.mark.parametrize("way", WAYS)
async def test_list_status_adds_the_states(place: Site, way: str) -> None:
    place.service.vms = [
        PaperVm("vm2", aliases=("node2",)),
        PaperVm("vm3", PowerState.OFF),
        PaperVm("vm4", PowerState.UNKNOWN),
    ]
    ran = await act(place.agent, way, "list-status", separator=";")
    assert ran.code == 0, ran.err
    assert ran.out == "vm2;node2;ON\nnode2;vm2;ON\nvm3;;OFF\nvm4;;UNKNOWN\n"


@pytest.mark.parametrize("way", WAYS)
async def test_monitor_asks_whether_fencing_would_work(place: Site, way: str) -> None:
    place.service.vms = [PaperVm("vm2")]
    ran = await act(place.agent, way, "monitor")
    assert (ran.code, ran.out) == (0, ""), ran.err
    assert (FenceAction.MONITOR, "") in asked(place)


async def test_monitor_fails_when_nothing_may_be_fenced(place: Site) -> None:
    ran = await place.agent.lines("action=monitor")
    assert ran.code == 1
    assert "fence nothing" in ran.reason


async def test_no_input_means_reboot_and_that_needs_a_plug(place: Site) -> None:
    ran = await place.agent.lines()
    assert ran.code == 1
    assert ran.reason.endswith("op=- host=-")
    assert "plug" in ran.reason
    assert not place.service.requests


@pytest.mark.parametrize("action", ["off", "on", "reboot", "status"])
@pytest.mark.parametrize(
    ("plug", "reason"), [("vm9", "no VM is called 'vm9'"), ("vm3", "the group web does not allow it")]
)
async def test_an_unknown_or_forbidden_vm_is_an_error_with_its_reason_and_never_off(
    place: Site, action: str, plug: str, reason: str
) -> None:
    place.service.vms = [PaperVm("vm3", PowerState.OFF, refusal=refused("the group web does not allow it"))]
    ran = await act(place.agent, "stdin", action, plug)
    assert (ran.code, ran.out) == (1, "")
    assert reason in ran.reason
    assert ran.reason.endswith("op=- host=hv1")


async def test_the_operation_that_failed_is_named(place: Site) -> None:
    place.service.vms = [PaperVm("vm2", refusal=refused("it did not end", FenceCode.FAILED, "op-42"))]
    ran = await act(place.agent, "stdin", "off", "vm2")
    assert ran.code == 1
    assert ran.reason.endswith("vm2: it did not end op=op-42 host=hv1")


async def test_the_evidence_is_told(place: Site) -> None:
    place.service.vms = [PaperVm("vm2")]
    ran = await act(place.agent, "stdin", "off", "vm2")
    assert "pid 7 has ended (pidfd)" in ran.err


async def test_several_plugs_are_one_request_each(place: Site) -> None:
    place.service.vms = [PaperVm("vm2"), PaperVm("vm3")]
    ran = await act(place.agent, "long", "off", "vm2,vm3,vm2")
    assert (ran.code, ran.out) == (0, "Success: Powered OFF\n"), ran.err
    assert asked(place) == [(FenceAction.OFF, "vm2"), (FenceAction.OFF, "vm3")]
    assert len({request.request_id for request in place.service.requests}) == 2


async def test_one_failing_plug_fails_all_but_the_others_are_still_fenced(place: Site) -> None:
    place.service.vms = [PaperVm("vm2"), PaperVm("vm3")]
    ran = await act(place.agent, "long", "off", "vm2,vm9,vm3")
    assert (ran.code, ran.out) == (1, "")
    assert "vm9: no VM" in ran.reason
    assert [vm.state for vm in place.service.vms] == [PowerState.OFF, PowerState.OFF]


@pytest.mark.parametrize(
    ("second", "code", "said"), [(PowerState.ON, 0, "Status: ON\n"), (PowerState.OFF, 2, "Status: OFF\n")]
)
async def test_several_plugs_are_on_if_any_is_not_off(
    place: Site, second: PowerState, code: int, said: str
) -> None:
    place.service.vms = [PaperVm("vm2", PowerState.OFF), PaperVm("vm3", second)]
    ran = await act(place.agent, "stdin", "status", "vm2,vm3")
    assert (ran.code, ran.out) == (code, said), ran.err


async def test_the_status_of_several_plugs_is_an_error_if_one_is_unknown(place: Site) -> None:
    place.service.vms = [PaperVm("vm2", PowerState.OFF)]
    ran = await act(place.agent, "stdin", "status", "vm2,vm9")
    assert (ran.code, ran.out) == (1, "")


async def test_a_name_with_a_comma_needs_another_plug_separator(place: Site) -> None:
    place.service.vms = [PaperVm("a,b")]
    ran = await act(place.agent, "stdin", "off", "a,b", plug_separator=";")
    assert ran.code == 0, ran.err
    assert asked(place) == [(FenceAction.OFF, "a,b")]


async def test_port_is_another_word_for_plug_and_nodename_is_ignored(place: Site) -> None:
    place.service.vms = [PaperVm("vm2")]
    ran = await place.agent.lines("# from Pacemaker", "", "action=off", "nodename=vm9", "port=vm2")
    assert ran.code == 0, ran.err
    assert asked(place) == [(FenceAction.OFF, "vm2")]
    assert "nodename" not in ran.err


async def test_an_unknown_option_is_a_warning(place: Site) -> None:
    place.service.vms = [PaperVm("vm2")]
    ran = await place.agent.lines("action=off", "plug=vm2", "colour=blue")
    assert ran.code == 0
    assert "Ignoring unknown option 'colour=blue'" in ran.err


async def test_quiet_leaves_stderr_empty(place: Site) -> None:
    ran = await place.agent.options("-o", "off", "-n", "vm9", "-q")
    assert (ran.code, ran.out, ran.err) == (1, "", "")


async def test_a_vm_that_does_not_come_up_again_is_fenced_all_the_same(place: Site) -> None:
    answer = refused("off is proven, but it was not started", FenceCode.NOT_STARTED, "op-3")
    place.service.vms = [PaperVm("vm2", refusal=_ok(answer))]
    ran = await act(place.agent, "stdin", "reboot", "vm2")
    assert (ran.code, ran.out) == (0, "Success: Rebooted\n")
    assert "not started op=op-3" in ran.reason
    ran = await act(place.agent, "stdin", "on", "vm2")
    assert ran.code == 1


async def test_a_contradictory_claim_is_a_failure(place: Site) -> None:
    place.service.vms = [PaperVm("vm2", refusal=_ok(refused("off")))]
    ran = await act(place.agent, "stdin", "off", "vm2")
    assert (ran.code, ran.out) == (1, "")


def _ok(answer: FenceAnswer) -> FenceAnswer:
    return replace(answer, ok=True)
