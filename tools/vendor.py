"""Packages of the npm registry that the site or its tests use, pinned by version and
hash: `python tools/vendor.py NAME` prints the folder.

npm fetches each once, from the registry that it is set up for, into `vendor/` in
mechtut's cache folder. Nothing of theirs is committed.
"""

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mechtut.models.weights import cache_folder


@dataclass(frozen=True)
class Package:
    """A package: its version, and npm's hash of the archive."""

    version: str
    integrity: str


PACKAGES = {
    "onnxruntime-web": Package(
        "1.30.0",
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs"
        "1SigqR4CXAfKYQ==",
    ),
    "axe-core": Package(
        "4.10.3",
        "sha512-Xm7bpRXnDSX2YE2YFfBk2FnF0ep6tmG7xPh8iHee8MIcrgq762Nkce856dYtJYLkuIoYZvGf"
        "Ts/PbZhideTcEg==",
    ),
}


def integrity(archive: Path) -> str:
    """The hash of a file, as npm writes it."""
    digest = hashlib.sha512(archive.read_bytes()).digest()
    return f"sha512-{base64.b64encode(digest).decode()}"


def pack(name: str, version: str, into: Path) -> Path:
    """Let npm fetch a package's archive."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm is needed to fetch {name} {version}, and is not installed"
        )
    command = [npm, "pack", f"{name}@{version}", "--pack-destination", str(into)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConnectionError(f"npm could not fetch {name} {version}:\n{done.stderr}")
    return into / f"{name}-{version}.tgz"


def fetch(name: str) -> Path:
    """The folder of a package, fetched if it is not there yet.

    Args:
        name: One of `PACKAGES`.

    Returns:
        The folder that has its package.json.

    Raises:
        FileNotFoundError: If npm is needed and not installed.
        ConnectionError: If npm cannot fetch it.
        ValueError: If the archive is not the one that was pinned.
    """
    package = PACKAGES[name]
    place = cache_folder() / "vendor" / f"{name}-{package.version}"
    if (place / "package.json").exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        archive = pack(name, package.version, Path(folder))
        if (found := integrity(archive)) != package.integrity:
            raise ValueError(
                f"{name} {package.version} is not the pinned file: its hash is {found},"
                f" not {package.integrity}"
            )
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        archive.unlink()
        try:
            Path(folder).joinpath("package").rename(place)
        except OSError:  # another process was quicker
            if not (place / "package.json").exists():
                raise
    return place


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch a pinned package.")
    parser.add_argument("name", choices=sorted(PACKAGES))
    try:
        print(fetch(parser.parse_args().name))
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        sys.exit(str(error))
