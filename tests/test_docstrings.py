"""Docstrings of public names: one summary line, and every parameter explained."""

import ast
import doctest
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import mechtut

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for p in (ROOT / "mechtut").glob("*/[a-z]*.py")
)


def section(doc: str, name: str) -> str:
    """The text of a section such as `Args`."""
    found = re.search(rf"^{name}:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
    return found[1] if found else ""


def public(module: str) -> list[tuple[str, object]]:
    """Functions, classes and methods that a module offers."""
    loaded, out = import_module(module), []
    for name in getattr(loaded, "__all__", []):
        thing = getattr(loaded, name)
        if getattr(thing, "__module__", None) != module:
            continue
        if inspect.isclass(thing):
            out.append((name, thing))
            for method, member in vars(thing).items():
                plain = getattr(member, "__func__", member)
                if not method.startswith("_") and inspect.isfunction(plain):
                    out.append((f"{name}.{method}", plain))
        elif inspect.isroutine(thing):
            out.append((name, thing))
    return out


def complaints(name: str, thing: object) -> list[str]:
    """What is missing in one docstring."""
    doc = inspect.getdoc(thing)
    if not doc:
        return [f"{name} has none"]
    first, *rest = doc.split("\n")
    out = []
    if not first.endswith((".", "?")) or (rest and rest[0].strip()):
        out.append(f"{name}: the summary is not one line that ends with a full stop")
    function = inspect.unwrap(thing)
    if inspect.isfunction(function):
        arguments = section(doc, "Args")
        parameters = [
            "*" * (p.kind == p.VAR_POSITIONAL) + "**" * (p.kind == p.VAR_KEYWORD) + n
            for n, p in inspect.signature(function).parameters.items()
            if n not in ("self", "cls")
        ]
        told = {p: rf"^ +{re.escape(p)}:" for p in parameters}
        lacks = [p for p, line in told.items() if not re.search(line, arguments, re.M)]
        if lacks:
            out.append(f"{name}: no word on {', '.join(lacks)}")
        gives = inspect.signature(function).return_annotation not in (None, "None")
        told = section(doc, "Returns") or section(doc, "Yields")
        returns = bool(parameters) and gives and not told
        if returns and not hasattr(function, "__wrapped__"):
            is_context = "contextmanager" in inspect.getsource(thing)[:40]
            if not is_context:
                out.append(f"{name}: what does it return?")
    return out


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_explained(module):
    found = [c for name, thing in public(module) for c in complaints(name, thing)]
    assert not found, "\n".join(found)


def test_what_users_import_first_has_an_example():
    without = []
    for name, module in mechtut._WHERE.items():
        thing = getattr(mechtut, name)
        if inspect.isfunction(thing) and "Example:" not in (
            inspect.getdoc(thing) or ""
        ):
            without.append(f"{module}.{name}")
    assert not without, f"no example: {', '.join(without)}"


def test_examples_do_not_hide_in_strings():
    """A doctest that is not under `Example:` would not be shown on the API page."""
    for path in (ROOT / "mechtut").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                doc = ast.get_docstring(node) or ""
                assert ">>>" not in doc or "Example:" in doc, f"{path.name} {node.name}"


def test_examples_draw_with_a_seed():
    """What a reader types must do what stands there, whatever was drawn before."""
    draws = re.compile(r"\b(torch|random)\.(rand|norm|bernoulli|multinomial)\w*\(")
    for module in MODULES:
        for test in doctest.DocTestFinder().find(import_module(module)):
            for line in (example.source for example in test.examples):
                free = draws.search(line) and "generator=" not in line
                assert not free, f"{test.name}: {line}"
