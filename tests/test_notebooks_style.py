"""The rules of the house that a machine can check: see CONTRIBUTING.md."""

import ast
import json
import re
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
MODULES = sorted(p.name for p in (ROOT / "mechtut").glob("[a-z]*.py"))
LONGEST_CELL, TYPICAL_CELL, WIDEST_LINE, LONGEST_MODULE, MOST_CELLS = (
    30,
    8,
    125,
    450,
    80,
)
MAY_BE_LONGER = {
    "class Model:": 60
}  # first line of an exported class that cannot be split -> its most lines
THIS_MACHINE = re.compile(
    r"(?<![\w./])/(home|work|tmp|root|usr|Users|var|opt)/\S+|[A-Z]:\\\\\S+| at"
    r" 0x[0-9a-f]{6,}"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS)


@cache
def cells(path: str) -> list[dict]:
    """Cells of a notebook, the source of each as one string."""
    notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return [{**c, "source": "".join(c["source"])} for c in notebook["cells"]]


def code(path: str) -> list[dict]:
    return [c for c in cells(path) if c["cell_type"] == "code" and c["source"].strip()]


def lines(cell: dict) -> list[str]:
    """The lines of code in a cell: no directives, no blank lines, no docstrings."""
    numbers = set(range(1, len(cell["source"].splitlines()) + 1))
    for node in ast.walk(parse(cell)):
        if isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) and ast.get_docstring(node):
            numbers -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    kept = [
        line
        for n, line in enumerate(cell["source"].splitlines(), 1)
        if n in numbers and line.strip()
    ]
    return [line for line in kept if not re.match(r"#\s*\||# NBVAL_", line)]


def imported(path: str) -> set[str]:
    """Dotted names of the modules that a notebook imports."""
    names = set()
    for cell in code(path):
        for node in ast.walk(parse(cell)):
            if isinstance(node, ast.ImportFrom):
                names |= {node.module or ""} | {
                    f"{node.module}.{a.name}" for a in node.names
                }
            elif isinstance(node, ast.Import):
                names |= {a.name for a in node.names}
    return names


def parse(cell: dict) -> ast.Module:
    """The cell's syntax tree, without notebook magics."""
    return ast.parse(
        "\n".join(
            re.sub(r"^(\s*)[%!].*", r"\1pass", line)
            for line in cell["source"].splitlines()
        )
    )


def exports(path: str) -> str | None:
    """The module that a notebook writes."""
    found = [
        m[1]
        for c in code(path)
        if (m := re.search(r"^#\s*\|\s*default_exp\s+(\S+)", c["source"], re.MULTILINE))
    ]
    assert len(found) <= 1, f"{path} has {len(found)} default_exp lines"
    return found[0] if found else None


@cache
def papers() -> frozenset[str]:
    return frozenset(
        f"mechtut.{m}"
        for p in NOTEBOOKS
        if p.startswith("nbs/papers/") and (m := exports(p))
    )


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
        assert not any(
            isinstance(n, ast.ImportFrom) and n.names[0].name == "*"
            for n in ast.walk(parse(cell))
        ), f"{path} {cell['id']}: name what you import, no `import *`"
    foreign = {
        n for n in imported(path) if n.split(".")[0] in {"fastcore", "nbdev", "execnb"}
    }
    assert not foreign, (
        f"{path} imports {foreign}: readers should need Python and the library only"
    )
    assert not {n for n in imported(path) if n.startswith(".")}


@each_notebook
def test_arrows_go_one_way(path):
    """models → sites → replay → papers → guides: core knows no paper, a paper knows no
    other paper.
    """
    if path.startswith(("nbs/core/", "nbs/papers/")):
        own = {f"mechtut.{exports(path)}"}
        wrong = imported(path) & (papers() - own)
        assert not wrong, (
            f"{path} imports {wrong}: what two papers need belongs in core"
        )


@each_notebook
def test_cells_are_short(path):
    for cell in code(path):
        allowed = max(
            [n for first, n in MAY_BE_LONGER.items() if first in cell["source"]],
            default=LONGEST_CELL,
        )
        assert len(lines(cell)) <= allowed, (
            f"{path} {cell['id']}: {len(lines(cell))} lines; split it"
        )
        wide = [line for line in cell["source"].splitlines() if len(line) > WIDEST_LINE]
        assert not wide, (
            f"{path} {cell['id']}: {len(wide[0])} characters, more than {WIDEST_LINE}:"
            f" {wide[0].strip()}"
        )
        ends = [line for line in lines(cell) if line.rstrip().endswith(";")]
        assert not ends, f"{path} {cell['id']}: ends with `;`: {ends[0]}"
    typical = median(len(lines(c)) for c in code(path)) if code(path) else 0
    assert typical <= TYPICAL_CELL, (
        f"{path}: the median code cell has {typical} lines, more than {TYPICAL_CELL}"
    )
    shown = [
        c
        for c in cells(path)
        if not re.match(r"#\s*\|\s*(hide|default_exp)", c["source"])
    ]
    assert len(shown) <= MOST_CELLS, (
        f"{path} has {len(shown)} cells to read: that is two rooms"
    )


@each_notebook
def test_first_code_cell_makes_the_notebook_run_on_colab(path):
    first = code(path)[0]["source"]
    assert first.startswith("#| hide\n# Colab:") and "%pip install" in first, (
        f"{path}: copy the cell of another notebook"
    )


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
            data = {
                k: v
                for k, v in output.get("data", {}).items()
                if not k.startswith("image/")
            }
            text = "".join(
                "".join(v) if isinstance(v, list) else str(v)
                for v in [output.get("text", ""), *data.values()]
            )
            found = re.search(
                r"(?<![\w./])/(home|work|tmp|root|usr|Users|var|opt)/\S+|[A-Z]:\\\\\S+|"
                r" at 0x[0-9a-f]{6,}",
                text,
            )
            assert not found, f"{where}: the output shows {found and found[0]!r}"


@each_notebook
def test_metadata(path):
    notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [c["id"] for c in notebook["cells"]]
    assert len(set(ids)) == len(ids), f"{path}: two cells have the same id"


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name):
    count = len((ROOT / "mechtut" / name).read_text(encoding="utf-8").splitlines())
    assert count <= LONGEST_MODULE, (
        f"mechtut/{name} has {count} lines, more than {LONGEST_MODULE}: that is two"
        " rooms"
    )


def test_every_module_is_exported_by_one_notebook():
    written = [m for p in NOTEBOOKS if (m := exports(p))]
    assert sorted(written) == sorted(n.removesuffix(".py") for n in MODULES)


def test_quarto_lists_every_notebook():
    def files(node) -> list[str]:
        if isinstance(node, str):
            return [node]
        if isinstance(node, dict):
            return [
                f
                for key in ("contents", "href", "file")
                if key in node
                for f in files(node[key])
            ]
        return [f for child in node for f in files(child)]

    listed = files(
        yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"][
            "contents"
        ]
    )
    assert len(set(listed)) == len(listed)
    assert not (gone := [f for f in listed if not (ROOT / f).is_file()]), (
        f"_quarto.yml lists files that do not exist: {gone}"
    )
    assert not (missing := sorted(set(NOTEBOOKS) - set(listed))), (
        f"add to the sidebar in _quarto.yml: {missing}"
    )


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
