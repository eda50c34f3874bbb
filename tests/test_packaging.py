"""The package from outside: what importing costs, what is public, what the command line
does.
"""

import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import mechtut
from mechtut.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_import_is_quick():
    """It takes milliseconds, as long as nothing large comes with it."""
    large = {"torch", "transformers", "pandas", "matplotlib", "numpy"}
    code = f"import mechtut, sys; print(*sorted({large} & set(sys.modules)))"
    assert not (found := python(code)), f"`import mechtut` also imports {found}"


def test_version_is_that_of_settings_ini():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "settings.ini")
    assert mechtut.__version__ == config["DEFAULT"]["version"]
    assert version("mechtut") == mechtut.__version__, (
        "install the project again: pip install -e ."
    )


@pytest.mark.parametrize("name", [n for n in mechtut.__all__ if n != "__version__"])
def test_public_names_are_there(name):
    value = getattr(mechtut, name)
    assert value.__module__ == f"mechtut.{mechtut._WHERE[name]}", (
        "name the module that defines it"
    )
    assert name in dir(mechtut)
    assert value.__doc__, f"{name} has no docstring"


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(mechtut.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {
        name: f"mechtut.{module}" for name, module in mechtut._WHERE.items()
    }


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'tracee'; it has"):
        mechtut.tracee  # noqa: B018


def test_constraints_pin_every_requirement():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "settings.ini")
    wanted = [
        r
        for key, text in config["DEFAULT"].items()
        if key.endswith("requirements")
        for r in text.split()
    ]
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    missing = {re.split(r"[<>=!~\[]", r)[0].lower() for r in wanted} - pinned
    assert not missing, f"run tools/constraints.py: {missing}"


def test_python_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    versions = [
        c.rpartition(" ")[2]
        for c in project["classifiers"]
        if re.search(r":: 3\.\d+$", c)
    ]
    assert versions[0] == oldest
    source = (ROOT / "tools/go.py").read_text()
    for v in (versions[0], versions[-1]):
        assert f"({v.replace('.', ', ')})" in source, f"tools/go.py does not know {v}"


def test_trace_command(tmp_path, capsys):
    figure = tmp_path / "trace.png"
    assert (
        main(["trace", "--samples", "2", "--component", "all", "--out", str(figure)])
        == 0
    )
    out = capsys.readouterr().out
    for component in ("resid_post", "mlp_out", "attn_out"):
        assert f"{component}: indirect effect" in out
    assert max(map(len, out.replace(str(figure), "").splitlines())) <= 100
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_trace_command_goes_on(tmp_path, capsys, monkeypatch):
    """Stopped in its second component it has printed the first, and does not run that
    one again.
    """
    from mechtut.patching.replay import Replay

    run, ran = Replay.run, []

    def stop(self, *arguments, **options):
        ran.append(options["name"])
        if len(ran) == 2:
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    command = ["trace", "--samples", "2", "--component", "all", "--window", "2"]
    command += ["--folder", str(tmp_path / "kept"), "--out", str(tmp_path / "t.png")]
    monkeypatch.setattr(Replay, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    first = capsys.readouterr().out
    assert "resid_post: indirect" in first and "mlp_out: indirect" not in first
    assert ran == ["trace resid_post", "trace mlp_out"]
    kept = sorted((tmp_path / "kept" / "resid_post").glob("*.safetensors"))
    times = [p.stat().st_mtime_ns for p in kept]
    assert main(command) == 0 and kept
    assert times == [p.stat().st_mtime_ns for p in kept]
    assert capsys.readouterr().out.startswith(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "only a prompt"], "--subject"),
        (["trace", "the prompt", "--subject", "Nowhere"], "Nowhere"),
        (["trace", "--model", "gpt2"], "needs a prompt"),
        (
            ["trace", "the prompt", "--subject", "the", "--model", "no/such/folder"],
            "no/such/folder",
        ),
        (["trace", "--samples", "0"], "0"),
        (["trace", "--window", "0"], "window"),
        (["smollm2", "everything", "--folder", "."], "no part 'everything'"),
        (
            ["trace", "--out", "/no/such/folder/trace.png", "--samples", "1"],
            "/no/such/folder",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mechtut: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch():
    code = (
        "import runpy, sys; sys.argv = ['mechtut', 'trace', '--help']\n"
        "try: runpy.run_module('mechtut', run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    out = python(code)
    assert "--subject" in out and out.endswith("False")


def test_table_fits_a_terminal_for_any_model():
    """A deep model's layers are thinned out; a long token does not widen the table."""
    import torch

    from mechtut.__main__ import table

    class Trace:
        tokens = (
            "<|endoftext|>",
            " an",
            " extraordinarily_long_token_that_never_ends_at_all",
            "\n",
        )
        subject_range = (1, 3)
        indirect_effect = torch.linspace(-1, 1, 4 * 80).reshape(4, 80)

    text = table(Trace())
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) == 5 and "\\n" in text
    assert text.splitlines()[2].startswith("* ' an'")


def test_a_new_paper_runs_and_exports(tmp_path):
    """What `new-paper` writes is a notebook that runs from top to bottom, and whose
    module does too.
    """
    folder = tmp_path / "nbs" / "papers"
    folder.mkdir(parents=True)
    (folder / "30_other.ipynb").write_text("{}")
    assert main(["new-paper", "logit_lens", "--folder", str(folder)]) == 0
    notebook = json.loads((folder / "40_logit_lens.ipynb").read_text())
    code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert "#| default_exp papers.logit_lens" in code
    run = "\n\n".join(
        c for c in code if "#| eval: false" not in c and "# Colab:" not in c
    )
    exec(compile(run, "logit_lens", "exec"), {"__name__": "logit_lens"})
    assert "{{" not in "".join(code)


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("Logit Lens", ".", "lower-case"),
        ("lens", "no/such", "no folder"),
        ("rome", ".", "exists already"),
    ],
)
def test_new_paper_refuses_what_cannot_work(
    name, folder, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main(["new-paper", name, "--folder", folder]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
