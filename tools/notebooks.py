"""Run every notebook once, as on Colab: `python tools/notebooks.py WHEEL ENVIRONMENT`.

A new environment holds the wheel and its `tutorials` extra and nothing else, in another
folder. Every cell runs as it is written and in its order, also the exported ones of the
library's notebooks (the step `fresh` has shown that modules hold the same code). So a
notebook that works only because of something in the checkout, or of a name that a later
cell defines, fails here.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
    # a kernel for each worker imports torch once: sooner done than compiling it all
    install = [*pip, python, "install", "--no-compile", "-c", pinned]
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
    # mechtut itself is imported by every notebook
    subprocess.run([python, "-m", "compileall", "-qq", Path(where).parent], check=True)
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
        unwanted = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
        shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=unwanted)
        (folder / "pytest.ini").write_text("[pytest]\n")
        kernel(python, folder / "jupyter")
        command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-kernel-name"]
        command += ["wheel", *arguments, "nbs"]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        clean["JUPYTER_PATH"] = str(folder / "jupyter")
        return subprocess.run(command, cwd=folder, env=clean).returncode


if __name__ == "__main__":
    sys.exit(main())
