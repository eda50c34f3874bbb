"""Run every notebook once, as on Colab: `python tools/notebooks.py WHEEL ENVIRONMENT`.

A new environment holds the wheel and its `tutorials` extra and nothing else, in another
folder. Papers, guides and the index run as they are written. In the library's notebooks
the exported cells are replaced by imports of the same names from the wheel (the step
`fresh` has shown that both are the same code); every other cell, and its saved output,
stays. So a notebook that works only because of something in the checkout fails here.
"""

import ast
import hashlib
import json
import os
import re
import shutil
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
    """A Python in an environment that has what Colab would install: the wheel and its
    `tutorials` extra. One that is there already gets the new wheel only.
    """
    pinned = ROOT / "constraints.txt"
    requirements = (ROOT / "settings.ini").read_bytes() + pinned.read_bytes()
    wanted = hashlib.sha256(requirements).hexdigest()
    stamp, python = folder / "made-from", folder / "bin/python"
    if os.name == "nt":
        python = folder / "Scripts/python.exe"
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python"]
    install = [*pip, python, "install", "-c", pinned]
    if stamp.exists() and stamp.read_text() == wanted:
        quietly(*install, "--no-deps", "--force-reinstall", wheel)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        venv = [sys.executable, "-m", "venv", "--without-pip", folder]
        subprocess.run(venv, check=True)
        quietly(*install, f"{wheel}[tutorials]")
        stamp.write_text(wanted)
    code = (
        "import mechtut, sysconfig as s; print(mechtut.__file__, s.get_path('purelib'))"
    )
    told = subprocess.check_output([python, "-c", code], text=True, cwd=folder)
    where, site = told.split()
    if not Path(where).is_relative_to(Path(site)):
        sys.exit(f"mechtut was imported from {where}, not from the wheel in {site}")
    return python


def quietly(*command: object) -> None:
    """Run a command; show what it said only if it fails (pip tells of its indexes)."""
    words = [str(c) for c in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")


def kernel(python: Path, folder: Path) -> None:
    """Describe that Python as the Jupyter kernel "wheel" in `folder`."""
    target = folder / "kernels/wheel/kernel.json"
    target.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    target.write_text(
        json.dumps({"argv": argv, "display_name": "wheel", "language": "python"})
    )


def main() -> int:
    if len(sys.argv) < 3 or not Path(sys.argv[1]).is_file():
        sys.exit(
            "usage: python tools/notebooks.py WHEEL ENVIRONMENT [pytest arguments]"
        )
    wheel, environment, *arguments = sys.argv[1:]
    python = wheel_python(Path(wheel).resolve(), Path(environment).resolve())
    if arguments == ["--prepare"]:
        return 0
    with tempfile.TemporaryDirectory(prefix="mechtut-wheel-") as temporary:
        folder = Path(temporary).resolve()
        exported = 0
        for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
            if ".ipynb_checkpoints" in path.parts:
                continue
            notebook = json.loads(path.read_text(encoding="utf-8"))
            if "library" in path.parts:
                exported += rewrite(notebook)
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(notebook), encoding="utf-8")
        settings = (ROOT / "nbs/conftest.py").read_text(encoding="utf-8")
        (folder / "nbs/conftest.py").write_text(settings, encoding="utf-8")
        (folder / "pytest.ini").write_text("[pytest]\n")
        print(f"{exported} exported cells replaced by imports from {Path(wheel).name}")
        kernel(python, folder / "jupyter")
        command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-kernel-name"]
        command += ["wheel", *arguments, "nbs"]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        clean["JUPYTER_PATH"] = str(folder / "jupyter")
        return subprocess.run(command, cwd=folder, env=clean).returncode


if __name__ == "__main__":
    sys.exit(main())
