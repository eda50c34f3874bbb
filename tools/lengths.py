"""A report of lengths, to be read and not obeyed: the longest exported cells, modules
and functions, and what a reader sees between exported cells.
"""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPORT = re.compile(r"^#\s*\|\s*exporti?\b", re.MULTILINE)
NEVER_SEEN = re.compile(r"^#\s*\|\s*(hide|default_exp)\b|^# Colab:", re.MULTILINE)


def code_lines(source: str) -> int:
    """Lines of code: no docstrings, no comments, no blank lines."""
    numbers = set(range(1, len(source.splitlines()) + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            first = node.body[0]
            numbers -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = [x for n, x in enumerate(source.splitlines(), 1) if n in numbers]
    return sum(bool(x.strip()) and not x.lstrip().startswith("#") for x in lines)


def only_imports(source: str) -> bool:
    """Whether a cell holds nothing but imports."""
    body = ast.parse(source).body
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def runs(cells: list[dict]) -> list[int]:
    """How many exported cells stand between two that show or check something."""
    found, count = [], 0
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if EXPORT.search(source):
            count += not only_imports(source)
        elif not NEVER_SEEN.search(source):
            found.append(count)
            count = 0
    return [*found, count]


def main() -> None:
    cells, modules, long_runs = [], [], []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))["cells"]
        name = path.relative_to(ROOT / "nbs").as_posix()
        for cell in notebook:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and EXPORT.search(source):
                cells.append((code_lines(source), f"{name} {cell['id']}"))
        long_runs += [(n, name) for n in runs(notebook) if n > 2]
    for path in (ROOT / "mechtut").rglob("*.py"):
        if path.name != "_modidx.py":
            lines = code_lines(path.read_text(encoding="utf-8"))
            modules.append((lines, path.relative_to(ROOT).as_posix()))
    for title, rows in (
        ("longest exported cells", cells),
        ("longest modules", modules),
        ("most exported cells with nothing to see or check between", long_runs),
    ):
        print(f"{title}: " + ", ".join(f"{b} {a}" for a, b in sorted(rows)[:-6:-1]))


if __name__ == "__main__":
    main()
