# SPDX-License-Identifier: LGPL-2.1-or-later
"""`host.yaml`: what it means, and what is said of one that is wrong (S10)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fence_vmchannel.messages import FenceAction
from tests.unit.host.registry_builders import VM1
from vmchannel_host.config.loading import (
    AfterKill,
    BusKind,
    ConfigError,
    EvidenceRule,
    Group,
    HostConfig,
    LogLevel,
    MinorityRule,
    PortLimits,
    check_config,
    load_config,
)
from vmchannel_host.config.model import WIDEST, ClusterConfig, LimitsConfig
from vmchannel_host.config.scalars import parse_count, parse_duration, parse_size
from vmchannel_host.config.schema import HOST_SCHEMA
from vmchannel_host.config.yaml_text import MAX_BYTES, MAX_DEPTH, Position, YamlError, parse_yaml
from vmchannel_host.model import HostName, PortName

INSTALLED = Path(__file__).parents[3] / "host" / "config" / "host.yaml"
PLAIN = HostConfig(host=HostName("here"))


class Files:
    """A configuration folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "host.yaml"
        self.policy_dir = folder / "policy.d"

    def write(self, text: str, **fragments: str) -> Files:
        self.path.write_text(text)
        for name, fragment in fragments.items():
            self.policy_dir.mkdir(exist_ok=True)
            (self.policy_dir / f"{name}.yaml").write_text(fragment)
        return self

    def load(self) -> HostConfig:
        return load_config(self.path, host_name="here")

    def problems(self) -> list[str]:
        """Each problem without its folder."""
        found = check_config(self.path, host_name="here")
        return [str(problem).replace(f"{self.path.parent}/", "") for problem in found]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def assert_problem(files: Files, text: str, place: str, *words: str) -> None:
    """The file has this one problem, at this place, and the message has these words."""
    (problem,) = files.write(text).problems()
    assert problem.startswith(f"host.yaml:{place}: "), problem
    for word in words:
        assert word in problem


# --- what it means


def test_no_directory_to_listen_in_is_another_word_than_the_usual_ones(files: Files) -> None:
    assert files.write("ports: {listen_in: []}").load().ports.listen_in == ()
    assert files.write("ports: {listen_in: }").load().ports.listen_in is None


def test_an_empty_file_is_all_defaults(files: Files) -> None:
    assert files.write("").load() == PLAIN


def test_the_installed_file_shows_the_defaults_and_says_standalone() -> None:
    config = load_config(INSTALLED, host_name="here")
    assert config.cluster == ClusterConfig(standalone=True)
    assert not PLAIN.cluster.standalone, "what the operator does not say is not assumed"
    assert config == HostConfig(host=HostName("here"), cluster=config.cluster)


def test_the_installed_file_names_every_key() -> None:
    text = INSTALLED.read_text()
    keys = "host prefix byte_limit guest_byte_limit cache_buffers overrides services raw sockets start groups"
    keys += " members actions self evidence minority aliases quit_timeout timeout after_kill channels clients"
    keys += " requests bus listen_in"
    keys += " standalone keep level state run"
    assert [key for key in keys.split() if f"{key}:" not in text] == []


def test_every_key_is_converted(files: Files) -> None:
    config = files.write(
        f"""
host: hv1
ports:
  prefix: com.example.
  byte_limit: 256KiB
  guest_byte_limit: 65536
  cache_buffers: false
  overrides: {{com.example.1: {{cache_buffers: true, byte_limit: 2MiB}}}}
  services: {{org.example.clip: {{cache_buffers: false}}, org.example.log: {{guest_byte_limit: 64KiB}}}}
  raw: [org.qemu.guest_agent.0]
  listen_in: [/run/vms/*, /run/vmchannel/connect]
hypervisors:
  - type: qmp
    sockets: [/run/a/*.sock, /run/b.sock]
    start: {{vm1: [/usr/local/sbin/start-vm, vm1, ""], {VM1.upper()}: [/bin/start]}}
  - {{type: qmp, sockets: /run/c.sock}}
policy:
  groups:
    web: {{members: [vm1, {VM1.upper()}], actions: [off, on], self: true, evidence: sole}}
    db: {{members: [vm2]}}
  evidence: strict
  minority: sole
aliases: {{node1: vm1, node2: {VM1.upper()}}}
fencing: {{quit_timeout: 250ms, timeout: 2min, after_kill: accept}}
limits: {{channels: 64, clients: 16, requests: 1000}}
cluster: {{bus: local, standalone: true}}
journal: {{keep: 30d}}
log: {{level: debug}}
paths: {{state: /srv/state, run: /srv/run}}
"""
    ).load()
    assert config.host == "hv1"
    assert config.ports.prefix == "com.example."
    assert config.ports.limits == PortLimits(262144, 65536, False)
    assert config.ports.limits_of(PortName("com.example.1")) == PortLimits(2097152, 65536, True)
    assert config.ports.services == {
        "org.example.clip": replace(WIDEST, cache_buffers=False),
        "org.example.log": replace(WIDEST, guest_byte_limit=65536),
    }
    assert config.ports.limits_of(PortName("com.example.2")) == config.ports.limits
    assert config.ports.raw == ("org.qemu.guest_agent.0",)
    assert config.ports.listen_in == ("/run/vms/*", "/run/vmchannel/connect")
    assert [one.sockets for one in config.qmp] == [("/run/a/*.sock", "/run/b.sock"), ("/run/c.sock",)]
    start = config.qmp[0].start
    assert start == {"vm1": ("/usr/local/sbin/start-vm", "vm1", ""), VM1: ("/bin/start",)}
    off_on = frozenset({FenceAction.OFF, FenceAction.ON})
    assert config.policy.groups == {
        "web": Group("web", ("vm1", VM1), off_on, self_fence=True, evidence=EvidenceRule.SOLE),
        "db": Group("db", ("vm2",), evidence=EvidenceRule.STRICT),
    }
    assert config.policy.minority is MinorityRule.SOLE
    assert config.aliases == {"node1": "vm1", "node2": VM1}
    assert (config.fencing.quit_timeout_s, config.fencing.timeout_s) == (0.25, 120.0)
    assert config.fencing.after_kill is AfterKill.ACCEPT
    assert config.limits == LimitsConfig(channels=64, clients=16, requests=1000)
    assert config.cluster == ClusterConfig(BusKind.LOCAL, standalone=True)
    assert config.journal.keep_s == 30 * 86_400
    assert config.log.level is LogLevel.DEBUG
    assert config.paths.admin_socket == Path("/srv/run/admin.sock")
    assert config.paths.host_socket == Path("/srv/run/host.sock")


def test_a_key_without_a_value_is_a_section_of_defaults(files: Files) -> None:
    text = "policy:\n  groups:\naliases:\nports:\nfencing:\nhypervisors:\n"
    assert files.write(text).load() == PLAIN


def test_an_empty_list_of_actions_allows_nothing(files: Files) -> None:
    text = "policy: {groups: {web: {members: [a, b], actions: []}}}"
    assert files.write(text).load().policy.groups["web"].actions == frozenset()


def test_off_and_on_are_text_and_only_true_and_false_are_booleans(files: Files) -> None:
    config = files.write(
        "policy: {groups: {off: {members: [no, 0123, 1:30, 'true'], actions: [off]}}}"
    ).load()
    assert config.policy.groups["off"].members == ("no", "0123", "1:30", "true")


def test_groups_of_policy_d_are_added(files: Files) -> None:
    files.write(
        "policy: {evidence: strict, groups: {web: {members: [a, b]}}}",
        db="groups: {db: {members: [c, d]}}",
        empty="# nothing yet\n",
    )
    (files.policy_dir / ".swp.yaml").write_text("{")
    (files.policy_dir / "notes.txt").write_text("{")
    groups = files.load().policy.groups
    assert groups == {
        "web": Group("web", ("a", "b"), evidence=EvidenceRule.STRICT),
        "db": Group("db", ("c", "d"), evidence=EvidenceRule.STRICT),
    }


def test_reading_again_gives_the_same(files: Files) -> None:
    files.write("host: hv1", db="groups: {db: {members: [c, d]}}")
    assert files.load() == files.load()


# --- what is wrong with it


def test_a_missing_file_is_told(files: Files) -> None:
    assert files.problems() == ["host.yaml: cannot be read: No such file or directory"]


def test_a_folder_or_a_fifo_is_no_file(files: Files) -> None:
    files.path.mkdir()
    assert files.problems() == ["host.yaml: cannot be read: not a regular file"]
    files.path.rmdir()
    os.mkfifo(files.path)
    assert files.problems() == ["host.yaml: cannot be read: not a regular file"]


def test_every_problem_of_every_file_is_told_in_order(files: Files) -> None:
    files.write(
        "hots: hv1\npolicy:\n  evidence: x\n  groups: {web: {member: [a]}}\n", a="[", b="groups: 3", c="x: 1"
    )
    assert files.problems() == [
        "host.yaml:1:1: hots: unknown key 'hots' (did you mean 'host'?), expected host, ports, hypervisors, "
        "policy, aliases, fencing, limits, cluster, journal, log or paths",
        "host.yaml:3:13: policy.evidence: found 'x', expected sole or strict",
        "host.yaml:4:18: policy.groups.web.member: unknown key 'member' (did you mean 'members'?), expected "
        "members, actions, self or evidence",
        "policy.d/a.yaml:2:1: not valid YAML: did not find expected node content",
        "policy.d/b.yaml:1:9: groups: found '3', expected a mapping",
        "policy.d/c.yaml:1:1: x: unknown key 'x', expected groups",
    ]


def test_an_error_carries_all_problems(files: Files) -> None:
    with pytest.raises(ConfigError) as caught:
        files.write("a: 1\nb: 2").load()
    assert [(problem.line, problem.column, problem.key) for problem in caught.value.problems] == [
        (1, 1, "a"),
        (2, 1, "b"),
    ]
    assert str(caught.value).count("\n") == 1


def test_a_duplicate_key_is_refused_with_both_places(files: Files) -> None:
    text = "log: {level: info}\nhost: a\nlog: {level: debug}\n"
    assert_problem(files, text, "3:1", "log: duplicate key, first at line 1, column 1")


def test_a_group_in_two_files_is_refused_with_both_places(files: Files) -> None:
    files.write("policy:\n  groups:\n    web: {members: [a, b]}\n", more="groups:\n  web: {members: [c]}\n")
    (problem,) = files.problems()
    assert problem.startswith("policy.d/more.yaml:2:3: groups.web: group 'web' is defined already, at ")
    assert problem.endswith("host.yaml:3:5")


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (
            "policy: {groups: {w: {actions: [true]}}}",
            "1:33",
            ["found true", "off, on, reboot, status or list"],
        ),
        (
            "policy: {groups: {w: {actions: [of]}}}",
            "1:33",
            ["actions[0]", "found 'of'", "did you mean 'off'"],
        ),
        ("policy: {groups: {w: {self: on}}}", "1:29", ["self", "'on'", "did you mean true, without quotes?"]),
        ("policy: {groups: {w: {self: 'false'}}}", "1:29", ["did you mean false, without quotes?"]),
        ("policy: {groups: {w: {members: vm1}}}", "1:32", ["found 'vm1'", "expected a list"]),
        ("policy: {groups: {w: {members: [true]}}}", "1:33", ["found true", "expected text (in quotes"]),
        ("policy: {groups: {w: {members: [a, a]}}}", "1:36", ["'a' is a member already"]),
        (f"policy: {{groups: {{w: {{members: [{VM1}, {VM1.upper()}]}}}}}}", "1:71", ["is a member already"]),
        ("policy: {groups: {w: {members: ['']}}}", "1:33", ["1 to 256 characters"]),
        ('policy: {groups: {"a\\nb": {}}}', "1:19", ["'a\\nb'", "control characters"]),
        (
            "aliases: {n: 00000000-0000-0000-0000-000000000000}",
            "1:14",
            ["aliases.n", "the nil UUID is no identity"],
        ),
        (f"aliases: {{{VM1}: vm1}}", "1:11", ["a UUID names its own VM"]),
        ("hypervisors: [{type: libvirt, uri: qemu:x, saves: /s}]", "1:36", ["this host's libvirt"]),
        ("hypervisors: [{type: libvirt, uri: 'qemu:///session'}]", "1:15", ["the key 'saves' is missing"]),
        (
            "hypervisors: [{type: libvirt}, {type: libvirt}]",
            "1:32",
            ["'qemu:///system' stands there already"],
        ),
        ("hypervisors: [{type: libvirt, sockets: /x}]", "1:31", ["unknown key", "uri or saves"]),
        ("hypervisors: [{type: xen}]", "1:22", ["found 'xen', expected qmp or libvirt"]),
        ("hypervisors: [{sockets: /x}]", "1:15", ["hypervisors[0]", "'type' is missing"]),
        ("hypervisors: [{type: qmp, uri: x}]", "1:27", ["unknown key 'uri'", "type, sockets or start"]),
        ("hypervisors: [{type: qmp, sockets: run/*}]", "1:36", ["found 'run/*'", "absolute path"]),
        ("hypervisors: [{type: qmp, sockets: []}]", "1:36", ["empty list", "a glob of QMP sockets"]),
        (
            "hypervisors: [{type: qmp, start: {a: start a}}]",
            "1:38",
            ["found 'start a'", "a command as a list"],
        ),
        (
            "hypervisors: [{type: qmp, start: {a: [start]}}]",
            "1:39",
            ["'start'", "absolute path of a program"],
        ),
        ("cluster: {bus: corosync}", "1:16", ["corosync comes with a later release"]),
        ("cluster: {bus: zookeeper}", "1:16", ["found 'zookeeper', expected local or corosync"]),
        ("cluster: {hosts: [a]}", "1:11", ["cluster.hosts", "later release: remove it"]),
        ("fencing: {quit_timeout: 1}", "1:25", ["found '1'", "a duration such as"]),
        ("fencing: {quit_timeout: 1s, timeout: 2h}", "1:38", ["found '2h', expected 1s to 1h"]),
        ("fencing: {quit_timeout: 40s}", "1:25", ["leaves no time for the kill within timeout (40s)"]),
        ("fencing: {timeout: 1s}", "1:20", ["quit_timeout (1s) leaves no time"]),
        ("ports: {byte_limit: 1MB}", "1:21", ["found '1MB'", "a size such as"]),
        ("ports: {byte_limit: 1KiB}", "1:21", ["expected 32KiB to 4MiB"]),
        ("ports: {services: {'a b': {}}}", "1:20", ["'a b'", "a service's name"]),
        ("ports: {services: {org.vmchannel.fence: {cache_buffers: false}}}", "1:20", ["is reserved"]),
        ("ports: {overrides: {com.x: {}}}", "1:21", ["overrides nothing", "'org.vmchannel.'"]),
        ("ports: {listen_in: [run]}", "1:21", ["listen_in", "an absolute path"]),
        ("ports: {listen_in: [/run/../etc]}", "1:21", ["listen_in", "without .."]),
        ("ports: {listen_in: [/]}", "1:21", ["listen_in", "all programs share"]),
        ("ports: {listen_in: [/run/]}", "1:21", ["listen_in", "all programs share"]),
        ("ports: {raw: [org.vmchannel.1]}", "1:15", ["it is served, and cannot be raw"]),
        ("ports: {prefix: a/b}", "1:17", ["a port name such as"]),
        ("limits: {channels: 1_000}", "1:20", ["found '1_000', expected a whole number"]),
        ("limits: {channels: '0100'}", "1:20", ["expected a whole number"]),
        ("limits: {clients: 3}", "1:19", ["expected 4 to 65535"]),
        ("log: info", "1:6", ["found 'info', expected a mapping"]),
        ("log: {level: warn}", "1:14", ["did you mean 'warning'"]),
        ("journal: {keep: 400}", "1:17", ["a duration such as"]),
        ("paths: {state: /a, run: /a}", "1:25", ["the same as paths.state"]),
        ("paths: {run: ../x}", "1:14", ["an absolute path without .."]),
        ("host: a b", "1:7", ["a host name: letters, digits"]),
        ("host:", "1:6", ["found nothing, expected text"]),
        ("quit_timeout: 1s", "1:1", ["it belongs under 'fencing'"]),
        ("[a]", "1:1", ["found a list, expected a mapping"]),
        ("just text", "1:1", ["found 'just text', expected a mapping"]),
        ("a: 1\n---\nb: 1", "2:1", ["a second document"]),
        ("host: &a hv1", "1:7", ["anchor (&a) is not allowed"]),
        ("host: !!str hv1", "1:7", ["tag (tag:yaml.org,2002:str) is not allowed"]),
        ("log: {<<: {level: info}}", "1:7", ["merge key (<<) is not allowed"]),
        ("host: hv1\n\tx: 1", "2:1", ["not valid YAML", "tab"]),
        ("host: \x01", "1:7", ["control characters are not allowed"]),
    ],
)
def test_a_wrong_file_is_told_with_place_finding_and_expectation(
    files: Files, text: str, place: str, words: list[str]
) -> None:
    assert_problem(files, text, place, *words)


def test_a_machine_whose_name_is_no_host_name_must_set_one(files: Files) -> None:
    files.write("")
    (problem,) = check_config(files.path, host_name="(none)")
    assert "set `host`" in str(problem)
    files.write("host: hv1")
    assert check_config(files.path, host_name="(none)") == []


def test_a_policy_folder_that_is_a_file_is_a_problem(files: Files) -> None:
    files.write("").policy_dir.write_text("")
    assert files.problems() == ["policy.d: cannot be listed: Not a directory"]


# --- hostile text


@pytest.mark.parametrize(
    ("data", "message", "position"),
    [
        (b"#" * (MAX_BYTES + 1), "at most 1,048,576 are read", None),
        (b"[" * 100, f"nested deeper than {MAX_DEPTH} levels", Position(1, MAX_DEPTH + 1)),
        (b"a:\n - \xff", "not UTF-8", Position(2, 4)),
        (b"? [a]\n: 1", "a mapping or list as a key", Position(1, 3)),
        (b"a: 1\n*x : 2", "an anchor|alias as a key", Position(2, 1)),
        (b"a: 'x", "not valid YAML", Position(1, 6)),
    ],
)
def test_text_that_is_no_configuration_is_refused_as_a_whole(
    data: bytes, message: str, position: Position | None
) -> None:
    with pytest.raises(YamlError, match=message) as caught:
        parse_yaml(data)
    assert caught.value.position == position


def test_however_deep_it_is_nested_it_is_refused() -> None:
    with pytest.raises(YamlError, match=r"nested deeper|nesting depth"):  # libyaml may have its own limit
        parse_yaml(b"[" * 200_000)


def test_a_billion_laughs_are_not_expanded() -> None:
    lines = ["a0: &a0 lol"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    document = parse_yaml("\n".join(lines).encode())
    assert len(document.faults) > 80
    assert "a1" in str(document.tree)


def test_a_refused_key_leaves_the_rest_of_its_file_checked(files: Files) -> None:
    problems = files.write("log: {level: info}\nlog: {level: {x: [1]}}\nhots: 1").problems()
    assert [problem.split(" ", 2)[1] for problem in problems] == ["log:", "hots:"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode(errors="replace")))
)
def test_any_bytes_give_a_configuration_or_problems(files: Files, data: bytes) -> None:
    files.path.write_bytes(data)
    problems = check_config(files.path, host_name="here")
    assert all(problem.line >= 0 and str(problem).isprintable() for problem in problems)


SECTIONS = HOST_SCHEMA["properties"]
KEYS = [*SECTIONS, *(key for section in SECTIONS.values() for key in section.get("properties", {}))]
INNER_KEYS = ["members", "actions", "self", "type", "start", "sockets", "<<"]
yaml_values = st.recursive(
    st.sampled_from(["true", "off", "1s", "vm1", "''", "~", "1MiB", "sole", "&a x", "*a", "!t y"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
        st.lists(
            st.tuples(
                st.sampled_from(KEYS + INNER_KEYS),
                inner,
            ),
            max_size=4,
        ).map(lambda parts: "{" + ", ".join(f"{key}: {value}" for key, value in parts) + "}"),
    ),
    max_leaves=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(yaml_values)
def test_any_tree_of_known_keys_gives_a_configuration_or_problems(files: Files, text: str) -> None:
    problems = files.write(text).problems()
    if not problems:
        assert isinstance(files.load(), HostConfig)


# --- scalars


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("65536", 65536), ("1B", 1), ("256KiB", 262144), ("1.5MiB", 1572864)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "1 MiB", "1mib", "-1", "1e3", "0x10", "01", "1.5B", "\u0661MiB", "1s", "1MiB "]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("1s", 1.0), ("1.5min", 90.0), ("2h", 7200.0), ("400d", 34_560_000.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "1", "1 s", "1m", "1S", "-1s", "1:30", "inf", "nan", "1e3s", "s", "1MiB"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "1_000", "007", "1" * 10, "²", "one"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        parse_count(text)
