"""Packages of the npm registry that the site or its tests use, pinned by version and
hash: `python tools/vendor.py NAME` prints the folder.

Each is fetched once, into `vendor/` in mechtut's cache folder. Nothing of theirs is
committed.
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
from urllib.request import urlopen

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
    """Fetch a package's archive: from the public registry, else by npm, which knows the
    registry and the passwords of the reader.
    """
    archive = into / f"{name}-{version}.tgz"
    url = f"https://registry.npmjs.org/{name}/-/{archive.name}"
    try:
        with urlopen(url, timeout=60) as answer, archive.open("wb") as out:
            shutil.copyfileobj(answer, out)
        return archive
    except OSError as error:
        said = error
    npm = shutil.which("npm")
    if npm is None:
        raise ConnectionError(
            f"{url} could not be fetched ({said}), and there is no npm"
        )
    command = [npm, "pack", f"{name}@{version}", "--pack-destination", str(into)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConnectionError(
            f"neither {url} ({said}) nor npm could be reached:\n{done.stderr}"
        )
    return archive


def fetch(name: str) -> Path:
    """The folder of a package, fetched if it is not there yet.

    Args:
        name: One of `PACKAGES`.

    Returns:
        The folder that has its package.json.

    Raises:
        ConnectionError: If it cannot be fetched.
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
    except (ConnectionError, ValueError) as error:
        sys.exit(str(error))
