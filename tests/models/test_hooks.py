"""Names, capture and intervene on anything, and loud failure."""

import numpy as np
import pytest
import torch
from families import tiny
from torch import nn

from mechtut.models.hooks import Edit, Site, capture, intervene
from mechtut.models.loading import load_model

TOKENS = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(0))
MODEL = load_model(tiny("gpt2"))


@pytest.mark.parametrize(
    "name, site",
    [
        ("resid_post.3", Site("resid_post", 3)),
        ("resid_post", Site("resid_post")),
        ("blocks.11.hook_resid_pre", Site("resid_pre", 11)),
        ("blocks.0.attn.hook_z", Site("z", 0)),
        ("blocks.2.mlp.hook_post", Site("mlp_act", 2)),
        ("hook_embed", Site("embed")),
        ("transformer.h.0.ln_1", Site("transformer.h.0.ln_1")),
    ],
)
def test_names(name, site):
    assert Site.parse(name) == site


def test_transformer_lens_names_capture_the_same():
    acts = capture(
        MODEL, TOKENS, ["blocks.1.hook_mlp_out", "mlp_out.1", "transformer.h.1.mlp"]
    )
    assert torch.equal(acts["mlp_out.1"], acts["transformer.h.1.mlp"])
    assert len(acts) == 2  # the first two are one site


def test_capture_sees_what_edits_left():
    value = torch.randn(32)
    acts = capture(
        MODEL,
        TOKENS,
        ["resid_post.1", "resid_pre.2"],
        edits=[Edit("resid_post", 1, value, pos=2)],
    )
    assert torch.equal(acts["resid_post.1"][:, 2], value.expand(2, 32))
    assert torch.equal(acts["resid_pre.2"], acts["resid_post.1"])


def test_edits_of_one_site_apply_in_order():
    edits = [Edit("mlp_out", 0, 5.0, pos=1), Edit("mlp_out", 0, 1.0, pos=1, mode="add")]
    assert (
        capture(MODEL, TOKENS, "mlp_out.0", edits=edits)["mlp_out.0"][:, 1] == 6
    ).all()


def test_float64_noise_on_a_float32_model_is_rounded_once():
    noise = torch.full((1, 1, 32), 1e-9, dtype=torch.float64)
    embed = capture(MODEL, TOKENS, "embed")["embed"]
    noisy = capture(
        MODEL, TOKENS, "embed", edits=[Edit("embed", None, noise, pos=0, mode="add")]
    )["embed"]
    assert torch.equal(noisy[:, :1], (embed[:, :1].double() + noise).float())


def test_bfloat16_keeps_its_type():
    model = load_model(tiny("llama"), dtype=torch.bfloat16)
    with intervene(model, [Edit("mlp_out", 0, torch.ones(32), pos=0)]):
        assert capture(model, TOKENS, "mlp_out.0")["mlp_out.0"].dtype == torch.bfloat16
        assert model.logits(TOKENS).dtype == torch.float32  # exact, and never again cut


def test_any_module_by_path():
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    x = torch.randn(5, 3)
    assert torch.equal(capture(net, x, "1.0")["1.0"], net[1][0](net[0](x)))
    with intervene(net, [Edit("1.0", None, 0.0)]):
        assert torch.equal(net(x), net[1][1].bias.expand(5, 2))


def test_a_hook_that_never_fires_is_an_error():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(RuntimeError, match="never reached unused"):
        capture(Lazy(), torch.ones(1, 2), "unused")
    with (
        pytest.raises(RuntimeError, match="never reached unused"),
        intervene(Lazy(), [Edit("unused", None, 0.0)]) as _,
    ):
        pass


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match=r"unknown site 'resid_mid'.*resid_post"):
        capture(MODEL, TOKENS, "resid_mid")
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp"):
        capture(MODEL, TOKENS, "model.layers.0.mlp")
    with pytest.raises(IndexError, match=r"layer 3 .*layers 0..2"):
        capture(MODEL, TOKENS, "resid_post.3")
    with pytest.raises(IndexError, match=r"layer 7 .*layers 0..2"):
        capture(MODEL, TOKENS, "q.7")
    with pytest.raises(KeyError, match="captured: embed"):
        capture(MODEL, TOKENS, "embed")["resid_post.1"]
    with (
        pytest.raises(IndexError, match="heads 0..3"),
        intervene(MODEL, [Edit("pattern", 0, 0.0, head=4)]),
    ):
        pass


def test_a_failing_forward_leaves_no_hooks():
    with (
        pytest.raises(IndexError),
        intervene(MODEL, [Edit("resid_post", 0, 0.0, pos=99)]),
    ):
        MODEL.logits(TOKENS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in MODEL.hf.modules())
    with (
        pytest.raises(ValueError, match="does not fit"),
        intervene(MODEL, [Edit("q", 0, torch.ones(5))]),
    ):
        MODEL.logits(TOKENS)
    assert MODEL.config._attn_implementation != "mechtut"


@pytest.mark.parametrize("pos", [1, np.int64(1), [1], np.array([1]), torch.tensor(1)])
def test_positions_of_every_kind(pos):
    assert Edit("z", np.int32(1), 0.0, pos=pos, head=torch.tensor(2)).pos == (1,)


def test_transformer_lens_names_in_edits():
    ours = Edit("z", 1, 0.0, head=2)
    for theirs in (
        Edit("blocks.1.attn.hook_z", None, 0.0, head=2),
        Edit("attn.hook_z", 1, 0.0, head=2),
        Edit("z.1", None, 0.0, head=2),
    ):
        assert (theirs.site, theirs.layer, theirs.head) == ("z", 1, 2)
        logits = [
            capture(MODEL, TOKENS, "embed", edits=[e]).logits for e in (ours, theirs)
        ]
        assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pos": ()}, ValueError, "no position"),
        ({"pos": [1, 1]}, ValueError, "one twice"),
        ({"pos": 0.5}, TypeError, "pos must be a whole number.*not 0.5"),
        ({"pos": "1"}, ValueError, "unknown rule '1'"),
        ({"layer": 1.0}, TypeError, "layer"),
        ({"head": True}, TypeError, "head"),
        ({"mode": "ADD"}, ValueError, "one of 'set'.*not 'ADD'"),
        ({"site": "z.0"}, ValueError, "contradicts layer=1"),
        ({"site": "embed"}, ValueError, "no layers"),
        ({"site": 3}, TypeError, "site must be a string"),
    ],
)
def test_edits_that_can_only_be_mistakes(arguments, error, words):
    with pytest.raises(error, match=words):
        Edit(**{"site": "z", "layer": 1, "value": 0.0, **arguments})


def test_one_position_from_both_ends():
    with (
        pytest.raises(ValueError, match="twice"),
        intervene(MODEL, [Edit("mlp_out", 0, 0.0, pos=[5, -1])]),
    ):
        MODEL.logits(TOKENS)


def test_a_generator_of_edits_is_not_lost():
    edits = [Edit("mlp_out", layer, 0.0) for layer in (0, 1)]
    with intervene(MODEL, (e for e in edits)):
        from_generator = MODEL.logits(TOKENS)
    with intervene(MODEL, edits):
        assert torch.equal(MODEL.logits(TOKENS), from_generator)


def test_activations_by_name_and_layer():
    acts = capture(MODEL, TOKENS, "resid_post")
    assert torch.equal(acts["resid_post", 1], acts["resid_post.1"])
    assert torch.equal(acts["blocks.1.hook_resid_post"], acts["resid_post.1"])
    assert repr(acts) == "Activations: resid_post (layer 0, 1, 2) [2, 6, 32]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_patterns_of_padded_prompts_are_finite_and_change_nothing(dtype):
    """Float64's lowest number, in the softmax of float32, made NaN of all states."""
    model = load_model(tiny("llama").to(dtype))
    ids, mask = torch.arange(5, 23).view(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = 0
    plain = capture(model, ids, "resid_post", attention_mask=mask)
    seen = capture(model, ids, ["pattern", "resid_post"], attention_mask=mask)
    alone = capture(model, ids[:1, 2:], "pattern")["pattern"]
    real = mask.bool()
    assert seen["pattern"].isfinite().all()
    assert torch.allclose(seen["pattern"][:, :1, :, 2:, 2:], alone, atol=1e-6)
    for one, other in zip(seen["resid_post"], plain["resid_post"], strict=True):
        assert torch.allclose(one[real], other[real], atol=1e-5, rtol=1e-4)
