"""Which tests and notebooks a change can reach by imports: for `check.py --changed`.

A changed notebook or module reaches every module that imports it, directly or through
others, and every test and notebook that uses one of those.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import mechtut  # noqa: E402
from mechtut._packages import import_graph, imports_in  # noqa: E402

DEFAULT_EXP = re.compile(r"^#\s*\|\s*default_exp\s+(\S+)", re.MULTILINE)
ALWAYS = ("tests/test_notebooks_style.py", "tests/test_packaging.py")
SITE = ("docs/", "_quarto.yml", "tools/")


def changed_files(commit: str) -> set[str]:
    """Files that differ from a commit, also those that git does not know yet."""
    found = set()
    for command in (
        ["diff", "--name-only", commit],
        ["ls-files", "--others", "--exclude-standard"],
    ):
        out = subprocess.check_output(["git", *command], cwd=ROOT, text=True)
        found |= set(out.splitlines())
    return found


def code_of(notebook: Path) -> str:
    """All code of a notebook, without magics."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return re.sub(r"^(\s*)[%!].*", r"\1pass", "\n".join(code), flags=re.MULTILINE)


def closure(graph: dict[str, set[str]], start: set[str]) -> set[str]:
    """`start` and all modules that import one of these, directly or not."""
    reached = set(start)
    while more := {m for m, uses in graph.items() if uses & reached} - reached:
        reached |= more
    return reached


def reached(commit: str = "HEAD") -> tuple[list[str], list[str]]:
    """Paths of the tests and of the notebooks that the change can reach."""
    files = changed_files(commit)
    notebooks = {p: code_of(p) for p in sorted((ROOT / "nbs").rglob("*.ipynb"))}
    module_of = {}
    for path, code in notebooks.items():
        if found := DEFAULT_EXP.search(code):
            module_of[path.relative_to(ROOT).as_posix()] = f"mechtut.{found[1]}"
    touched = {module_of[f] for f in files if f in module_of}
    for f in files:
        if f.startswith("mechtut/data/"):
            touched |= {"mechtut.models.weights", "mechtut.mini.world"}
        elif f.startswith("mechtut/") and f.endswith(".py"):
            touched.add(f.removesuffix(".py").replace("/", "."))
    graph = import_graph(ROOT / "mechtut", mechtut._WHERE)
    modules = closure(graph, touched)
    helpers = {Path(f).stem for f in files if re.fullmatch(r"tests/\w+\.py", f)}
    tests = set(ALWAYS) if files else set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name, source = (
            path.relative_to(ROOT).as_posix(),
            path.read_text(encoding="utf-8"),
        )
        uses = imports_in(source, names=mechtut._WHERE)
        by_helper = any(re.search(rf"^from {h} import", source, re.M) for h in helpers)
        if name in files or uses & modules or by_helper:
            tests.add(name)
    tests |= {m.replace(".", "/") + ".py" for m in modules if m.count(".") > 1}
    if not any(f.startswith(SITE) for f in files):
        tests.discard("tests/test_site.py")
    chosen = []
    for path, code in notebooks.items():
        name = path.relative_to(ROOT).as_posix()
        uses = imports_in(code, names=mechtut._WHERE)
        if name in files or uses & modules or module_of.get(name) in modules:
            chosen.append(name)
    return sorted(tests), chosen
