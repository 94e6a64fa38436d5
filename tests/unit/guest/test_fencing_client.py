# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fencing client: one id, the host's own answer or none, never late, always with a reason."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, product

import pytest

from fence_vmchannel.errors import (
    ChannelClosed,
    CloseCode,
    DeadlineExceeded,
    HubUnreachable,
    LinkError,
    LocalProtocolError,
    PortBusy,
    PortNotFound,
    ServiceRefused,
)
from fence_vmchannel.messages import (
    AnnounceAnswer,
    FenceAction,
    FenceAnswer,
    FenceCode,
    FenceProgress,
    FenceRequest,
    PowerState,
)
from tests.fakes.fence_line import GREETING, FakeHost, Trouble, VirtualTime, done, failed
from vmchannel_guest.fencing import (
    PATIENCE_S,
    FencingClient,
    HostUnreachable,
    NoAnswer,
    NotPermitted,
    succeeded,
)

TIMEOUT_S = 40.0


def client_of(host: FakeHost, *, patience_s: float = PATIENCE_S) -> FencingClient:
    numbers = count(1)
    return FencingClient(
        host,
        patience_s=patience_s,
        clock=host.time,
        sleep=host.time.sleep,
        random_bytes=lambda size: next(numbers).to_bytes(size, "big"),
    )


def ask_off(host: FakeHost, *, patience_s: float = PATIENCE_S) -> FenceAnswer:
    with client_of(host, patience_s=patience_s) as client:
        return client.ask(FenceAction.OFF, "vm2", deadline=host.time.now + TIMEOUT_S)


def test_the_hosts_answer_is_returned_and_the_line_closed() -> None:
    host = FakeHost(VirtualTime())
    answer = ask_off(host)
    assert (answer.ok, answer.state, answer.operation) == (True, PowerState.OFF, "op-1")
    assert (host.opened, host.closed) == (1, 1)


def test_a_request_states_its_time_against_the_hosts_tick() -> None:
    host = FakeHost(VirtualTime())
    ask_off(host)
    request = host.requests[0]
    assert (request.boot_id, request.tick_ms) == (GREETING.boot_id, GREETING.tick_ms)


def test_the_host_must_answer_before_the_client_gives_up() -> None:
    host = FakeHost(VirtualTime())
    host.troubles.append(Trouble(LinkError("not yet"), takes_s=5))
    ask_off(host)
    used_ms = (host.time.now - 1000) * 1000
    assert abs(used_ms + host.requests[0].within_ms - (TIMEOUT_S - 2) * 1000) <= 2


def test_a_request_that_is_asked_again_keeps_its_end() -> None:
    def lose(_: FenceRequest) -> list[Exception]:
        host.time.sleep(7)
        return [LinkError("the hub has gone")]

    host = FakeHost(VirtualTime(), lose, lambda request: [done(request)])
    ask_off(host)
    first, second = host.requests
    assert abs(first.within_ms - second.within_ms - 7100) <= 2


@pytest.mark.parametrize(
    "loss",
    [
        LinkError("the port was unplugged"),
        HubUnreachable("the hub has gone"),
        ChannelClosed(CloseCode.SESSION_RESET, "another boot"),
        ChannelClosed(CloseCode.MOVED, ""),
        ChannelClosed(CloseCode.SHUTDOWN, "the hub stops"),
        ChannelClosed(CloseCode.INTERNAL, ""),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
    ids=lambda error: f"{type(error).__name__} {getattr(error, 'code', '')!s}",
)
def test_a_lost_line_is_opened_anew_and_asked_with_the_same_id(loss: Exception) -> None:
    host = FakeHost(VirtualTime(), lambda _: [loss], lambda request: [done(request)])
    assert ask_off(host).ok
    assert len(host.requests) == 2
    assert len({request.request_id for request in host.requests}) == 1
    assert host.opened == host.closed == 2


def test_a_stale_request_is_asked_anew_with_a_fresh_greeting_and_the_same_id() -> None:
    host = FakeHost(
        VirtualTime(), lambda request: [failed(request, FenceCode.STALE)], lambda request: [done(request)]
    )
    assert ask_off(host).ok
    assert host.opened == 2
    assert len({request.request_id for request in host.requests}) == 1


def test_a_host_that_always_says_stale_is_no_answer() -> None:
    host = FakeHost(VirtualTime(), lambda request: [failed(request, FenceCode.STALE, "tick of another boot")])
    with pytest.raises(NoAnswer, match="tick of another boot"):
        ask_off(host)
    assert host.time.now <= 1000 + TIMEOUT_S


def test_an_answer_to_another_request_is_ignored() -> None:
    host = FakeHost(VirtualTime(), lambda request: [replace(done(request), request_id=bytes(16))])
    with pytest.raises(NoAnswer):
        ask_off(host)


def test_an_answer_to_another_requester_is_ignored() -> None:
    host = FakeHost(VirtualTime(), lambda request: [replace(done(request), requester="another VM")])
    with pytest.raises(NoAnswer):
        ask_off(host)


def test_an_answer_that_cannot_be_parsed_is_none() -> None:
    host = FakeHost(VirtualTime(), lambda _: [b"\0\3garbage"])
    with pytest.raises(NoAnswer, match="outcome is unknown"):
        ask_off(host)


def test_a_greeting_that_cannot_be_parsed_is_no_greeting() -> None:
    host = FakeHost(VirtualTime(), greeting=b"garbage")
    with pytest.raises(HostUnreachable):
        ask_off(host)
    assert not host.requests
    assert host.opened == host.closed


def test_a_channel_that_closes_without_an_answer_is_asked_again() -> None:
    host = FakeHost(
        VirtualTime(), lambda _: [ChannelClosed(CloseCode.NORMAL)], lambda request: [done(request)]
    )
    assert ask_off(host).ok


def test_a_silent_host_ends_in_no_answer_at_the_deadline_and_is_told() -> None:
    host = FakeHost(VirtualTime(), lambda _: [])
    with pytest.raises(NoAnswer, match="outcome is unknown") as caught:
        ask_off(host)
    assert abs(host.time.now - (1000 + TIMEOUT_S)) < 0.001
    assert host.cancelled == [host.requests[0].request_id]
    assert caught.value.host == "hv1"


def test_an_operation_that_was_begun_is_named_when_no_answer_comes() -> None:
    def begin(request: FenceRequest) -> list[FenceProgress]:
        return [FenceProgress(request.request_id, "op-7", "quit sent", 12)]

    host = FakeHost(VirtualTime(), begin)
    with pytest.raises(NoAnswer) as caught:
        ask_off(host)
    assert caught.value.operation == "op-7"


def test_progress_of_this_request_is_handed_on() -> None:
    def progress(request: FenceRequest) -> list[FenceProgress | FenceAnswer]:
        other = FenceProgress(bytes(16), "op-9", "not ours", 1)
        return [other, FenceProgress(request.request_id, "op-1", "quit sent", 12), done(request)]

    seen: list[str] = []
    host = FakeHost(VirtualTime(), progress)
    client_of(host).ask(FenceAction.OFF, "vm2", deadline=1040, progress=lambda one: seen.append(one.text))
    assert seen == ["quit sent"]


def test_a_refused_node_name_does_not_stop_the_request() -> None:
    host = FakeHost(VirtualTime(), lambda request: [AnnounceAnswer(False, "vm3 has it"), done(request)])
    assert ask_off(host).ok


@pytest.mark.parametrize(
    "missing",
    [
        HubUnreachable("no hub answers"),
        PortNotFound("this machine has no port"),
        PortBusy("port org.vmchannel.0 is held by pid 42 (cat)"),
        LinkError("cannot open /dev/vport0p1: Permission denied"),
        ServiceRefused(CloseCode.PEER_GONE, "no port of that name"),
        ServiceRefused(CloseCode.UNKNOWN_SERVICE, "nobody offers it"),
        ServiceRefused(CloseCode.LIMIT, "too many"),
    ],
    ids=lambda error: f"{type(error).__name__} {getattr(error, 'code', '')!s}",
)
def test_a_missing_way_is_waited_for_some_time_then_named(missing: Exception) -> None:
    host = FakeHost(VirtualTime())
    host.troubles.extend(Trouble(missing) for _ in range(100))
    with pytest.raises(HostUnreachable) as caught:
        ask_off(host)
    assert str(missing) in caught.value.reason
    assert PATIENCE_S <= host.time.now - 1000 <= PATIENCE_S + 1


def test_a_patient_client_waits_until_the_hub_has_started() -> None:
    host = FakeHost(VirtualTime())
    host.troubles.extend(Trouble(HubUnreachable("no hub answers")) for _ in range(30))
    assert ask_off(host, patience_s=TIMEOUT_S).ok
    assert host.time.now - 1000 > PATIENCE_S


def test_a_host_that_does_not_accept_is_waited_for_until_the_deadline() -> None:
    host = FakeHost(VirtualTime())
    host.troubles.extend(
        Trouble(DeadlineExceeded("the hub has no session with the host"), 12) for _ in "1234"
    )
    with pytest.raises(HostUnreachable, match="no session"):
        ask_off(host)
    assert host.time.now >= 1000 + TIMEOUT_S


def test_once_asked_the_way_back_is_waited_for_until_the_deadline() -> None:
    def lose(_: FenceRequest) -> list[Exception]:
        host.troubles.extend(Trouble(HubUnreachable("no hub answers")) for _ in range(25))
        return [LinkError("the hub has gone")]

    host = FakeHost(VirtualTime(), lose, lambda request: [done(request)])
    assert ask_off(host).ok
    assert host.time.now - 1000 > PATIENCE_S


def test_a_user_who_may_not_fence_is_told_at_once() -> None:
    host = FakeHost(VirtualTime())
    host.troubles.append(Trouble(ServiceRefused(CloseCode.NOT_PERMITTED, "uid 1000 may not open it")))
    with pytest.raises(NotPermitted, match="uid 1000"):
        ask_off(host)
    assert host.time.now == 1000


@pytest.mark.parametrize("plug", ["x" * 257, "vm\udcff"], ids=["too long", "not UTF-8"])
def test_a_plug_that_no_vm_can_have_is_never_sent(plug: str) -> None:
    host = FakeHost(VirtualTime())
    with pytest.raises(LocalProtocolError):
        client_of(host).ask(FenceAction.OFF, plug, deadline=1040)
    assert not host.requests


def test_a_host_that_cannot_act_now_is_asked_again_for_a_while_then_believed() -> None:
    host = FakeHost(VirtualTime(), lambda request: [failed(request, FenceCode.UNAVAILABLE, "it stops")])
    answer = ask_off(host)
    assert (answer.ok, answer.reason) == (False, "it stops")
    assert len({request.request_id for request in host.requests}) == 1
    assert PATIENCE_S <= host.time.now - 1000 <= PATIENCE_S + 1


@pytest.mark.parametrize(
    "code", sorted(set(FenceCode) - {FenceCode.STALE, FenceCode.UNAVAILABLE}), ids=lambda code: code.name
)
def test_any_other_failure_is_returned_as_it_is_and_not_asked_again(code: FenceCode) -> None:
    host = FakeHost(VirtualTime(), lambda request: [failed(request, code)])
    answer = ask_off(host)
    assert (answer.ok, answer.code, len(host.requests)) == (False, code, 1)


def test_requests_share_a_line_and_have_their_own_ids() -> None:
    host = FakeHost(VirtualTime())
    with client_of(host) as client:
        for plug in ("vm2", "vm3"):
            client.ask(FenceAction.STATUS, plug, deadline=1040)
    assert host.opened == 1
    assert len({request.request_id for request in host.requests}) == 2


def test_no_time_at_all_is_a_failure_without_a_request() -> None:
    host = FakeHost(VirtualTime())
    with pytest.raises(HostUnreachable):
        client_of(host).ask(FenceAction.OFF, "vm2", deadline=host.time.now)
    assert not host.requests


CLAIMS = {
    (FenceAction.OFF, PowerState.OFF),
    (FenceAction.ON, PowerState.ON),
    (FenceAction.REBOOT, PowerState.ON),
    (FenceAction.STATUS, PowerState.ON),
    (FenceAction.STATUS, PowerState.OFF),
    *product((FenceAction.LIST, FenceAction.MONITOR), PowerState),
}


@pytest.mark.parametrize(("action", "state", "ok"), list(product(FenceAction, PowerState, (True, False))))
def test_success_needs_ok_and_the_state_that_was_asked_for(
    action: FenceAction, state: PowerState, ok: bool
) -> None:
    request = FenceRequest(bytes(16), action, "vm2", "boot", 1, 1)
    answer = replace(done(request), ok=ok, state=state)
    assert succeeded(action, answer) is (ok and (action, state) in CLAIMS)


@pytest.mark.parametrize("ok", [True, False])
def test_a_reboot_that_proved_off_but_did_not_start_is_a_success_only_when_the_host_says_so(ok: bool) -> None:
    request = FenceRequest(bytes(16), FenceAction.REBOOT, "vm2", "boot", 1, 1)
    answer = replace(done(request), ok=ok, code=FenceCode.NOT_STARTED, state=PowerState.OFF)
    assert succeeded(FenceAction.REBOOT, answer) is ok
    assert not succeeded(FenceAction.ON, answer)
