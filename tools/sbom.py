"""Write the parts of a release as CycloneDX JSON: `python tools/sbom.py FILE`.

The package asks for lower bounds only, so the versions are those of the running
environment: what the tests of this release ran on. The same environment gives the same
file, byte for byte.
"""

import hashlib
import json
import sys
import uuid
from configparser import ConfigParser
from importlib.metadata import metadata, requires
from pathlib import Path
from typing import Any

from constraints import ROOT, closure
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{version}"


def component(name: str, version: str) -> dict[str, Any]:
    """A package as CycloneDX names it, with the licence that its metadata has."""
    about = metadata(name)
    found = {"type": "library", "name": name, "version": version}
    found |= {"purl": purl(name, version), "bom-ref": purl(name, version)}
    if licence := about.get("License-Expression"):
        return found | {"licenses": [{"expression": licence}]}
    return found


def needed_by(texts: list[str], versions: dict[str, str]) -> list[str]:
    """References to what a list of requirements names here."""
    needs = [Requirement(t) for t in texts]
    here = [r for r in needs if not r.marker or r.marker.evaluate({"extra": ""})]
    names = {canonicalize_name(r.name) for r in here} & versions.keys()
    return sorted(purl(n, versions[n]) for n in names)


def sbom(dist: Path) -> dict[str, Any]:
    """The bill of materials of this version; with hashes of what is in `dist`."""
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = config["DEFAULT"]["requirements"].split()
    versions = closure(wanted)
    name, version = "mechtut", config["DEFAULT"]["version"]
    ref = purl(name, version)
    files = sorted(p for p in dist.glob("*") if p.suffix in (".whl", ".gz"))
    main = {"type": "library", "name": name, "version": version}
    main |= {"purl": ref, "bom-ref": ref, "licenses": [{"license": {"id": "MIT"}}]}
    main["components"] = [
        {
            "type": "file",
            "name": p.name,
            "bom-ref": p.name,
            "hashes": [
                {
                    "alg": "SHA-256",
                    "content": hashlib.sha256(p.read_bytes()).hexdigest(),
                }
            ],
        }
        for p in files
    ]
    parts = [component(n, v) for n, v in sorted(versions.items())]
    links = [{"ref": ref, "dependsOn": needed_by(wanted, versions)}]
    links += [
        {"ref": purl(n, v), "dependsOn": needed_by(requires(n) or [], versions)}
        for n, v in sorted(versions.items())
    ]
    body = {"metadata": {"component": main}, "components": parts, "dependencies": links}
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(body, sort_keys=True))
    head = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1}
    return {**head, "serialNumber": f"urn:uuid:{serial}", **body}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/sbom.py FILE")
    Path(sys.argv[1]).write_text(json.dumps(sbom(ROOT / "dist"), indent=1) + "\n")
    print(f"{sys.argv[1]}: written")
