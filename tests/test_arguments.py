"""Hostile arguments at every public name: refused at the door, by name and value.

The names are found by introspection, so that a new function cannot escape. What a
function makes of arguments of the right types is tested beside the function.
"""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mechtut
from mechtut.arguments import Bounds, Like, checked
from mechtut.patching.results import Result

NAN, INF = float("nan"), float("inf")
CHECKED = checked(lambda x: x).__code__  # the code of every function behind a check
# Public, and without a check of every argument:
EXEMPT = {
    "models.hooks.write": "inside every sweep; an `Edit` was checked when it was made",
    "models.hooks.write_into": "likewise",
    "patching.matmul.onednn_is_faster": "asked before every matrix product",
}


class Stranger:
    """Something that no function can want."""

    def __repr__(self) -> str:
        return "Stranger()"


def modules() -> list[str]:
    found = pkgutil.walk_packages(mechtut.__path__, "mechtut.")
    names = [m.name for m in found if "._" not in m.name]
    return [n for n in names if n != "mechtut.arguments"]


def surface(module: str) -> Iterator[tuple[str, Callable]]:
    """Public functions, constructors and methods of a module, by name."""
    has = importlib.import_module(module)
    for name in getattr(has, "__all__", ()):
        thing = getattr(has, name)
        if not callable(thing) or getattr(thing, "__module__", module) != module:
            continue
        if inspect.isfunction(thing):
            yield name, thing
        elif isinstance(thing, type):
            yield from methods(name, thing)


def methods(name: str, cls: type) -> Iterator[tuple[str, Callable]]:
    # tuples and errors hold what they are given; PyTorch calls its modules' methods
    if issubclass(cls, tuple | BaseException | nn.Module):
        return
    if getattr(cls, "_is_protocol", False):
        return
    for key, member in vars(cls).items():
        made = key == "__init__" and not issubclass(cls, Result)  # results are loaded
        if not made and key.startswith("_"):
            continue
        if isinstance(member, classmethod | staticmethod):
            yield f"{name}.{key}", member.__func__
        elif inspect.isfunction(member):
            yield f"{name}.{key}", member


def parameters(function: Callable) -> dict[str, Any]:
    """The annotated arguments."""
    hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    kinds = inspect.Parameter
    return {
        name: hints[name]
        for name, p in inspect.signature(function).parameters.items()
        if name in hints and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    }


def hostile(annotation: Any) -> list[Any]:
    """Values that an argument of this annotation must refuse."""
    if Any in _members(annotation) or isinstance(annotation, typing.TypeVar):
        return []
    values = [*_of_kind(annotation), Stranger()]
    return [v for v in values if not _welcome(v, annotation)]


def _welcome(value: Any, annotation: Any) -> bool:
    """Whether another member of a union takes it."""
    members = _members(annotation)
    if value is None:
        return None in members or type(None) in members
    if len(members) < 2:
        return False
    return isinstance(value, tuple(m for m in map(_class_of, members) if m))


def _members(annotation: Any) -> tuple:
    union = typing.get_origin(annotation) in (typing.Union, type(int | str))
    return typing.get_args(annotation) if union else (annotation,)


def _class_of(annotation: Any) -> Any:
    """The values that a hostile one could be taken for."""
    if annotation is float:
        return (int, float)
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _class_of(typing.get_args(annotation)[0])
    if hasattr(annotation, "dim_str"):
        return (Tensor, np.ndarray, list)
    if origin in (Sequence, Iterable, list, tuple):
        return (list, tuple, set, dict, Tensor, np.ndarray)
    if origin is Literal:
        return tuple({type(a) for a in typing.get_args(annotation)})
    if annotation in (Path,):
        return (str, Path)
    return annotation if isinstance(annotation, type) else origin


def _of_kind(annotation: Any) -> list[Any]:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if len(members := _members(annotation)) > 1:
        return [v for m in members for v in _of_kind(m)]
    if origin is Annotated:
        bounds = next((p for p in parts[1:] if isinstance(p, Bounds)), Bounds())
        kept = [v for v in _of_kind(parts[0]) if bounds.finite or not _gap(v)]
        return [*kept, *_outside(bounds, parts[0])]
    if hasattr(annotation, "dim_str"):
        return _arrays(annotation)
    if annotation is int:
        return [1.5, "3", None, [1], True, NAN, 1j, b"1", torch.tensor(0.5)]
    if annotation is float:
        return ["3", None, [1.0], 1j, True, b"1", torch.tensor([1.0, 2.0])]
    if annotation is bool:
        return [2, "yes", None, [True], 0.0, torch.tensor([True])]
    if annotation is str:
        return [3, b"x", None, ["a"], 0.5, Path("x")]
    if annotation is Path:
        return [3, b"x", None, ["a"], 0.5]
    if origin is Literal:
        return ["ADD", None, 3, ["set"], b"set"]
    if annotation is Callable or origin is Callable:
        return [3, None, [1], 0.5]
    if origin in (Sequence, list):
        return ["text", b"text", 3, None, {"a": 1}, {1, 2}, *_within(parts[0])]
    if origin is Iterable:
        return ["text", b"text", 3, None, *_within(parts[0])]
    if origin is tuple:
        inner = _within(parts[0]) if parts[-1] is Ellipsis else [(1,) * 9, ()]
        return ["text", 3, None, *inner]
    if origin in (Mapping, dict):
        return [3, "text", None, [1], 0.5]
    if annotation in (Any, None, type(None)) or isinstance(annotation, typing.TypeVar):
        return []
    return [3, "text", None, [1], b"x", 0.5]  # of a class


def _gap(value: Any) -> bool:
    """Whether this is NaN or infinity, or an array of them."""
    try:
        return not bool(torch.isfinite(torch.as_tensor(value)).all())
    except (TypeError, ValueError, RuntimeError):
        return False


def _within(item: Any) -> list[Any]:
    """Lists in which one thing is wrong."""
    return [[v] for v in hostile(item)] if item is not Any else []


def _outside(bounds: Bounds, kind: Any) -> list[Any]:
    if kind not in (int, float):
        return [[]] if bounds.least else []
    whole = kind is int
    found: list[Any] = [] if whole or not bounds.finite else [NAN, INF, -INF]
    step = 1 if whole else 1e-6
    if bounds.least is not None:
        found += [int(bounds.least) - 1 if whole else bounds.least - step, -(10**9)]
    if bounds.above is not None:
        found += [int(bounds.above) if whole else bounds.above]
    if bounds.most is not None:
        found += [int(bounds.most) + 1 if whole else bounds.most + step, 10**12]
    return found


def _arrays(annotation: Any) -> list[Any]:
    axes = annotation.dim_str.split()
    free = any(a == "..." or a.startswith("*") for a in axes)
    shape = [int(a) if a.isdigit() else 2 for a in axes if a[:1] not in "*."]
    real = torch.zeros(shape)
    found: list[Any] = ["text", None, 3 if shape else "3", [[1], [2, 3]], {"a": 1}]
    found += [real.to(torch.complex64), real.numpy().astype(str)]
    if not free:
        found += [real[None], torch.zeros(0)[None][None][None][None]]
    if "float32" in annotation.dtypes:
        found += [real.bool()]
        found += [real + v for v in (NAN, INF, -INF)] if real.numel() else []
    else:
        found += [real + 0.5, real.double()]
    return found


def stand_in(annotation: Any) -> Any:
    """Something that passes the check; what it holds does not matter."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if len(members := _members(annotation)) > 1:
        return stand_in(members[0])
    if origin is Annotated and isinstance(parts[1], Like):
        return type("StandIn", (), dict.fromkeys(parts[1].attributes))()
    if origin is Annotated:
        bounds = next((p for p in parts[1:] if isinstance(p, Bounds)), Bounds())
        limits = (bounds.most, bounds.least, 1)
        number = next(n for n in limits if n is not None and bounds.hold(n))
        if parts[0] in (int, float):
            return number
        one = stand_in(typing.get_args(parts[0])[-1]) if bounds.least else None
        of_kind = {Sequence: [one], Mapping: {"text": one}}
        origin = typing.get_origin(parts[0])
        return of_kind.get(origin) if bounds.least else stand_in(parts[0])
    if hasattr(annotation, "dim_str"):
        axes = [a for a in annotation.dim_str.split() if a[:1] not in "*."]
        x = torch.zeros([int(a) if a.isdigit() else 2 for a in axes])
        kind = annotation.dtypes
        return x if "float32" in kind else x.long() if "int32" in kind else x.bool()
    if annotation in (int, float, bool, str):
        return {int: 1, float: 1.0, bool: True, str: "text"}[annotation]
    if origin is Literal:
        return parts[0]
    if annotation is Callable or origin is Callable:
        return print
    if origin in (Sequence, list, Iterable):
        return []
    if origin is tuple:
        return () if parts[-1] is Ellipsis else tuple(map(stand_in, parts))
    if origin in (Mapping, dict):
        return {}
    if annotation is Path:
        return Path("x")
    if annotation in (Any, None, type(None)) or isinstance(annotation, typing.TypeVar):
        return None
    cls = origin or annotation
    made = {Tensor: torch.zeros(2), torch.dtype: torch.float32, type: int}
    made[torch.device] = torch.device("cpu")
    if cls in made:
        return made[cls]
    if issubclass(cls, tuple):
        return cls(*range(len(cls._fields)))
    if getattr(cls, "_is_protocol", False):
        names = {n: print for n in vars(cls) if not n.startswith("_")}
        return type("StandIn", (), names | {"__call__": print})()
    return cls.__new__(cls)


@pytest.mark.parametrize("module", modules())
def test_every_public_name_checks_its_arguments(module):
    for name, function in surface(module):
        full = f"{module}.{name}".removeprefix("mechtut.")
        if not inspect.signature(function).parameters.keys() - {"self", "cls"}:
            continue
        assert full in EXEMPT or function.__code__ is CHECKED, (
            f"{full}: put @checked in front of it, or a reason into EXEMPT"
        )


@pytest.mark.parametrize("module", modules())
def test_hostile_arguments_are_refused_by_name(module, record_property):
    thrown = 0
    for name, function in surface(module):
        if f"{module}.{name}".removeprefix("mechtut.") in EXEMPT:
            continue
        wanted = parameters(function)
        for target, annotation in wanted.items():
            for value in hostile(annotation):
                given = {n: stand_in(a) for n, a in wanted.items()} | {target: value}
                if "." in name:
                    given = {"self": Stranger(), **given}
                first = next(iter(inspect.signature(function).parameters), "")
                head = [given.pop("self")] if first in ("self", "cls") else []
                given.pop("self", None)
                where = f"{module}.{name}({target}={value!r})"
                try:
                    function(*head, **given)
                except (TypeError, ValueError) as error:
                    told = str(error)
                    named = told.startswith((target, f"a key of {target}"))
                    assert named and "must be" in told, f"{where}: {error!r}"
                except Exception as error:  # what is raw is told with what raised it
                    pytest.fail(f"{where} was let in: {error!r}")
                else:
                    pytest.fail(f"{where} was let in")
                thrown += 1
    record_property("hostile arguments, refused by name", thrown)
