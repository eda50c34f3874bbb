"""Models with another inside: adapters are merged into a copy and never dropped, a text
model is taken out, and everything else is refused by name.
"""

import pytest
import torch
from families import tiny

from mechtut import Edit, Replay, capture, load_model
from mechtut.models import families
from mechtut.models.families import find_family, plain_model
from mechtut.patching.replay import naive_replay

TOKENS = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def lora(kind, **options):
    """A LoRA that changes something: PEFT's own starts at zero."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": TARGETS[kind], "init_lora_weights": False, **options}
    torch.manual_seed(1)
    return peft.LoraConfig(r=2, lora_alpha=4, fan_in_fan_out=kind == "gpt2", **options)


def wrapped(kind, hf, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(hf, lora(kind, **options)).eval()


def injected(kind, hf, **options):
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(lora(kind, **options), hf).eval()


def added(kind, hf, **options):
    hf.add_adapter(lora(kind, **options))
    return hf.eval()


@torch.no_grad()
def logits_of(hf):
    return hf(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("kind", sorted(TARGETS))
@pytest.mark.parametrize("adapt", [wrapped, injected, added])
def test_adapters_count_in_every_path(kind, adapt):
    """Logits, capture and the engine have the adapter's numbers, and the weights that
    circuits and editing read are the merged ones.
    """
    base = logits_of(tiny(kind))
    hf = adapt(kind, tiny(kind))
    wanted = logits_of(hf)
    assert (wanted - base).abs().max() > 0.1
    before = {name: x.clone() for name, x in hf.state_dict().items()}
    learning = [p.requires_grad for p in hf.parameters()]
    model = load_model(hf)
    assert torch.allclose(model.logits(TOKENS), wanted, atol=1e-5)
    acts = capture(model, TOKENS, "resid_post")
    assert torch.allclose(acts.logits, wanted, atol=1e-5)
    assert torch.allclose(model.unembed(acts["resid_post.2"]), wanted, atol=1e-5)
    edits = [[Edit("mlp_out", 1, 0.0, pos=3)], [Edit("z", 0, 0.0, pos=2, head=1)]]
    replayed = Replay(model, TOKENS).run(edits)[:, :, 0]
    assert torch.allclose(replayed, naive_replay(model, TOKENS, edits), atol=1e-5)
    # the user's own model, meanwhile
    assert model.hf is not hf and torch.equal(logits_of(hf), wanted)
    assert [p.requires_grad for p in hf.parameters()] == learning
    after = hf.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # and nothing of the adapter is left in the copy
    plain = type(tiny(kind))
    assert type(model.hf) is plain
    assert model.hf.state_dict().keys() == tiny(kind).state_dict().keys()


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}],
)
def test_kinds_of_adapters(options):
    hf = wrapped("llama", tiny("llama", tie_word_embeddings=False), **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            for name, x in hf.named_parameters():
                if "modules_to_save" in name:
                    x.normal_(0, 0.3)
    assert torch.allclose(load_model(hf).logits(TOKENS), logits_of(hf), atol=1e-5)


def test_the_active_adapter_counts():
    hf = wrapped("llama", tiny("llama"))
    one = logits_of(hf)
    torch.manual_seed(2)
    hf.add_adapter("other", lora("llama"))
    hf.set_adapter("other")
    assert torch.allclose(load_model(hf).logits(TOKENS), logits_of(hf), atol=1e-5)
    hf.set_adapter("default")
    assert torch.allclose(load_model(hf).logits(TOKENS), one, atol=1e-5)
    with hf.disable_adapter():
        off = load_model(hf).logits(TOKENS)
    assert torch.allclose(off, logits_of(tiny("llama")), atol=1e-5)


def test_a_model_in_training_stays_in_training():
    hf = wrapped("llama", tiny("llama"), lora_dropout=0.5)
    wanted = logits_of(hf)
    hf.train()
    assert torch.allclose(load_model(hf).logits(TOKENS), wanted, atol=1e-5)
    assert hf.training


def test_adapters_that_multiply():
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    )
    hf = peft.get_peft_model(tiny("llama"), config).eval()
    assert (logits_of(hf) - logits_of(tiny("llama"))).abs().max() > 0.1
    assert torch.allclose(load_model(hf).logits(TOKENS), logits_of(hf), atol=1e-5)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_learned_prompts_are_not_dropped_in_silence(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    hf = peft.get_peft_model(tiny("llama"), config)
    with pytest.raises(ValueError, match=r"adapters.*changes the logits.*prompts"):
        load_model(hf)


def test_a_saved_adapter(tmp_path):
    """transformers puts the adapter of such a folder into the model by itself."""
    tiny("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    hf = wrapped("llama", hf)
    hf.save_pretrained(tmp_path / "adapter")
    tokenizer = object()  # nobody asks it anything
    model = load_model(str(tmp_path / "adapter"), tokenizer)
    assert torch.allclose(model.logits(TOKENS), logits_of(hf), atol=1e-5)


def test_a_saved_adapter_without_peft(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)
    wrapped("llama", tiny("llama")).save_pretrained(tmp_path)
    monkeypatch.setattr(families, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install peft"):
        load_model(str(tmp_path), object())


def test_a_plain_model_is_itself():
    hf = tiny("gpt2")
    assert plain_model(hf) is hf and load_model(hf).hf is hf


# ---- several kinds of input ----------------------------------------------------------


def gemma3(text_kind="gemma3_text"):
    from families import CONFIGS
    from transformers import AutoConfig, AutoModelForCausalLM

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=CONFIGS[text_kind],
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return hf


def test_the_text_model_inside_gemma_3():
    hf = gemma3()
    model = load_model(hf)
    assert model.config.model_type == "gemma3_text"
    assert torch.equal(model.logits(TOKENS), logits_of(hf))
    assert model.embed.weight.data_ptr() == hf.get_input_embeddings().weight.data_ptr()
    edits = [[Edit("resid_post", 1, 0.0, pos=3)]]
    slow = naive_replay(model, TOKENS, edits)
    assert torch.allclose(Replay(model, TOKENS).run(edits)[:, :, 0], slow, atol=1e-5)


# ---- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, why",
    [
        ("t5", "encoder and a decoder"),
        ("bart", "encoder and a decoder"),
        ("mamba", "recurrent state"),
        ("mamba2", "recurrent state"),
        ("rwkv", "recurrent state"),
        ("jamba", "recurrent state"),
        ("recurrent_gemma", "recurrent state"),
        ("llama4", "its text model is 'llama4_text'"),
        ("deepseek_v3", "known: arcee, bloom"),
    ],
)
def test_the_rest_is_refused_by_name(kind, why):
    from types import SimpleNamespace

    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    with pytest.raises(ValueError, match=rf"{kind}'.*{why}") as error:
        find_family(SimpleNamespace(config=config))
    assert "known: arcee, bloom, cohere" in str(error.value)


@pytest.mark.parametrize("kind", ["t5", "mamba"])
def test_it_is_refused_before_its_weights_are_read(kind, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)  # and no weights at all
    with pytest.raises(ValueError, match=rf"no family row for model_type '{kind}'"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        (
            "bloom",
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm=True",
        ),
    ],
)
def test_variants_whose_stream_is_no_sum(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        load_model(tiny(kind, **changes))
