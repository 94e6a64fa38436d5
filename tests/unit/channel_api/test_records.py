# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records behave as the frozen dataclasses that they stand for."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import pprint
from typing import Any

import pytest

from fence_vmchannel.messages import FenceCode, FenceProgress
from fence_vmchannel.records import Record, field, tagged


class Box(Record):
    """A record with each kind of field."""

    name: str
    size: int = 3
    marks: dict[str, int] = field(default_factory=dict[str, int])
    note: object = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size")


@dataclasses.dataclass(frozen=True, slots=True)
class Twin:
    """The dataclass of the same fields."""

    name: str
    size: int = 3
    marks: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    note: object = dataclasses.field(default=None, compare=False)


class Empty(Record):
    """Nothing."""


class OtherEmpty(Record):
    """Nothing else."""


def test_fields_are_given_by_place_by_name_or_by_default() -> None:
    box = Box("a", marks={"x": 1})
    assert (box.name, box.size, box.marks, box.note) == ("a", 3, {"x": 1}, None)
    assert Box(size=4, name="a") == Box("a", 4)


def test_each_record_has_its_own_default_from_a_factory() -> None:
    assert Box("a").marks is not Box("a").marks


MISUSES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    (("a",), {"name": "b"}),
    (("a",), {"other": 1}),
    (("a", 1, {}, None, 5), {}),
]


@pytest.mark.parametrize(("values", "named"), MISUSES, ids=["missing", "twice", "unknown", "too many"])
def test_wrong_fields_are_refused_as_by_a_dataclass(values: tuple[Any, ...], named: dict[str, Any]) -> None:
    classes: list[Any] = [Box, Twin]
    for cls in classes:
        with pytest.raises(TypeError):
            cls(*values, **named)


def test_the_check_of_a_class_is_called() -> None:
    with pytest.raises(ValueError, match="size"):
        Box("a", -1)


def test_a_record_cannot_be_changed() -> None:
    box: Any = Box("a")
    for name in ("name", "other"):
        with pytest.raises(AttributeError):
            setattr(box, name, "b")
    with pytest.raises(AttributeError):
        del box.name
    assert box.name == "a"
    assert not hasattr(box, "__dict__")


def test_records_are_equal_by_class_and_compared_fields() -> None:
    assert Box("a", note=1) == Box("a", note=2)
    assert Box("a") != Box("b")
    assert Box("a") != ("a", 3, {}, None)
    assert Empty() == Empty()
    assert Empty() != OtherEmpty()


def test_equal_records_have_one_hash() -> None:
    progress = FenceProgress(b"1", "op", "text", 5)
    assert len({progress, FenceProgress(b"1", "op", "text", 5), Empty(), Empty()}) == 2
    with pytest.raises(TypeError):
        hash(Box("a"))  # a dict is not hashable


def test_it_is_shown_as_a_dataclass_is() -> None:
    assert repr(Box("a")) == repr(Twin("a")).replace("Twin", "Box")
    assert pprint.pformat(Box("a"))


def test_it_matches_patterns_by_place_and_by_name() -> None:
    match Box("a", 7):
        case Box("a", size=size):
            assert size == 7
        case _:
            raise AssertionError


def test_it_can_be_copied_and_pickled() -> None:
    box = Box("a", 5, {"x": 1})
    assert copy.deepcopy(box) == box == pickle.loads(pickle.dumps(box))


def test_the_functions_of_dataclasses_take_it() -> None:
    box = Box("a", marks={"x": 1}, note="n")
    either: list[object] = [box, Box]
    assert all(dataclasses.is_dataclass(each) for each in either)
    assert dataclasses.replace(box, name="b") == Box("b", marks={"x": 1})
    assert dataclasses.replace(box, name="b").note == "n"
    assert dataclasses.asdict(box) == dataclasses.asdict(Twin("a", marks={"x": 1}, note="n"))
    assert [each.name for each in dataclasses.fields(Box)] == ["name", "size", "marks", "note"]
    with pytest.raises(ValueError, match="size"):
        dataclasses.replace(box, size=-1)


def test_each_class_has_its_own_fields() -> None:
    assert [each.name for each in dataclasses.fields(FenceProgress)] == [
        "request_id",
        "operation",
        "text",
        "elapsed_ms",
    ]
    assert dataclasses.fields(Empty) == ()


def test_a_tagged_field_without_a_default_must_be_given() -> None:
    class Message(Record):
        code: FenceCode = tagged(1)
        reason: str = tagged(2, default="")

    assert Message(FenceCode.DONE).reason == ""
    with pytest.raises(TypeError, match="code"):
        Message(reason="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
