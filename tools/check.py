"""The whole test suite, one step after another; the first that fails ends it.

`python tools/check.py` runs all steps, `python tools/check.py fresh lint` the named
ones, and `python tools/check.py --changed [COMMIT]` what a change since a commit (by
default the last one) can reach by imports. Steps: build (sdist and wheel), fresh (what
is generated agrees with the notebooks), lint (ruff, mypy), tests (pytest, doctests),
notebooks (every notebook once, on the installed wheel). Each tells its slowest parts.
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
WHEEL_ENVIRONMENT = ROOT / "build/wheel-environment"
# a notebook stays in one worker, and long ones come first
WORKERS = ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "loadfile"]
WORKERS += ["--no-loadscope-reorder"]
COLOUR = [] if sys.stdout.isatty() else ["--color=no"]
WRITTEN_BY_HAND = {"__init__.py", "__main__.py", "_packages.py"}
MUST_BE_PACKED = ["py.typed"]
MUST_BE_PACKED += [f"data/mini/{f}.json" for f in ("config", "tokenizer")]
MUST_BE_PACKED += ["data/mini/model.safetensors"]
MUST_BE_PACKED += [
    f"data/{f}.json" for f in ("facts", "tasks", "sentence_pairs", "texts")
]
spent: list[tuple[float, str]] = []  # seconds of each command of the present step


def run(*command: object, cwd: Path = ROOT) -> None:
    """Run a command; if it fails, so does the suite."""
    words, start = [str(c) for c in command], time.monotonic()
    subprocess.run(words, cwd=cwd, check=True, stdin=subprocess.DEVNULL)
    name = " ".join(Path(w).name if "/" in w else w for w in words[:6])
    spent.append((time.monotonic() - start, name))


def fail(message: str) -> None:
    print(f"FAILED: {message}", flush=True)
    sys.exit(1)


def python_m(*arguments: object) -> None:
    run(sys.executable, "-m", *arguments)


def files_of(folder: Path, *patterns: str) -> set[str]:
    """Relative paths of the files below `folder` that match."""
    found = {p for pattern in patterns for p in folder.glob(pattern)}
    mine = {p for p in found if ".ipynb_checkpoints" not in p.parts and p.is_file()}
    return {p.relative_to(folder).as_posix() for p in mine}


def build() -> None:
    """Wheel and sdist into dist/; both must hold package, data and types."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    # setuptools would pack what an earlier build left there
    for old in ("lib", "bdist.linux-x86_64"):
        shutil.rmtree(ROOT / "build" / old, ignore_errors=True)
    command = [sys.executable, "-m", "build", "-o", "dist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print("\n".join((done.stdout + done.stderr).splitlines()[-40:]))
        fail("the build")
    (wheel,) = (ROOT / "dist").glob("*.whl")
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as z, tarfile.open(sdist) as tar:
        packed = {wheel: z.namelist(), sdist: tar.getnames()}
    wanted = files_of(ROOT / "mechtut", "**/*.py", "data/**/*") | set(MUST_BE_PACKED)
    for archive, names in packed.items():
        lacks = [
            w for w in wanted if not any(n.endswith(f"mechtut/{w}") for n in names)
        ]
        if lacks:
            fail(f"{archive.name} lacks {', '.join(sorted(lacks))}")
        size = archive.stat().st_size / 1e6
        print(f"{archive.name}: {len(names)} files, {size:.1f} MB")


def wheel_environment() -> subprocess.Popen:
    """Begin to install the wheel into an environment of its own, beside other work."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    command = [sys.executable, "tools/notebooks.py", wheel, WHEEL_ENVIRONMENT]
    return subprocess.Popen([*map(str, command), "--prepare"], cwd=ROOT)


def fresh() -> None:
    """Export and clean a copy: modules, notebooks, README.md must be as checked out."""
    watched = ["settings.ini", "pyproject.toml", "README.md", "mechtut/**/*.py"]
    watched += ["nbs/**/*.ipynb"]
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "mechtut"
        for name in files_of(ROOT, *watched, "tools/*.py", "docs/figures/*"):
            if name.startswith("mechtut/") and Path(name).name not in WRITTEN_BY_HAND:
                continue
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        run(BIN / "nbdev_export", cwd=copy)
        run(BIN / "nbdev_clean", cwd=copy)
        run(sys.executable, "tools/readme.py", cwd=copy)
        watched.append("docs/figures/*")
        theirs, ours = files_of(copy, *watched), files_of(ROOT, *watched)
        both = sorted(theirs & ours)
        differ = filecmp.cmpfiles(ROOT, copy, both, shallow=False)
        stale = [*differ[1], *differ[2]]
        stale += [f"{n} (no notebook writes it)" for n in sorted(ours - theirs)]
        stale += [f"{n} (missing)" for n in sorted(theirs - ours)]
    if stale:
        fail(
            "these differ from what the notebooks give:\n  "
            + "\n  ".join(stale)
            + "\nRun `python tools/save.py NOTEBOOK`, look at it and commit it."
        )
    print(f"{len(ours)} files agree with the notebooks")


def lint() -> None:
    """Style of all Python files, types of the package, and a report of lengths."""
    folders = ["mechtut", "tests", "tools", "benchmarks", "nbs/conftest.py", "setup.py"]
    python_m("ruff", "check", *folders)
    mine = [p for p in (ROOT / "mechtut").rglob("*.py") if p.name in WRITTEN_BY_HAND]
    python_m("ruff", "format", "--check", *mine, *folders[1:])
    python_m("mypy")
    run(sys.executable, "tools/lengths.py")


def tests(*paths: object) -> None:
    """Everything in tests/, and the examples in docstrings."""
    chosen = paths or ("tests", "mechtut")
    slow = ["--durations=10", "--durations-min=1", "--doctest-modules"]
    python_m("pytest", "-q", *slow, *COLOUR, *WORKERS, *chosen)


def notebooks(*paths: object) -> None:
    """Every cell of every notebook, with the package from the wheel."""
    quiet = ["-q", *COLOUR, *WORKERS]
    if paths:  # the inner loop: as they are, in this environment
        python_m("pytest", "--nbval", "--nbval-current-env", *quiet, *paths)
        return
    (wheel,) = (ROOT / "dist").glob("*.whl")
    run(sys.executable, "tools/notebooks.py", wheel, WHEEL_ENVIRONMENT, *quiet)


def report(name: str, start: float) -> str:
    """Print how long a step took, and its slowest commands."""
    if len(spent) > 1:
        print("slowest commands:")
        for seconds, command in sorted(spent, reverse=True)[:10]:
            print(f"{seconds:7.1f} s  {command}")
    spent.clear()
    line = f"{name} {time.monotonic() - start:.0f} s"
    print(f"--- {line}", flush=True)
    return line


def main() -> None:
    # outputs were saved with one thread, and the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    steps = {
        step.__name__: (step, ()) for step in (build, fresh, lint, tests, notebooks)
    }
    names = sys.argv[1:]
    if names[:1] == ["--changed"]:
        sys.path.insert(0, str(Path(__file__).parent))
        from changed import reached

        some_tests, some_notebooks = reached(*names[1:2])
        print(f"{len(some_tests)} test files, {len(some_notebooks)} notebooks")
        steps = {n: steps[n] for n in ("fresh", "lint")}
        steps |= {"tests": (tests, some_tests)} if some_tests else {}
        steps |= {"notebooks": (notebooks, some_notebooks)} if some_notebooks else {}
        names = []
    if unknown := [n for n in names if n not in steps]:
        sys.exit(f"no step {', '.join(unknown)}; the steps are {', '.join(steps)}")
    times, preparing = [], None
    try:
        for name in names or list(steps):
            step, arguments = steps[name]
            print(f"\n=== {name}: {step.__doc__}", flush=True)
            start = time.monotonic()
            if preparing and name == "notebooks" and preparing.wait():
                fail("installing the wheel; see above")
            try:
                step(*arguments)
            except subprocess.CalledProcessError as error:
                again = f"Again, alone: python tools/check.py {name}"
                fail(f"step {name}, exit code {error.returncode}. {again}")
            if name == "build" and (not names or "notebooks" in names):
                preparing = wheel_environment()
            times.append(report(name, start))
    finally:
        if preparing:
            preparing.terminate()  # if it is still there, its work is not wanted
    print(f"\nAll green: {', '.join(times)}", flush=True)


if __name__ == "__main__":
    main()
