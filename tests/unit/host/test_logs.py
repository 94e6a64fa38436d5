# SPDX-License-Identifier: LGPL-2.1-or-later
"""Log lines: fields, escapes, limits."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from vmchannel_host.logs import BoundLogger, LineFormatter, RateLimiter, configure, field_text


class Clock:
    """Stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the logger "test.logs" writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(for_journald=True))
    logger = logging.getLogger("test.logs")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield stream
    logger.removeHandler(handler)


LOGGER = logging.getLogger("test.logs")


def test_every_line_carries_the_bound_fields(lines: io.StringIO) -> None:
    log = BoundLogger(LOGGER, {"vm": "vm1"}).bind(port="org.vmchannel.0", pid=7)
    log.info("fence accepted action=%s request=%d", "off", 3)
    assert lines.getvalue() == (
        "<6>info test.logs: fence accepted action=off request=3 vm=vm1 port=org.vmchannel.0 pid=7\n"
    )


def test_a_field_cannot_forge_a_line_or_another_field(lines: io.StringIO) -> None:
    BoundLogger(LOGGER, {"name": 'x" vm=vm2\n<3>error'}).warning("100 %% sure")
    assert lines.getvalue() == '<4>warning test.logs: 100 %% sure name="x\\" vm=vm2\\x0a<3>error"\n'
    assert lines.getvalue().count("\n") == 1


def test_a_message_with_a_line_break_stays_one_line(lines: io.StringIO) -> None:
    LOGGER.error("it said %s", "a\nb")
    assert lines.getvalue() == "<3>error test.logs: it said a\\x0ab\n"


def test_an_exception_is_shown_with_its_traceback(lines: io.StringIO) -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        LOGGER.exception("failed")
    assert lines.getvalue().startswith("<3>error test.logs: failed\nTraceback")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a b", '"a b"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        (None, "-"),
        (True, "True"),
        (1.5, "1.5"),
        ("x" * 500, "x" * 117 + "..."),
    ],
)
def test_a_field_is_quoted_where_it_is_no_plain_word(value: str | float | None, text: str) -> None:
    assert field_text(value) == text


def test_a_flood_of_one_line_is_counted_and_others_are_not_held_back(lines: io.StringIO) -> None:
    clock = Clock()
    limiter = RateLimiter(burst=2, interval_s=10, clock=clock)
    log = BoundLogger(LOGGER, {"vm": "vm1"})
    for _ in range(100):
        log.limited(limiter, logging.WARNING, "garbage", "garbage bytes=%d", 5)
    log.limited(limiter, logging.WARNING, "oversize", "oversize")
    clock.now += 10
    log.limited(limiter, logging.WARNING, "garbage", "garbage bytes=%d", 6)
    assert lines.getvalue().splitlines() == [
        "<4>warning test.logs: garbage bytes=5 vm=vm1",
        "<4>warning test.logs: garbage bytes=5 vm=vm1",
        "<4>warning test.logs: oversize vm=vm1",
        "<4>warning test.logs: garbage bytes=6 vm=vm1 repeated=98",
    ]


def test_a_limiter_forgets_the_oldest_keys_when_there_are_too_many() -> None:
    limiter = RateLimiter(burst=1, max_keys=3, clock=Clock())
    assert [limiter.allow(n) for n in range(4)] == [0, 0, 0, 0]
    assert [limiter.allow(3), limiter.allow(0)] == [None, 0]


def test_configuring_sets_the_level_of_the_product_and_only_warnings_of_others() -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    levels = {name: logging.getLogger(name).level for name in ("vmchannel_host", "fence_vmchannel")}
    try:
        configure("debug", stream, for_journald=False)
        logging.getLogger("vmchannel_host.x").debug("ours")
        logging.getLogger("aiohttp.x").info("theirs")
    finally:
        root.handlers[:], root.level = before
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    [line] = stream.getvalue().splitlines()
    assert line.endswith("debug vmchannel_host.x: ours")
    assert line[4] == "-"  # begins with the date
