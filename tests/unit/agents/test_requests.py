# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent makes of the host's answers: a claim with proof, or an error with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fence_vmchannel.messages import (
    FenceAction,
    FenceAnswer,
    FenceCode,
    FenceRequest,
    FenceTarget,
    PowerState,
)
from tests.fakes.fence_line import Behaviour, FakeHost, VirtualTime, done, failed
from vmchannel_agents.outcome import AgentError, reason_line
from vmchannel_agents.requests import Requests, outlets_of


def requests_of(host: FakeHost) -> Requests:
    return Requests(
        socket="", port="", timeout_s=40, patient=False, reach=host, clock=host.time, sleep=host.time.sleep
    )


def host_that(behaviour: Behaviour) -> FakeHost:
    return FakeHost(VirtualTime(), behaviour)


@pytest.mark.parametrize("action", ["off", "on", "reboot"])
def test_a_proven_action_is_done_with_operation_and_host(action: str) -> None:
    result = requests_of(FakeHost(VirtualTime())).carry_out(action, "vm2")
    assert (result.op, result.host, result.already) == ("op-1", "hv1", False)


def test_one_plug_has_one_id_for_the_whole_process() -> None:
    host = FakeHost(VirtualTime())
    requests = requests_of(host)
    for plug in ("vm2", "vm3", "vm2"):
        requests.carry_out("off", plug)
    first, other, again = (request.request_id for request in host.requests)
    assert first == again != other


@pytest.mark.parametrize("code", list(FenceCode), ids=lambda code: code.name)
def test_a_failure_of_any_code_is_an_error_with_its_reason(code: FenceCode) -> None:
    requests = requests_of(host_that(lambda request: [failed(request, code, "the reason")]))
    with pytest.raises(AgentError, match=r"vm2: .*the reason"):
        requests.carry_out("off", "vm2")


@pytest.mark.parametrize("state", [PowerState.ON, PowerState.UNKNOWN])
def test_an_off_that_is_not_off_is_an_error(state: PowerState) -> None:
    requests = requests_of(host_that(lambda request: [replace(done(request), state=state)]))
    with pytest.raises(AgentError, match="claims success without the state"):
        requests.carry_out("off", "vm2")


@pytest.mark.parametrize(("state", "word"), [(PowerState.ON, "on"), (PowerState.OFF, "off")])
def test_status_is_the_hosts_word(state: PowerState, word: str) -> None:
    requests = requests_of(host_that(lambda request: [replace(done(request), state=state)]))
    assert requests.status("vm2") == word


@pytest.mark.parametrize("code", [FenceCode.UNKNOWN_PLUG, FenceCode.REFUSED, FenceCode.FAILED])
def test_the_status_of_what_the_host_does_not_know_is_an_error_and_never_off(code: FenceCode) -> None:
    def answer(request: FenceRequest) -> list[FenceAnswer]:
        return [replace(failed(request, code), state=PowerState.OFF)]

    with pytest.raises(AgentError):
        requests_of(host_that(answer)).status("vm2")


def test_an_unknown_state_is_an_error() -> None:
    requests = requests_of(host_that(lambda request: [replace(done(request), state=PowerState.UNKNOWN)]))
    with pytest.raises(AgentError):
        requests.status("vm2")


def test_monitor_fails_when_the_host_cannot_act() -> None:
    requests = requests_of(
        host_that(lambda request: [failed(request, FenceCode.FAILED, "the journal cannot be written")])
    )
    with pytest.raises(AgentError, match="journal"):
        requests.monitor()


def test_monitor_fails_without_a_permitted_plug() -> None:
    with pytest.raises(AgentError, match="fence nothing"):
        requests_of(FakeHost(VirtualTime())).monitor()


def test_monitor_passes_with_a_permitted_plug() -> None:
    def answer(request: FenceRequest) -> list[FenceAnswer]:
        return [replace(done(request), targets=(FenceTarget("vm2", "u2", PowerState.UNKNOWN),))]

    requests_of(host_that(answer)).monitor()


def test_all_requests_of_a_process_share_one_deadline() -> None:
    host = host_that(lambda _: [])
    requests = requests_of(host)
    for plug in ("vm2", "vm3"):
        with pytest.raises(AgentError):
            requests.carry_out("off", plug)
    assert abs(host.time.now - 1040) < 0.001


def target(name: str, *aliases: str, state: PowerState = PowerState.ON) -> FenceTarget:
    return FenceTarget(name, f"uuid-of-{name}", state, aliases)


def test_a_vm_is_listed_under_its_name_and_under_each_alias() -> None:
    assert outlets_of((target("vm2", "node2", "old2"),), ",") == {
        "vm2": ("node2", "ON"),
        "node2": ("vm2", "ON"),
        "old2": ("vm2", "ON"),
    }


def test_a_vm_without_an_alias_has_one_line() -> None:
    assert outlets_of((target("vm2", state=PowerState.OFF),), ",") == {"vm2": ("", "OFF")}


def test_an_alias_that_is_the_name_itself_gives_no_second_line() -> None:
    assert outlets_of((target("vm2", "vm2"),), ",") == {"vm2": ("", "ON")}


def test_an_unknown_state_is_unknown_and_not_off() -> None:
    assert outlets_of((target("vm2", state=PowerState.UNKNOWN),), ",") == {"vm2": ("", None)}


def test_a_name_of_two_vms_has_an_unknown_state() -> None:
    outlets = outlets_of((target("node1", "node2"), target("vm1", "node1", state=PowerState.OFF)), ",")
    assert outlets["node1"] == ("node2", None)
    assert outlets["vm1"] == ("node1", "OFF")


@pytest.mark.parametrize("name", ["a,b", "two\nlines", "", "\x1b[2J", "vm\u2028x"])
def test_a_name_that_would_break_the_list_is_left_out_with_a_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert outlets_of((target(name, "node2"),), ",") == {"node2": ("", "ON")}
    assert "left out" in caplog.text


def test_another_separator_makes_room_for_commas() -> None:
    assert outlets_of((target("a,b"),), ";") == {"a,b": ("", "ON")}


def test_a_reason_is_one_line_with_operation_and_host() -> None:
    assert reason_line("no\nway", "op-1", "hv1") == "no\\nway op=op-1 host=hv1"
    assert reason_line("no way") == "no way op=- host=-"


def test_every_destructive_action_has_a_request() -> None:
    for action in FenceAction:
        if action.destructive:
            assert requests_of(FakeHost(VirtualTime())).carry_out(action.name.lower(), "vm2").op
