"""Pages of the API reference, written from the signatures and docstrings of the
package: used by `tools/build_docs.py`.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
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
    written = annotation
    if not isinstance(annotation, str):
        written = inspect.formatannotation(annotation)
    written = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", written)  # no module paths
    return f"`{written}`".replace("|", "\\|")


SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")


def sections(thing: Any) -> dict[str, str]:
    """A docstring in parts: its text under "", then each of `SECTIONS` that it has."""
    written = inspect.getdoc(thing) or ""
    if dataclasses.is_dataclass(thing) and written.startswith(f"{thing.__name__}("):
        return {"": ""}  # the one that `dataclass` makes up
    mark = re.compile(rf"^({'|'.join(SECTIONS)}):$\n?", re.MULTILINE)
    first, *rest = mark.split(written)
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return {"": first.strip()} | {k: textwrap.dedent(v).strip() for k, v in pairs}


def items(text: str) -> dict[str, str]:
    """The entries of a section: what is named and what is said of it."""
    found = re.findall(r"^(\S+): ((?:.*\n?)(?:^[ ].*\n?)*)", text, re.MULTILINE)
    return {name.lstrip("*"): " ".join(said.split()) for name, said in found}


def table(thing: Any, said: dict[str, str]) -> list[str]:
    """The parameters of a function, or of a class, as a table."""
    try:
        signature = inspect.signature(thing).parameters.items()
    except (TypeError, ValueError):
        return []
    parameters = [p for n, p in signature if n not in ("self", "cls")]
    if not parameters:
        return []
    head = ["", "| parameter | type | default | what it is |"]
    lines = [*head, "| --- | --- | --- | --- |"]
    for p in parameters:
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = "" if p.default is p.empty else f"`{p.default!r}`"
        default = "made anew" if "factory" in repr(p.default) else default
        cells = [f"`{stars}{p.name}`", text(p.annotation)]
        cells += [default.replace("|", chr(92) + "|"), safe(said.get(p.name, ""))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def safe(written: str) -> str:
    """Text as it stands in Markdown: brackets and stars in it are meant."""
    pieces = re.split(r"(```.*?```|`[^`]*`|\$[^$]+\$)", written, flags=re.DOTALL)
    escaped = [re.sub(r"([\[\]*_<>|{}])", r"\\\1", p) for p in pieces]
    both = zip(pieces, escaped, strict=True)
    return "".join(p if i % 2 else e for i, (p, e) in enumerate(both))


def entry(name: str, thing: Any, source: str, level: int = 2) -> list[str]:
    """Heading, text, parameters, what comes back and an example, with the methods of a
    class behind it.
    """
    kind = "class" if inspect.isclass(thing) else "function" if level == 2 else "method"
    told = sections(thing)
    said = items(told.get("Args", "")) | items(told.get("Attributes", ""))
    lines = ["#" * level + f" {name}", ""]
    lines += [f"*{kind}* · [source]({source}#L{line(thing)})", "", safe(told[""])]
    lines += [*table(thing, said), ""]
    for part in ("Returns", "Yields"):
        if part in told:
            lines += [f"**{part}** {safe(told[part])}", ""]
    if "Raises" in told:
        lines += ["**Raises**", ""]
        lines += [f"- `{n}`: {safe(w)}" for n, w in items(told["Raises"]).items()]
    if "Example" in told:
        lines += ["", "```pycon", told["Example"], "```", ""]
    if inspect.isclass(thing):
        for n, member in vars(thing).items():
            method = getattr(member, "__func__", member)
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
            what = importlib.import_module(found.name).__doc__ or ""
            index.append(f"| **{name}** | {safe(what)} |")
        elif not any(part.startswith("_") for part in name.split(".")):
            module = importlib.import_module(found.name)
            source = f"{repository}/blob/main/mechtut/{name.replace('.', '/')}.py"
            summary = safe(inspect.getdoc(module) or "")
            lines = [f"# mechtut.{name}", "", summary, ""]
            for public_name, thing in public(module):
                lines += entry(public_name, thing, source)
            (folder / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
            first = summary.partition("\n")[0]
            index.append(f"| [`mechtut.{name}`]({name}.md) | {first} |")
    (folder / "index.md").write_text("\n".join(index) + "\n", encoding="utf-8")
