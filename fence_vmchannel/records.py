# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records: what `@dataclass(frozen=True, slots=True)` makes, for classes that a fence agent imports.

`dataclasses` compiles six methods for each class and makes the class twice: 3.2 million instructions each,
after 28 million for its own import. A fence agent would pay that at each call, and has little else to do.
Records share their methods and cost about a twentieth; making an instance takes longer in return, so what
is made for each frame is a named tuple. `docs/benchmarks.md` has the figures.

To type checkers a record is a dataclass, and `dataclasses.replace`, `fields` and `asdict` take it.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final, dataclass_transform

MISSING: Final = object()
"""Stands for "no default"."""


class Field:
    """What a record knows of one of its fields."""

    __slots__ = ("compare", "default", "factory", "tag")

    def __init__(
        self,
        *,
        default: Any = MISSING,
        factory: Callable[[], Any] | None = None,
        compare: bool = True,
        tag: int = 0,
    ) -> None:
        self.default = default
        self.factory = factory
        self.compare = compare
        self.tag = tag

    @property
    def required(self) -> bool:
        """Whether each record must be given it."""
        return self.default is MISSING and self.factory is None


def field(
    *, default: Any = MISSING, default_factory: Callable[[], Any] | None = None, compare: bool = True
) -> Any:
    """A field with more than a plain default, as `dataclasses.field`."""
    return Field(default=default, factory=default_factory, compare=compare)


def tagged(tag: int, *, default: Any = MISSING) -> Any:
    """A field with a wire tag (1 to 65,535), see `tlv`."""
    return Field(default=default, tag=tag)


class _FromDataclass:
    """An attribute by which `dataclasses` knows its own, taken from a dataclass of the same fields, which is
    made when somebody asks: no fence agent does."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, record: object, cls: type[Record]) -> Any:
        import dataclasses

        specs: list[tuple[str, Any, Any]] = []
        for name, spec in record_fields(cls).items():
            given: dict[str, Any] = {"compare": spec.compare}
            if spec.factory is not None:
                given["default_factory"] = spec.factory
            elif spec.default is not MISSING:
                given["default"] = spec.default
            specs.append((name, cls.__annotations__[name], dataclasses.field(**given)))
        twin = dataclasses.make_dataclass(cls.__name__, specs, frozen=True)
        for name in ("__dataclass_fields__", "__dataclass_params__"):
            setattr(cls, name, getattr(twin, name))
        return getattr(twin, self._name)


@dataclass_transform(frozen_default=True, field_specifiers=(field, tagged))
class _RecordType(type):
    """Turns the annotated names of a class body into slots."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]
    ) -> _RecordType:  # a record does not extend another one
        if bases:
            names = tuple(namespace.get("__annotations__", ()))
            fields = {one: _field(namespace.pop(one, MISSING)) for one in names}
            compared = [one for one in names if fields[one].compare]
            namespace["__slots__"] = namespace["__match_args__"] = names
            namespace["__record_fields__"] = fields
            namespace["__record_key__"] = attrgetter(*compared) if compared else _nothing
            namespace["__dataclass_fields__"] = _FIELDS
            namespace["__dataclass_params__"] = _PARAMS
        return super().__new__(cls, name, bases, namespace)


class Record(metaclass=_RecordType):
    """Base of records: a subclass lists its fields as a dataclass does and may check them in `__post_init__`.

    Equal to those of its own class with equal fields; cannot be changed.
    """

    __slots__ = ()

    def __init__(self, *values: Any, **named: Any) -> None:
        cls = type(self)
        names = _names(cls)
        if len(values) > len(names):
            raise TypeError(f"{cls.__name__} has {len(names)} fields, not {len(values)}")
        for name, value in zip(names, values, strict=False):
            if name in named:
                raise TypeError(f"{cls.__name__}.{name} is given twice")
            _set(self, name, value)
        fields = record_fields(cls)
        for name in names[len(values) :]:
            _set(self, name, named.pop(name) if name in named else _default(cls, name, fields[name]))
        if named:
            raise TypeError(f"{cls.__name__} has no field {', '.join(named)}")
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the fields. Raises ValueError."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        key = _key(type(self))
        return bool(key(self) == key(other))

    def __hash__(self) -> int:
        return hash(_key(type(self))(self))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in _names(type(self)))
        return f"{type(self).__qualname__}({values})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in _names(type(self)))


def record_fields(cls: type) -> dict[str, Field]:
    """The fields of a record class, in order."""
    fields: dict[str, Field] = cls.__dict__["__record_fields__"]
    return fields


def _names(cls: type) -> tuple[str, ...]:
    names: tuple[str, ...] = cls.__dict__["__slots__"]
    return names


def _key(cls: type) -> Callable[[object], object]:
    key: Callable[[object], object] = cls.__dict__["__record_key__"]
    return key


def _field(given: object) -> Field:
    return given if isinstance(given, Field) else Field(default=given)


def _default(cls: type, name: str, spec: Field) -> Any:
    if spec.factory is not None:
        return spec.factory()
    if spec.default is MISSING:
        raise TypeError(f"{cls.__name__}.{name} is missing")
    return spec.default


def _nothing(_: object) -> tuple[()]:
    return ()


_set = object.__setattr__
_FIELDS = _FromDataclass("__dataclass_fields__")
_PARAMS = _FromDataclass("__dataclass_params__")
