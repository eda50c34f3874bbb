"""What comes in from outside and what goes out: workflows, pinned tools, the list of
parts.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import audit  # noqa: E402
import constraints  # noqa: E402
import sbom  # noqa: E402

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# what a job that may write is allowed to do: take what was built, and publish it
PUBLISHING = {
    ("docs", "pages"): ["actions/deploy-pages"],
    ("release", "pypi"): ["actions/download-artifact", "pypa/gh-action-pypi-publish"],
    ("release", "github"): ["actions/download-artifact", "gh release create"],
}


def workflow(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs():
    for path in WORKFLOWS:
        for name, job in workflow(path)["jobs"].items():
            yield pytest.param(path.stem, name, job, id=f"{path.stem}-{name}")


def test_there_are_workflows():
    assert [p.stem for p in WORKFLOWS] == ["docs", "release", "test"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_has_no_rights_and_pins_its_actions(path):
    assert workflow(path)["permissions"] == {}, "each job asks for its own"
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: *(\S+) *(#.*)?", text)
    assert len(used) == text.count("uses:") > 0
    for action, comment in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), f"{action} can move"
        assert re.fullmatch(r"# v\d+\.\d+\.\d+", comment), f"say its version: {action}"
    assert "pull_request_target" not in text and "secrets." not in text


@pytest.mark.parametrize(("file", "name", "job"), [*jobs()])
def test_a_job_that_may_write_only_publishes(file, name, job):
    rights = job["permissions"]
    writes = {right for right, level in rights.items() if level == "write"}
    does = [s["uses"].split("@")[0] if "uses" in s else s["run"] for s in job["steps"]]
    if (file, name) not in PUBLISHING:
        assert not writes and rights == {"contents": "read"}
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False
        return
    assert writes and "needs" in job
    wanted = PUBLISHING[file, name]
    assert len(does) == len(wanted)
    for did, may in zip(does, wanted, strict=True):
        assert did == may or did.startswith(may + " "), f"{name} runs {did}"
        assert "${{" not in did, "names of branches and tags reach no shell as text"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_nothing_from_outside_is_pasted_into_a_shell(path):
    for job in workflow(path)["jobs"].values():
        for step in job["steps"]:
            assert "${{" not in step.get("run", "")


def test_the_tool_that_audits_is_pinned_with_hashes():
    text = (ROOT / ".github/audit.txt").read_text(encoding="utf-8")
    parts = re.findall(
        r"^([a-z0-9-]+)==(\S+) \\\n((?:    --hash=\S+(?: \\)?\n)+)", text, re.M
    )
    assert len(parts) == text.count("==") > 20
    assert "pip-audit" in {name for name, _, _ in parts}
    for name, _, hashes in parts:
        for line in hashes.split():
            assert line == "\\" or re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line), (
                name
            )


def test_hashes_are_those_of_one_version():
    names = {
        "idna-3.2-py3-none-any.whl": "3.2",
        "idna-3.20-py3-none-any.whl": "3.20",
        "idna-3.2.tar.gz": "3.2",
        "boolean.py-5.0.tar.gz": "5.0",
        "idna-3.2.exe": "",
        "nothing": "",
    }
    assert {name: constraints.version_of(name) for name in names} == names


# ---- the audit never hides a finding

FOUND = {
    "name": "a",
    "version": "1",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}],
}
FINE, SKIPPED = (
    {"name": "b", "version": "1", "vulns": []},
    {"name": "c", "skip_reason": "?"},
)


@pytest.mark.parametrize(
    ("packages", "code", "told"),
    [
        ([FINE], 0, ["1 of 1 packages audited, 0 findings"]),
        ([FOUND, FINE], 1, ["::error::a 1: PYSEC-1 CVE-1; mended in 2", "1 findings"]),
        ([FOUND, SKIPPED], 1, ["PYSEC-1", "1 of 2 packages were not audited: c"]),
        ([SKIPPED], 0, ["::warning::1 of 1 packages were not audited", "0 of 1"]),
    ],
)
def test_what_an_audit_says(packages, code, told):
    report = json.dumps({"dependencies": packages, "fixes": []})
    got, lines = audit.judge(report, "")
    assert got == code
    for text in told:
        assert text in "\n".join(lines)


def test_an_audit_without_data_is_a_warning_and_a_broken_one_an_error():
    code, lines = audit.judge("", "requests.exceptions.ConnectionError: no name")
    assert code == 0 and "nothing was audited" in lines[0]
    code, lines = audit.judge("", "No module named pip_audit")
    assert code == 2 and "No module named pip_audit" in lines[-1]


# ---- the list of parts


def test_the_list_of_parts_is_complete_and_the_same_again(tmp_path):
    (tmp_path / "mechtut-0.whl").write_bytes(b"x")
    made = sbom.sbom(tmp_path)
    assert made == sbom.sbom(tmp_path)
    parts = {p["name"]: p["version"] for p in made["components"]}
    assert parts["torch"] == version("torch").split("+")[0]
    assert {"transformers", "numpy", "safetensors"} < parts.keys()
    assert not {"pytest", "ruff", "mypy"} & parts.keys(), (
        "what the tests need is no part"
    )
    refs = [p["bom-ref"] for p in made["components"]]
    main = made["metadata"]["component"]
    assert len(set(refs)) == len(refs) and main["bom-ref"] not in refs
    links = {d["ref"]: d["dependsOn"] for d in made["dependencies"]}
    assert links.keys() == {main["bom-ref"], *refs}
    assert {r for needs in links.values() for r in needs} <= set(refs)
    reached, todo = set(), [main["bom-ref"]]
    while todo:
        if (ref := todo.pop()) not in reached:
            reached.add(ref)
            todo += links[ref]
    assert len(reached) > 0.8 * len(refs), "all but parts behind an extra"
    (file,) = main["components"]
    assert file["name"] == "mechtut-0.whl" and len(file["hashes"][0]["content"]) == 64


def test_the_list_of_parts_is_written(tmp_path):
    file = tmp_path / "mechtut.cdx.json"
    run = [sys.executable, ROOT / "tools/sbom.py", file]
    subprocess.run(run, check=True, capture_output=True)
    head = json.loads(file.read_text())
    assert (head["bomFormat"], head["specVersion"]) == ("CycloneDX", "1.5")
