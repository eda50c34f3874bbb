"""Pages of the API reference, written from the signatures and docstrings of the
package: used by `tools/build_docs.py`.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import mechtut


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """Classes and functions that a module defines and exports, in the order of its
    source.
    """
    found = [(n, getattr(module, n)) for n in getattr(module, "__all__", [])]
    own = [(n, x) for n, x in found if inspect.isroutine(x) or inspect.isclass(x)]
    return sorted(
        [(n, x) for n, x in own if x.__module__ == module.__name__],
        key=lambda item: line(item[1]),
    )


def line(thing: Any) -> int:
    """The line in the module's file at which a class or function begins."""
    return inspect.getsourcelines(inspect.unwrap(thing))[1]


def text(annotation: Any) -> str:
    """An annotation as a reader would write it."""
    if annotation is inspect.Parameter.empty:
        return ""
    written = (
        annotation
        if isinstance(annotation, str)
        else inspect.formatannotation(annotation)
    )
    return f"`{written}`".replace("|", "\\|")


def table(thing: Any) -> list[str]:
    """The parameters of a function, or of a class, as a table."""
    try:
        parameters = [
            p
            for n, p in inspect.signature(thing).parameters.items()
            if n not in ("self", "cls")
        ]
    except (TypeError, ValueError):
        return []
    if not parameters:
        return []
    lines = ["", "| parameter | type | default |", "| --- | --- | --- |"]
    for p in parameters:
        name = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        default = (
            ""
            if p.default is p.empty
            else "made anew"
            if "factory" in repr(p.default)
            else f"`{p.default!r}`"
        )
        lines.append(
            f"| `{name}` | {text(p.annotation)} |"
            f" {default.replace('|', chr(92) + '|')} |"
        )
    return lines


def docstring(thing: Any) -> str:
    """The docstring, safe inside Markdown: brackets and stars in it are meant as they
    stand.
    """
    written = inspect.getdoc(thing) or ""
    if dataclasses.is_dataclass(thing) and written.startswith(
        getattr(thing, "__name__", "") + "("
    ):
        return ""  # the one that `dataclass` makes up, which only repeats the table
    pieces = re.split(r"(```.*?```|`[^`]*`|\$[^$]+\$)", written, flags=re.DOTALL)
    return "".join(
        p if i % 2 else re.sub(r"([\[\]*_<>|{}])", r"\\\1", p)
        for i, p in enumerate(pieces)
    )


def entry(name: str, thing: Any, source: str, level: int = 2) -> list[str]:
    """Heading, text, parameters and source link of one function or class, and the
    methods of a class.
    """
    kind = "class" if inspect.isclass(thing) else "function" if level == 2 else "method"
    lines = [
        "#" * level + f" {name}",
        "",
        f"*{kind}* · [source]({source}#L{line(thing)})",
        "",
        docstring(thing),
        *table(thing),
        "",
    ]
    if inspect.isclass(thing):
        for n, member in vars(thing).items():
            method = (
                member.__func__
                if isinstance(member, classmethod | staticmethod)
                else member
            )
            if not n.startswith("_") and inspect.isfunction(method) and method.__doc__:
                lines += entry(f"{name}.{n}", method, source, 3)
    return lines


def api_pages(folder: Path, repository: str) -> None:
    """Write one page for each module of the package, and an index of them, into
    `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ", ".join(f"`{n}`" for n in mechtut.__all__ if n != "__version__")
    index = [
        "# API reference",
        "",
        "Every public function and class, by module.",
        "",
        f"These can be imported from `mechtut` itself: {names}.",
        "",
        "| module | what is in it |",
        "| --- | --- |",
    ]
    for found in pkgutil.walk_packages(mechtut.__path__, "mechtut."):
        name = found.name.removeprefix("mechtut.")
        if found.ispkg:
            index.append(
                f"| **{name}** | {docstring(importlib.import_module(found.name))} |"
            )
        elif not any(part.startswith("_") for part in name.split(".")):
            module = importlib.import_module(found.name)
            source = f"{repository}/blob/main/mechtut/{name.replace('.', '/')}.py"
            summary = docstring(module)
            lines = [f"# mechtut.{name}", "", summary, ""]
            for public_name, thing in public(module):
                lines += entry(public_name, thing, source)
            (folder / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
            first = summary.partition("\n")[0]
            index.append(f"| [`mechtut.{name}`]({name}.md) | {first} |")
    (folder / "index.md").write_text("\n".join(index) + "\n", encoding="utf-8")
