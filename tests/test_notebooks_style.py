"""What protects readers of the notebooks, as far as a machine can check it.

Lengths are judgement and not rules: `tools/lengths.py` reports them.
"""

import ast
import configparser
import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest

import mechtut
from mechtut._packages import import_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from navigation import notebooks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
WRITTEN_BY_HAND = ("__init__", "__main__", "_packages", "_modidx")
MODULES = sorted(
    ".".join(p.relative_to(ROOT / "mechtut").with_suffix("").parts)
    for p in (ROOT / "mechtut").rglob("*.py")
    if p.stem not in WRITTEN_BY_HAND
)
WIDEST_LINE = 88
# Packages from the bottom up, and what each may import beside itself.
MAY_IMPORT = {
    "models": set(),
    "viz": set(),
    "patching": {"models", "viz"},
    "mini": {"models"},
    "prompts": {"models", "patching", "mini"},
    "editing": {"models", "patching", "prompts", "mini"},
    "circuits": {"models", "patching", "viz"},
    "lenses": {"models", "patching", "viz"},
    "steering": {"models", "patching", "prompts", "mini", "lenses", "viz"},
    "neurons": {"models", "patching", "viz"},
    "grokking": {"models", "patching", "viz"},
    "papers": {
        *("models", "patching", "mini", "prompts", "editing", "circuits", "lenses"),
        *("neurons", "steering", "grokking", "viz"),
    },
}
MAY_IMPORT["experiments"] = {*MAY_IMPORT, "papers"}
THIS_MACHINE = re.compile(
    r"(?<![\w./])/(home|work|tmp|root|usr|Users|var|opt)/\S+"
    r"|[A-Z]:\\\\\S+| at 0x[0-9a-f]{6,}"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS)


@cache
def cells(path: str) -> list[dict]:
    """Cells of a notebook, the source of each as one string."""
    notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return [{**c, "source": "".join(c["source"])} for c in notebook["cells"]]


def code(path: str) -> list[dict]:
    return [c for c in cells(path) if c["cell_type"] == "code" and c["source"].strip()]


def parse(cell: dict) -> ast.Module:
    """The cell's syntax tree, without notebook magics."""
    lines = cell["source"].splitlines()
    return ast.parse("\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", x) for x in lines))


def imported(path: str) -> set[str]:
    """Dotted names of the modules that a notebook imports."""
    names = set()
    for cell in code(path):
        for node in ast.walk(parse(cell)):
            if isinstance(node, ast.ImportFrom):
                names |= {node.module or ""}
            elif isinstance(node, ast.Import):
                names |= {a.name for a in node.names}
    return names


def exports(path: str) -> str | None:
    """The module that a notebook writes."""
    mark = re.compile(r"^#\s*\|\s*default_exp\s+(\S+)", re.MULTILINE)
    found = [m[1] for c in code(path) if (m := mark.search(c["source"]))]
    assert len(found) <= 1, f"{path} has {len(found)} default_exp lines"
    return found[0] if found else None


@each_notebook
def test_begins_with_title_and_summary(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown", f"{path}: the first cell is not text"
    assert re.match(r"# .+\n+> .+", first["source"]), (
        f"{path}: begin with `# Title` and `> one line that says what it is`"
    )


@each_notebook
def test_imports(path):
    for cell in code(path):
        stars = [n for n in ast.walk(parse(cell)) if isinstance(n, ast.ImportFrom)]
        assert not any(n.names[0].name == "*" for n in stars), (
            f"{path} {cell['id']}: name what you import, no `import *`"
        )
    parts = {n.split(".")[0] for n in imported(path)}
    foreign = parts & {"fastcore", "nbdev", "execnb"}
    assert not foreign, f"{path} imports {foreign}: readers should not need it"
    assert not {n for n in imported(path) if n.startswith(".")}


@cache
def graph() -> dict[str, set[str]]:
    return import_graph(ROOT / "mechtut", mechtut._WHERE)


def test_packages_are_those_of_the_plan():
    packages = {p.name for p in (ROOT / "mechtut").iterdir() if p.is_dir()}
    assert packages - {"data", "__pycache__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", [m for m in MODULES if "." in m])
def test_imports_point_downward(module):
    """models → patching → prompts → circuits … → papers; a paper knows no paper."""
    package = module.split(".")[0]
    allowed = MAY_IMPORT[package] | ({package} if package != "papers" else set())
    used = {m.split(".")[1] for m in graph()[f"mechtut.{module}"] if m.count(".") > 1}
    assert not (wrong := used - allowed), (
        f"mechtut.{module} imports from {sorted(wrong)}; mechtut.{package} may use"
        f" {sorted(allowed)}: what two packages need moves down"
    )


def test_private_names_stay_in_their_module():
    """What another module uses is a name without underscore; `#| exporti` keeps it out
    of `__all__` and the API pages.
    """
    for module in MODULES:
        path = ROOT / "mechtut" / (module.replace(".", "/") + ".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        taken = [
            f"{n.module}.{a.name}"
            for n in froms
            if n.level or (n.module or "").startswith("mechtut")
            for a in n.names
            if a.name.startswith("_") and not a.name.startswith("__")
        ]
        assert not taken, f"{module} imports the private {', '.join(taken)}"


def test_no_module_only_hands_on_what_others_define():
    for module in MODULES:
        path = ROOT / "mechtut" / (module.replace(".", "/") + ".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = ast.FunctionDef | ast.ClassDef
        assert any(isinstance(n, kinds) for n in tree.body), f"{module} defines nothing"
        exported = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
        again = [a.name for n in exported for a in n.names if a.asname == a.name]
        assert not again, f"{module} imports {again} only to hand them on"


@each_notebook
def test_code_fits_the_page(path):
    for cell in code(path):
        wide = [x for x in cell["source"].splitlines() if len(x) > WIDEST_LINE]
        assert not wide, (
            f"{path} {cell['id']}: {len(wide[0])} characters, more than {WIDEST_LINE}:"
            f" {wide[0].strip()}"
        )


@each_notebook
def test_first_code_cell_makes_the_notebook_run_on_colab(path):
    first = code(path)[0]["source"]
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    version = settings["DEFAULT"]["version"]
    assert first.startswith("#| hide\n# Colab:") and "!pip install" in first, (
        f"{path}: copy the cell of another notebook"
    )
    assert f'release = "{version}"' in first, f"{path}: installs another release"
    badge = f"https://colab.research.google.com/github/mechtut/mechtut/blob/v{version}/"
    assert f"({badge}{path})" in cells(path)[0]["source"], f"{path}: no badge"


@each_notebook
def test_links_lead_somewhere_from_any_place(path):
    """On Colab, in an editor or on GitHub: links between pages are absolute there, and
    the site's builder makes them relative and checks them.
    """
    for cell in cells(path):
        if cell["cell_type"] == "markdown":
            found = re.findall(r"\]\((?!\w+:|#)[^)\s]+\.(?:ipynb|md)\b", cell["source"])
            assert not found, f"{path} {cell['id']}: write the page's address: {found}"


@each_notebook
def test_outputs_are_the_same_everywhere(path):
    """No traceback, no path of this machine, no progress bar or warning is saved."""
    for cell in code(path):
        for output in cell["outputs"]:
            where = f"{path} {cell['id']}"
            assert output["output_type"] != "error", (
                f"{where}: a traceback is saved; catch the error and print it"
            )
            assert output.get("name") != "stderr", (
                f"{where}: saved stderr: {''.join(output.get('text', ''))[:200]}"
            )
            data = output.get("data", {})
            shown = [v for k, v in data.items() if not k.startswith("image/")]
            parts = [output.get("text", ""), *shown]
            text = "".join("".join(v) if isinstance(v, list) else str(v) for v in parts)
            found = THIS_MACHINE.search(text)
            assert not found, f"{where}: the output shows {found and found[0]!r}"


@each_notebook
def test_metadata(path):
    notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [c["id"] for c in notebook["cells"]]
    assert len(set(ids)) == len(ids), f"{path}: two cells have the same id"


def test_every_module_is_exported_by_one_notebook():
    written = {m: p for p in NOTEBOOKS if (m := exports(p))}
    assert sorted(written) == MODULES
    for module, path in written.items():
        package, _, room = module.rpartition(".")
        name = re.sub(r"^\d+_", "", Path(path).stem)
        assert name == room.lstrip("_"), f"{path} writes {module}"
        folder = "nbs/papers" if package == "papers" else f"nbs/library/{package}"
        folder = folder.rstrip("/")
        assert Path(path).parent.as_posix() == folder, f"{path} writes {module}"


def test_tests_stand_beside_what_they_test():
    for path in (ROOT / "tests").rglob("test_*.py"):
        package = path.parent.name
        if package == "tests":
            continue
        assert package in MAY_IMPORT, f"{path}: there is no package {package}"
        tested = path.stem.removeprefix("test_")
        rooms = [m.split(".")[1].lstrip("_") for m in MODULES if m.startswith(package)]
        assert tested.startswith(tuple(rooms)), f"{path.name}: no module of that name"


def test_quarto_lists_every_notebook():
    listed = notebooks()
    assert len(set(listed)) == len(listed)
    gone = [f for f in listed if not (ROOT / f).is_file()]
    assert not gone, f"_quarto.yml lists files that do not exist: {gone}"
    missing = sorted(set(NOTEBOOKS) - set(listed))
    assert not missing, f"add to the sidebar in _quarto.yml: {missing}"


@pytest.mark.parametrize("path", [*NOTEBOOKS, "README.md", "CONTRIBUTING.md"])
def test_links_to_files_work(path):
    if path.endswith(".ipynb"):
        text = "\n".join(
            c["source"] for c in cells(path) if c["cell_type"] == "markdown"
        )
    else:
        text = (ROOT / path).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            file = (ROOT / path).parent / target.split("#")[0]
            assert file.exists(), f"{path} links to {target}, which does not exist"


def test_promises_name_tests_that_are_there():
    page = "nbs/guides/08_promises.ipynb"
    text = "\n".join(c["source"] for c in cells(page) if c["cell_type"] == "markdown")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    for file, test in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{page}: no {test} in {file}"
