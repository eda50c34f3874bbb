"""Import a package's modules when they are first asked for, as attributes:
`mechtut.viz.plots` (PEP 562).
"""

from collections.abc import Callable, Iterable
from importlib import import_module
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
    """The `__getattr__` and `__dir__` of a package whose modules are imported on
    demand.

    Args:
        name: The package's `__name__`.
        path: The package's `__path__`.

    Returns:
        The two functions, to be bound at the package's top level.
    """

    def get(attribute: str) -> ModuleType:
        if attribute in modules_of(path):
            return import_module(f"{name}.{attribute}")
        has = ", ".join(modules_of(path))
        raise AttributeError(
            f"package {name!r} has no {attribute!r}; its modules: {has}"
        )

    def listed() -> list[str]:
        return modules_of(path)

    return get, listed
