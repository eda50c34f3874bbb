"""The whole test suite, one step after another; the first that fails ends it.

`python tools/check.py` runs all steps, `python tools/check.py fresh lint` the named
ones. Steps: fresh (what is generated agrees with the notebooks), lint (ruff, mypy),
tests (pytest), notebooks (every notebook, every output), build (wheel and sdist),
installed (every notebook again, on the built wheel).
"""

import filecmp
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
WORKERS = [
    "-n",
    str(min(os.cpu_count() or 1, 8)),
    "--dist",
    "loadfile",
]  # a notebook stays in one kernel
COLOUR = [] if sys.stdout.isatty() else ["--color=no"]
WRITTEN_BY_HAND = {"__init__.py", "__main__.py", "_lazy.py"}
MUST_BE_PACKED = [
    "py.typed",
    "data/mini/config.json",
    "data/mini/tokenizer.json",
    "data/mini/model.safetensors",
]


def run(*command: object, cwd: Path = ROOT) -> None:
    """Run a command; if it fails, so does the suite."""
    subprocess.run(
        [str(c) for c in command], cwd=cwd, check=True, stdin=subprocess.DEVNULL
    )


def fail(message: str) -> None:
    print(f"FAILED: {message}", flush=True)
    sys.exit(1)


def python_m(*arguments: object) -> None:
    run(sys.executable, "-m", *arguments)


def files_of(folder: Path, *patterns: str) -> set[str]:
    """Relative paths of the files below `folder` that match."""
    found = {
        p
        for pattern in patterns
        for p in folder.glob(pattern)
        if ".ipynb_checkpoints" not in p.parts
    }
    return {p.relative_to(folder).as_posix() for p in found if p.is_file()}


def fresh() -> None:
    """Export and clean a copy: the modules, the notebooks and README.md must be what is
    in the checkout.
    """
    watched = [
        "settings.ini",
        "pyproject.toml",
        "README.md",
        "mechtut/**/*.py",
        "nbs/**/*.ipynb",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "mechtut"
        for name in files_of(ROOT, *watched, "tools/*.py", "docs/figures/*"):
            if not name.startswith("mechtut/") or Path(name).name in WRITTEN_BY_HAND:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        run(BIN / "nbdev_export", cwd=copy)
        run(BIN / "nbdev_clean", cwd=copy)
        if (copy / "nbs/index.ipynb").exists():
            run(sys.executable, "tools/readme.py", cwd=copy)
        watched.append("docs/figures/*")
        theirs, ours = files_of(copy, *watched), files_of(ROOT, *watched)
        stale = [
            n
            for n in sorted(theirs & ours)
            if not filecmp.cmp(ROOT / n, copy / n, shallow=False)
        ]
        stale += [f"{n} (no notebook writes it)" for n in sorted(ours - theirs)]
        stale += [f"{n} (missing)" for n in sorted(theirs - ours)]
    if stale:
        fail(
            "these differ from what the notebooks give:\n  "
            + "\n  ".join(stale)
            + "\nRun `python tools/save.py NOTEBOOK`, look at the difference and"
            " commit it."
        )
    print(f"{len(ours)} files agree with the notebooks")


def lint() -> None:
    """Style of all Python files, and types of the package."""
    folders = [
        f
        for f in (
            "mechtut",
            "tests",
            "tools",
            "benchmarks",
            "nbs/conftest.py",
            "setup.py",
        )
        if (ROOT / f).exists()
    ]
    python_m("ruff", "check", *folders)
    mine = [p for p in (ROOT / "mechtut").rglob("*.py") if p.name in WRITTEN_BY_HAND]
    handwritten = [*mine, *folders[1:]]  # exported cells keep the notebook's layout
    python_m("ruff", "format", "--check", *handwritten)
    python_m("mypy")


def tests() -> None:
    """Everything in tests/."""
    python_m("pytest", "-q", *COLOUR, *WORKERS, "tests")


def notebooks() -> None:
    """Every cell of every notebook, its output compared with the saved one."""
    python_m("pytest", "-q", "--nbval", "--nbval-current-env", *COLOUR, *WORKERS, "nbs")


def build() -> None:
    """Wheel and sdist into dist/; both must hold the embedded model and the type
    marker.
    """
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    shutil.rmtree(
        ROOT / "build", ignore_errors=True
    )  # setuptools would pack what an earlier build left there
    with (
        tempfile.TemporaryDirectory() as temporary
    ):  # build the sdist, then the wheel from the sdist alone
        log = Path(temporary) / "log"
        with log.open("w") as out:
            built = subprocess.run(
                [sys.executable, "-m", "build", "-o", "dist"],
                cwd=ROOT,
                stdout=out,
                stderr=out,
            )
        if built.returncode:
            print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
            fail("the build")
    (wheel,) = (ROOT / "dist").glob("*.whl")
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as z, tarfile.open(sdist) as tar:
        packed = {wheel: z.namelist(), sdist: tar.getnames()}
    modules = (ROOT / "mechtut").rglob("*.py")
    wanted = {p.relative_to(ROOT / "mechtut").as_posix() for p in modules} | set(
        MUST_BE_PACKED
    )
    wanted |= {
        p.relative_to(ROOT / "mechtut").as_posix()
        for p in (ROOT / "mechtut/data").rglob("*")
        if p.is_file()
    }
    for archive, names in packed.items():
        if missing := sorted(
            w for w in wanted if not any(n.endswith(f"mechtut/{w}") for n in names)
        ):
            fail(f"{archive.name} lacks {', '.join(missing)}")
        print(
            f"{archive.name}: {len(names)} files, {archive.stat().st_size / 1e6:.1f} MB"
        )


def installed() -> None:
    """Every notebook again, with the package from the wheel."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    run(sys.executable, "tools/installed.py", wheel, "-q", *COLOUR, *WORKERS)


STEPS = [fresh, lint, tests, notebooks, build, installed]


def main() -> None:
    by_name = {step.__name__: step for step in STEPS}
    names = sys.argv[1:] or list(by_name)
    if unknown := [n for n in names if n not in by_name]:
        sys.exit(f"no step {', '.join(unknown)}; the steps are {', '.join(by_name)}")
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # outputs were saved with one thread, and the workers share the cores
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    times = []
    for name in names:
        print(f"\n=== {name}: {by_name[name].__doc__}", flush=True)
        start = time.monotonic()
        try:
            by_name[name]()
        except subprocess.CalledProcessError as error:
            fail(
                f"step {name}, exit code {error.returncode}. Again, alone: python"
                f" tools/check.py {name}"
            )
        times.append(f"{name} {time.monotonic() - start:.0f} s")
        print(f"--- {times[-1]}", flush=True)
    print(f"\nAll green: {', '.join(times)}", flush=True)


if __name__ == "__main__":
    main()
