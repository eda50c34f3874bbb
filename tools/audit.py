"""Ask whether the versions of constraints.txt have known vulnerabilities.

`python tools/audit.py` needs pip-audit (.github/audit.txt has it with hashes). It ends
with 1 if there is a finding, whatever else happened. What could not be looked up is
named and does not stop anything: without a network nothing is known, and that is said,
since pip-audit itself calls a package that it did not find "no known vulnerability".
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# how the libraries below say that the data cannot be reached
UNREACHED = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "ServiceError")


def ask(constraints: Path) -> tuple[str, str]:
    """pip-audit's report as JSON, empty if it made none, and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "-r", constraints, "--no-deps"]
        command += ["--disable-pip", "--progress-spinner", "off", "-f", "json"]
        done = subprocess.run([*command, "-o", report], capture_output=True, text=True)
        text = report.read_text(encoding="utf-8") if report.exists() else ""
        return text, done.stdout + done.stderr


def judge(report: str, said: str) -> tuple[int, list[str]]:
    """The exit code, and what to tell: findings, and what is not known."""
    if not report.strip():
        if any(word in said for word in UNREACHED):
            return 0, ["::warning::nothing was audited: the data cannot be reached"]
        return 2, ["pip-audit made no report:", *said.splitlines()[-10:]]
    packages = json.loads(report)["dependencies"]
    found = [
        f"::error::{p['name']} {p['version']}: {v['id']}"
        f" {' '.join(v.get('aliases', []))}; mended in"
        f" {', '.join(v.get('fix_versions', [])) or 'no version yet'}"
        for p in packages
        for v in p.get("vulns", [])
    ]
    unknown = [p["name"] for p in packages if "vulns" not in p]
    told = list(found)
    if unknown:
        told.append(
            f"::warning::{len(unknown)} of {len(packages)} packages were not audited:"
            f" {', '.join(unknown)}"
        )
    seen = len(packages) - len(unknown)
    told.append(f"{seen} of {len(packages)} packages audited, {len(found)} findings")
    return int(bool(found)), told


if __name__ == "__main__":
    code, lines = judge(*ask(ROOT / "constraints.txt"))
    print("\n".join(lines))
    sys.exit(code)
