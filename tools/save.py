"""Export, run and clean notebooks, so that what is saved is what the tests compare.

`python tools/save.py nbs/library/models/hooks.ipynb` does one, `python tools/save.py`
all of them, in the order of the site.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).parent))
from navigation import notebooks

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
KERNEL = {  # as in nbs/conftest.py
    "OMP_NUM_THREADS": "1",  # the last digits of a sum depend on the number of threads
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",  # progress bars show times
    "PYTHONWARNINGS": (
        "ignore:IProgress not found"
    ),  # depends on whether ipywidgets is installed
}


def execute(path: Path) -> None:
    """Run a notebook from its own folder and save its outputs; cells marked `#| eval:
    false` are left out.
    """
    notebook = nbformat.read(path, as_version=4)
    skipped = {
        c.id: c.source
        for c in notebook.cells
        if c.cell_type == "code" and "#| eval: false" in c.source
    }
    for cell in notebook.cells:
        if cell.id in skipped:
            cell.source = ""
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources=resources
    ).execute()
    for cell in notebook.cells:
        cell.source = skipped.get(cell.id, cell.source)
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


def site_order() -> list[Path]:
    """Every notebook, those of _quarto.yml first and in its order."""
    listed = [ROOT / name for name in notebooks()]
    return listed + sorted(
        p
        for p in set((ROOT / "nbs").rglob("*.ipynb")) - set(listed)
        if ".ipynb_checkpoints" not in p.parts
    )


def main() -> None:
    os.environ.update(KERNEL)
    subprocess.run([BIN / "nbdev_export"], cwd=ROOT, check=True)
    for path in [Path(a).resolve() for a in sys.argv[1:]] or site_order():
        print(path.relative_to(ROOT), flush=True)
        execute(path)
    subprocess.run([BIN / "nbdev_clean"], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "tools/readme.py"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
