"""Run every notebook against the built wheel instead of the checkout: `python
tools/installed.py WHEEL [pytest arguments]`.

This is the Colab way: a new environment that holds the wheel and its `tutorials` extra
and nothing else, another folder. A copy of each notebook is made there in which the
exported cells are replaced by imports of the same names from the installed package;
every other cell, and its saved output, stays. So a notebook that works only because of
something in the checkout, or in a cell that was not exported, fails here.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPORT = re.compile(r"^#\s*\|\s*exporti?s?\b", re.MULTILINE)
DEFAULT_EXP = re.compile(r"^#\s*\|\s*default_exp\s+(\S+)", re.MULTILINE)


def defined_names(source: str) -> list[str]:
    """Names that the top level of `source` binds, other than by imports.

    >>> defined_names("import os\\nA = b = 1\\ndef f(): pass\\nx.y = 2\\nfor i in A: C =
    i") ['A', 'b', 'f', 'i', 'C']
    """
    names: dict[str, None] = {}

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = None
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = None
        elif not isinstance(
            node,
            ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp,
        ):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(source))
    return list(names)


def imports_only(source: str, module: str) -> str:
    """The cell that takes the place of an exported one: its own imports, and its names
    from the installed `module`.

    >>> print(imports_only("#| export\\nimport math\\ndef f(): return math.pi",
    "mechtut.x")) import math from mechtut.x import f
    """
    tree = ast.parse(source)
    lines = [
        ast.unparse(node)
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    if names := defined_names(source):
        lines.append(f"from {module} import {', '.join(names)}")
    return "\n".join(lines)


def rewrite(notebook: dict) -> int:
    """Replace the exported cells in place; returns how many there were."""
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    modules = [m[1] for c in code if (m := DEFAULT_EXP.search("".join(c["source"])))]
    exported = [c for c in code if EXPORT.search("".join(c["source"]))]
    for cell in exported:
        cell["source"] = imports_only("".join(cell["source"]), f"mechtut.{modules[0]}")
    return len(exported)


def wheel_python(wheel: Path, folder: Path) -> Path:
    """A Python in a new environment that has what Colab would install: the wheel and
    its `tutorials` extra.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "-q",
        "--disable-pip-version-check",
        "--python",
        python,
    ]
    subprocess.run(
        [*pip, "install", "-c", ROOT / "constraints.txt", f"{wheel}[tutorials]"],
        check=True,
    )
    code = (
        "import mechtut, sysconfig; print(mechtut.__file__);"
        " print(sysconfig.get_path('purelib'))"
    )
    told = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, cwd=folder
    )
    where, site = told.stdout.split()
    if not Path(where).is_relative_to(Path(site)):
        raise SystemExit(
            f"mechtut was imported from {where}, not from the wheel in {site}"
        )
    return python


def kernel(python: Path, folder: Path) -> None:
    """Describe that Python as the Jupyter kernel "wheel" in `folder`."""
    target = folder / "kernels/wheel/kernel.json"
    target.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    target.write_text(
        json.dumps({"argv": argv, "display_name": "wheel", "language": "python"})
    )


def main() -> int:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python tools/installed.py WHEEL [pytest arguments]")
    wheel, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="mechtut-wheel-") as temporary:
        folder = Path(temporary).resolve()
        python = wheel_python(Path(wheel).resolve(), folder / "env")
        exported = 0
        for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
            if ".ipynb_checkpoints" in path.parts:
                continue
            notebook = json.loads(path.read_text(encoding="utf-8"))
            exported += rewrite(notebook)
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(notebook), encoding="utf-8")
        (folder / "nbs/conftest.py").write_text(
            (ROOT / "nbs/conftest.py").read_text(encoding="utf-8")
        )
        (folder / "pytest.ini").write_text("[pytest]\n")
        print(
            f"{exported} exported cells replaced by imports from {Path(wheel).name}",
            flush=True,
        )
        kernel(python, folder / "jupyter")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--nbval",
            "--nbval-kernel-name",
            "wheel",
            *arguments,
            "nbs",
        ]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "JUPYTER_PATH": str(folder / "jupyter")
        }
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
