"""The two commands of the README: `python3 tools/go.py trace` and `python3 tools/go.py
test`.

Each makes `.venv` beside this folder, installs the project into it with the versions of
constraints.txt, and runs its job there. What follows the word is handed on: `python3
tools/go.py trace "The prompt" --subject "subject"`. Only Python's own library is used
here, since nothing else is installed yet.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OLDEST, NEWEST = (3, 11), (3, 13)
JOBS = {
    "trace": ("", ["-m", "mechtut", "trace"]),
    "test": ("[dev]", ["tools/check.py"]),
}


def need_python():
    """Continue under a Python that we support, or say what is missing."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        other = shutil.which(f"python3.{minor}")
        if other and not subprocess.call(
            [other, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ):
            sys.exit(subprocess.call([other, *sys.argv]))
    sys.exit(
        f"mechtut needs Python 3.11 to 3.13, and {sys.executable} is"
        f" {sys.version.split()[0]}.\nInstall one of those and run this again with it,"
        " e.g. `python3.12 tools/go.py trace`."
    )


def fingerprint(extra):
    """What the installation depends on; the place counts too, because the install
    points at this folder.
    """
    files = ["settings.ini", "constraints.txt", "setup.py", "pyproject.toml"]
    parts = [(ROOT / f).read_bytes() for f in files] + [
        str(ROOT).encode(),
        extra.encode(),
        sys.version.encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def run(*command):
    """Run `command` without input, passing on what it prints except pip's remarks on
    package indexes.
    """
    process = subprocess.Popen(
        [str(c) for c in command],
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    for line in process.stdout:
        if not ("WARNING: Location" in line and "is ignored" in line):
            print(line, end="", flush=True)
    if process.wait():
        sys.exit(
            f"{' '.join(map(str, command[1:4]))} failed with exit code"
            f" {process.returncode}; see above."
        )


def install(extra):
    """Make .venv and install the project into it, unless that has been done for the
    present files.
    """
    stamp = VENV / (".installed" + extra.strip("[]"))
    wanted = fingerprint(extra)
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    start = time.time()
    print(
        f"Installing mechtut{extra} into {VENV} (a few minutes the first time)",
        flush=True,
    )
    if not VENV.exists() or subprocess.call(
        [str(PYTHON), "-c", "import pip"], stderr=subprocess.DEVNULL
    ):
        try:
            run(sys.executable, "-m", "venv", "--clear", VENV)
        except SystemExit:
            print(
                "On Debian and Ubuntu the module is a package of its own: `sudo apt"
                " install python3-venv`."
            )
            raise
    run(
        PYTHON,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",  # that is done below, by all processors
        "--disable-pip-version-check",
        "-c",
        "constraints.txt",
        "-e",
        "." + extra,
    )
    # some packages bring files that are meant for another Python: nothing is wrong then
    subprocess.call(
        [str(PYTHON), "-m", "compileall", "-qq", "-j", "0", str(VENV / "lib")]
    )
    stamp.write_text(wanted)
    print(f"Installed in {time.time() - start:.0f} s", flush=True)


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in JOBS:
        sys.exit("usage: python3 tools/go.py trace|test [arguments of the job]")
    need_python()
    extra, command = JOBS[sys.argv[1]]
    install(extra)
    os.chdir(str(ROOT))
    sys.exit(subprocess.call([str(PYTHON), *command, *sys.argv[2:]]))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
