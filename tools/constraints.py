"""Write constraints.txt: the exact version, in the running environment, of all that
mechtut[dev] needs.

Run it in an environment where the test suite is green: `python tools/constraints.py`.

`python tools/constraints.py pip-audit .github/audit.txt` writes what a single tool
needs, with the hashes of all files that the index has of these versions, for
`pip install --require-hashes --no-deps`. constraints.txt itself goes without:
CONTRIBUTING.md says why.
"""

import json
import sys
import urllib.request
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# The versions that CI tests, written by tools/constraints.py.
# The package itself asks for lower bounds only.
"""


PYTHONS = ("3.11.0", "3.12.0", "3.13.0")


def fits(name: str) -> bool:
    """Whether the installed version of `name` can be had on the first release of every
    Python that we support.
    """
    pythons = SpecifierSet(metadata(name)["Requires-Python"] or "")
    return all(pythons.contains(p) for p in PYTHONS)


def closure(start: list[str]) -> dict[str, str]:
    """Versions of the requirements in `start` and of all that they need."""
    found: dict[str, str] = {}
    todo = [Requirement(r) for r in start]
    seen = set()
    while todo:
        req = todo.pop()
        extras = ["", *sorted(req.extras)]
        if req.marker and not req.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(req.name)
        if (name, *extras) in seen:
            continue
        seen.add((name, *extras))
        try:
            found[name] = version(name).split("+")[
                0
            ]  # torch 2.13.0+cpu is torch 2.13.0
        except PackageNotFoundError:
            continue  # an optional part that this environment does without
        for text in requires(name) or []:
            sub = Requirement(text)
            if sub.marker is None or any(
                sub.marker.evaluate({"extra": e}) for e in extras
            ):
                sub.marker = None
                todo.append(sub)
    return found


def version_of(file: str) -> str:
    """The version in the name of a wheel or a source archive, empty for others."""
    try:
        if file.endswith(".whl"):
            return str(parse_wheel_filename(file)[1])
        return str(parse_sdist_filename(file)[1])
    except (InvalidVersion, InvalidWheelFilename, InvalidSdistFilename):
        return ""  # old names that no installer takes


def hashes(name: str, version: str) -> list[str]:
    """SHA-256 of every file of a version, as the package index has them."""
    request = urllib.request.Request(
        f"https://pypi.org/simple/{name}/",
        headers={"Accept": "application/vnd.pypi.simple.v1+json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    mine = [
        f["hashes"]["sha256"] for f in files if version_of(f["filename"]) == version
    ]
    if not mine:
        raise SystemExit(f"the index has no file of {name} {version}")
    return sorted(set(mine))


def write_hashed(tool: str, file: Path) -> None:
    """Pin a tool and all that it needs but pip, which is there already, with hashes."""
    versions = closure([tool])
    versions.pop("pip", None)
    lines = [
        " \\\n    ".join([f"{n}=={v}", *(f"--hash=sha256:{h}" for h in hashes(n, v))])
        for n, v in sorted(versions.items())
    ]
    head = f"# {tool}, written by tools/constraints.py\n"
    head += "# pip install --require-hashes --no-deps -r this file\n"
    file.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file}: {len(lines)} packages")


if __name__ == "__main__":
    from configparser import ConfigParser

    if len(sys.argv) == 3:
        write_hashed(sys.argv[1], Path(sys.argv[2]))
        sys.exit()
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = [
        r
        for key, text in config["DEFAULT"].items()
        if key.endswith("requirements")
        for r in text.split()
    ]
    versions = closure(wanted)
    if loose := sorted(name for name in versions if not fits(name)):
        print(
            "left open, since the installed version does not run on all of"
            f" {', '.join(PYTHONS)}: {', '.join(loose)}"
        )
    lines = [
        f"{name}=={v}\n" for name, v in sorted(versions.items()) if name not in loose
    ]
    (ROOT / "constraints.txt").write_text(HEAD + "".join(lines), encoding="utf-8")
    print(f"constraints.txt: {len(lines)} packages")
