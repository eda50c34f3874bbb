"""How the package is put together: modules on demand, and which module imports which.

Nothing here imports anything heavy, so that `import mechtut` stays quick.
"""

import ast
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType


def modules_of(path: Iterable[str]) -> list[str]:
    """Names of the public modules and packages below a package's `__path__`.

    Args:
        path: The package's `__path__`.

    Returns:
        The names, sorted, without those that begin with an underscore.
    """
    return sorted(m.name for m in iter_modules(path) if not m.name.startswith("_"))


def lazy_package(
    name: str, path: Iterable[str]
) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose modules come on demand.

    Args:
        name: The package's `__name__`.
        path: The package's `__path__`.

    Returns:
        The two functions, to be bound at the package's top level (PEP 562).
    """

    def get(attribute: str) -> ModuleType:
        if attribute in modules_of(path):
            return import_module(f"{name}.{attribute}")
        has = ", ".join(modules_of(path))
        raise AttributeError(f"package {name!r} has no {attribute!r}; it has {has}")

    def listed() -> list[str]:
        return modules_of(path)

    return get, listed


def imports_in(
    source: str, package: str = "", names: dict[str, str] | None = None
) -> set[str]:
    """Modules of mechtut that a piece of Python code imports, also inside functions.

    Args:
        source: The code.
        package: The package that it stands in, for relative imports.
        names: Where the names are that `mechtut` itself offers.

    Returns:
        Dotted names; `from mechtut.viz import plots` counts as `mechtut.viz.plots`.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(up if node.level else []), node.module or ""]).rstrip(
                "."
            )
            found |= {base, *(f"{base}.{a.name}" for a in node.names)}
    offered = {f"mechtut.{n}": f"mechtut.{m}" for n, m in (names or {}).items()}
    found = {offered.get(name, name) for name in found}
    return {name for name in found if name.split(".")[0] == "mechtut"}


def import_graph(
    root: Path, names: dict[str, str] | None = None
) -> dict[str, set[str]]:
    """Which module of the package imports which, read from their source.

    Args:
        root: The folder of the package.
        names: Where the names are that `mechtut` itself offers.

    Returns:
        For each module, by dotted name, the modules that it imports.
    """
    files = {}
    for file in sorted(root.rglob("*.py")):
        parts = [root.name, *file.relative_to(root).with_suffix("").parts]
        if parts[-1] not in ("__init__", "_modidx"):
            files[".".join(parts)] = file.read_text(encoding="utf-8")
    graph = {}
    for module, source in files.items():
        found = imports_in(source, module.rpartition(".")[0], names)
        graph[module] = (found & files.keys()) - {module}
    return graph
