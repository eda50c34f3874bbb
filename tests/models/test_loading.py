"""Loading: the embedded model, instances, folders; damaged or unknown things are
refused by name.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from families import tiny

from mechtut.models import loading
from mechtut.models.families import FAMILIES
from mechtut.models.loading import load_model, weight_fingerprint
from mechtut.models.weights import mini_folder


def test_mini_loads_and_speaks():
    model = load_model("mini", device="cpu")
    assert model.dtype == torch.float32 and model.hf.training is False
    assert not any(p.requires_grad for p in model.hf.parameters())
    assert "".join(model.to_str_tokens("Hello there")).strip() == "Hello there"
    assert (
        model.logits(model.to_tokens("The")[None]).shape[-1]
        == model.embed.weight.shape[0]
    )


def test_a_local_folder_is_the_same_model(tmp_path):
    shutil.copytree(mini_folder(), tmp_path / "mine")
    here, there = (
        load_model("mini", device="cpu"),
        load_model(str(tmp_path / "mine"), device="cpu"),
    )
    assert weight_fingerprint(here) == weight_fingerprint(there)


def test_a_damaged_file_says_so(tmp_path, monkeypatch):
    copy = tmp_path / "mini"
    shutil.copytree(mini_folder(), copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    monkeypatch.setattr(loading, "mini_folder", lambda: copy)
    with pytest.raises(ValueError, match=r"damaged .*reinstall"):
        load_model("mini")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no file"):
        load_model("mini")


def test_nan_weights_are_refused():
    hf = tiny("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN .*model.layers.1.mlp.down_proj.weight"):
        load_model(hf)


def test_unknown_families_are_refused_by_name():
    with pytest.raises(ValueError, match=r"model_type 'bert'.*gpt2"):
        loading.find_family(SimpleNamespace(config=SimpleNamespace(model_type="bert")))
    with pytest.raises(ValueError, match="opt-350m"):
        load_model(tiny("opt", do_layer_norm_before=False))


def test_a_family_of_ones_own(monkeypatch):
    hf = tiny("llama")
    hf.config.model_type = "my_llama"
    with pytest.raises(ValueError, match="my_llama"):
        load_model(hf)
    monkeypatch.setitem(FAMILIES, "my_llama", FAMILIES["llama"])
    assert load_model(hf).n_layers == 3


def test_grouped_query_and_head_width():
    model = load_model(tiny("qwen3"))
    assert (model.n_heads, model.n_kv_heads, model.d_head, model.d_model) == (
        4,
        2,
        16,
        32,
    )
    assert load_model(tiny("gpt2")).d_head == 8


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("", "no tokens"),
        ([], "no tokens"),
        ([97], "outside 0..96"),
        ([-1], "outside 0..96"),
        ([1] * 65, "at most 64"),
    ],
)
def test_hostile_prompts(prompt, words):
    model = load_model(tiny("gpt2"))
    if prompt == "":
        model = load_model("mini", device="cpu")
    with pytest.raises(ValueError, match=words):
        model.to_tokens(prompt)


def test_text_without_a_tokenizer():
    with pytest.raises(ValueError, match="without a tokenizer"):
        load_model(tiny("gpt2")).to_tokens("hello")


def test_token_ids_pass_through():
    model = load_model(tiny("gpt2"))
    assert (
        model.to_tokens((1, 2, 3)).tolist()
        == model.to_tokens(torch.tensor([[1, 2, 3]])).tolist()
        == [1, 2, 3]
    )


def test_fingerprint_follows_the_weights():
    one, same, other = (
        load_model(tiny("gpt2")),
        load_model(tiny("gpt2")),
        load_model(tiny("llama")),
    )
    assert (
        weight_fingerprint(one) == weight_fingerprint(same) != weight_fingerprint(other)
    )
    with torch.no_grad():
        same.blocks[0].mlp.c_proj.weight.add_(
            torch.outer(torch.ones(128), torch.ones(32)) * 1e-3
        )
    assert weight_fingerprint(one) != weight_fingerprint(same)


def test_loading_the_embedded_model_needs_no_network():
    code = (
        "import socket\n"
        "def closed(*a, **k): raise OSError('network used')\n"
        "socket.socket.connect = closed\n"
        "import mechtut; m = mechtut.load_model('mini'); print(m.n_layers)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        int(done.stdout)
        == json.loads((mini_folder() / "config.json").read_text())["n_layer"]
    )


@pytest.mark.hub
def test_a_hub_model():
    model = load_model("gpt2", device="cpu")
    assert (
        model.decode(
            [
                int(
                    model.logits(
                        model.to_tokens("The Eiffel Tower is in the city of")[None]
                    )[0, -1].argmax()
                )
            ]
        )
        == " Paris"
    )


def test_prompts_of_every_kind():
    model = load_model("mini", device="cpu")
    ids = model.to_tokens("Riley Martin works as a")
    for same in (ids, ids.tolist(), ids.numpy(), ids.to(torch.int32), ids[None]):
        assert torch.equal(model.to_tokens(same), ids)
        assert torch.equal(model.to_batch(same), ids[None])
    texts = ["Riley Martin works as a", "Riley Martin works as the"]
    assert torch.equal(model.to_batch(texts)[0], ids)
    assert torch.equal(model.logits(texts[0]), model.logits(ids[None]))


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        (["a"], TypeError, "must be a whole number, not 'a'"),
        ([0.5, 1.0], TypeError, "must be a whole number, not 0.5"),
        (torch.tensor([1.0]), TypeError, "whole numbers"),
        ([True, False], TypeError, "must be a whole number, not True"),
        ([[1, 2], [3, 4]], TypeError, "whole number, not \\[1, 2\\]"),
        ([], ValueError, "no tokens"),
        ([1, -1], ValueError, "token id -1"),
    ],
)
def test_what_is_not_a_prompt(prompt, error, words):
    with pytest.raises(error, match=words):
        load_model("mini", device="cpu").to_tokens(prompt)


def test_what_is_not_a_batch():
    model = load_model("mini", device="cpu")
    with pytest.raises(ValueError, match="2 to 5 tokens do not make one batch"):
        model.to_batch(["Riley Martin", "Riley Martin works as a"])
    with pytest.raises(ValueError, match=r"shape \(1, 1, 2\)"):
        model.logits(torch.ones(1, 1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="reads at most 128"):
        model.logits([[1] * 129])


def test_a_model_says_what_it_is():
    lines = repr(load_model(tiny("llama"))).splitlines()
    assert len(lines) == 2 and "llama" in lines[0] and "keys and values" in lines[0]


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"mlp_out": "self_attn"}, "attn_out . mlp_out is resid_post"),
        ({"norm": "model.layers.0.input_layernorm"}, "last stream is the logits"),
    ],
)
def test_a_row_that_does_not_fit_is_found_at_load(monkeypatch, change, claim):
    monkeypatch.setitem(
        FAMILIES, "llama", dataclasses.replace(FAMILIES["llama"], **change)
    )
    hf = tiny("llama")
    with torch.no_grad():
        hf.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match=rf"'llama' .*does not fit.*{claim}.*off by"):
        load_model(hf)


def test_a_model_with_scales_of_its_own_is_not_taken_for_a_llama(monkeypatch):
    """Granite's shared-expert kin multiplies what enters the stream, and the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setitem(FAMILIES, "granitemoeshared", FAMILIES["granitemoe"])
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    scales = {"residual_multiplier": 0.5, "logits_scaling": 4.0}
    config = AutoConfig.for_model("granitemoeshared", **sizes, **scales, pad_token_id=0)
    with pytest.raises(ValueError, match="does not fit"):
        load_model(AutoModelForCausalLM.from_config(config))


def test_a_revision_is_that_of_the_tokenizer_too(monkeypatch):
    from transformers import AutoTokenizer

    asked, own = {}, AutoTokenizer.from_pretrained

    def record(path, **kwargs):
        asked.update(kwargs)
        return own(path)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", record)
    where = {"revision": "abc", "token": "secret", "cache_dir": "here"}
    load_model(str(mini_folder()), device="cpu", **where)
    assert asked.items() >= where.items() and asked["trust_remote_code"] is False


def test_arguments_without_a_meaning_are_refused():
    model = load_model("mini", device="cpu")
    for source, given in (
        ("mini", {"trust_remote_code": True}),
        (model, {"revision": "main"}),
        (model, {"dtype": torch.float64}),
        (model.hf, {"cache_dir": "here"}),
    ):
        with pytest.raises(ValueError, match="|".join([*given, "memory", "as it is"])):
            load_model(source, **given)


@pytest.mark.parametrize(
    "given", [{}, {"tokens": [1], "embeds": torch.ones(1, 1, 192)}]
)
def test_tokens_or_embeddings(given):
    with pytest.raises(ValueError, match="give tokens or embeds="):
        load_model("mini").logits(**given)
    with pytest.raises(ValueError, match="prompt has 999 tokens"):
        load_model("mini").logits(embeds=torch.ones(1, 999, 192))
