"""Sites as layers: the same values, and Captum's methods against plain autograd."""

import pytest
import torch
from captum.attr import (
    LayerActivation,
    LayerConductance,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from families import tiny

from mechtut.models.hooks import capture
from mechtut.models.loading import load_model
from mechtut.patching.grids import AnswerMetric
from mechtut.patching.site_layers import SiteLayers

DRAW = torch.Generator().manual_seed(0)
TOKENS, OTHER = (torch.randint(5, 90, (3, 6), generator=DRAW) for _ in range(2))
RIGHT, WRONG = torch.tensor([7, 8, 9]), torch.tensor([17, 18, 19])
METRIC = AnswerMetric("logit_diff", RIGHT, WRONG)
# the module whose input is z of layer 1, and the block whose input is the stream
PARTS = {
    "gpt2": ("transformer.h.1.attn.c_proj", "transformer.h.1"),
    "llama": ("model.layers.1.self_attn.o_proj", "model.layers.1"),
    "gpt_neox": ("gpt_neox.layers.1.attention.dense", "gpt_neox.layers.1"),
    "gemma2": ("model.layers.1.self_attn.o_proj", "model.layers.1"),
}


def difference(logits):
    rows = torch.arange(len(logits))
    return logits[rows, -1, RIGHT[rows % 3]] - logits[rows, -1, WRONG[rows % 3]]


def with_input(hf, tokens, path, value=None):
    """A module's input, and the metric when it is replaced, by torch's own hook."""
    seen = []

    def enter(module, args):
        seen.append(args[0])
        return None if value is None else (value, *args[1:])

    handle = hf.get_submodule(path).register_forward_pre_hook(enter)
    try:
        return difference(hf(tokens, use_cache=False).logits), seen[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("site", ["z.1", "resid_pre.1"])
def test_integrated_gradients_are_the_sum_written_out(kind, site):
    hf = tiny(kind).double()
    model, path = load_model(hf), PARTS[kind][site.startswith("resid")]
    with torch.no_grad():
        _, here = with_input(hf, TOKENS, path)
        _, there = with_input(hf, OTHER, path)
    # midpoints; the weights of Captum's trapezoid of n points sum to 1 - 1 / n
    total = 0
    for k in range(8):
        x = (there + (k + 0.5) / 8 * (here - there)).requires_grad_()
        value, _ = with_input(hf, TOKENS, path, x)
        total = total + torch.autograd.grad(value.sum(), x)[0] / 8
    wanted = total * (here - there)
    hf.zero_grad()
    layers = SiteLayers(model, [site, "mlp_out.2"], METRIC)
    given = {"baselines": OTHER, "n_steps": 8, "method": "riemann_middle"}
    for more in ({}, {"internal_batch_size": 6}):
        method = LayerIntegratedGradients(layers, layers[site])
        found = method.attribute(TOKENS, **given, **more)
        assert torch.allclose(found.reshape(wanted.shape), wanted, atol=1e-9)
        assert found.shape[2] == (model.n_heads if site == "z.1" else 32)
    assert wanted.abs().max() > 1e-3
    assert all(w.grad is None and w.requires_grad for w in hf.parameters())


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize(
    "site", ["embed", "q.1", "k.2", "v.0", "pattern.1", "mlp_act.1", "attn_out.2"]
)
def test_activations_and_gradients(kind, site):
    model = load_model(tiny(kind).double())
    acts = capture(model, TOKENS, site, gradients=True)
    value = difference(acts.logits)
    slope = torch.autograd.grad(value.sum(), acts[site])[0]
    layers = SiteLayers(model, site, METRIC)
    assert torch.allclose(layers(TOKENS), value, atol=1e-10)
    shown = LayerActivation(layers, layers[site]).attribute(TOKENS)
    assert torch.allclose(shown, acts[site], atol=1e-10)
    found = LayerGradientXActivation(layers, layers[site]).attribute(TOKENS)
    assert torch.allclose(found, slope * acts[site], atol=1e-9)


@pytest.mark.parametrize("kind", PARTS)
def test_conductance_adds_up_to_the_difference(kind):
    """What goes through all neurons of the first MLP and around it is all there is."""
    model = load_model(tiny(kind).double())
    start, end = (capture(model, t, "embed")["embed"] for t in (OTHER, TOKENS))
    layers = SiteLayers(model, ["embed", "resid_pre.2"], METRIC)
    assert torch.allclose(layers(end), layers(TOKENS), atol=1e-10)
    whole = (layers(TOKENS) - layers(OTHER)).detach()
    method = LayerConductance(layers, layers["resid_pre.2"])
    found = method.attribute(end, baselines=start, n_steps=1000)
    assert torch.allclose(
        found.sum((1, 2)), whole, atol=0.02 * float(whole.abs().max())
    )


def test_logits_targets_and_padding():
    model = load_model(tiny("llama").double())
    layers = SiteLayers(model, "z.1")
    assert torch.equal(layers(TOKENS), model.logits(TOKENS)[:, -1])
    given = {"baselines": OTHER, "n_steps": 5}
    method = LayerIntegratedGradients(layers, layers["z.1"])
    right, wrong = (method.attribute(TOKENS, target=t, **given) for t in (RIGHT, WRONG))
    measured = SiteLayers(model, "z.1", METRIC)
    method = LayerIntegratedGradients(measured, measured["z.1"])
    both = method.attribute(TOKENS, **given)
    assert torch.allclose(right - wrong, both, atol=1e-9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 3)
    wanted = model.logits(TOKENS, mask)[:, -1]
    assert torch.equal(layers(TOKENS, mask), wanted)
    assert not torch.equal(layers(TOKENS), wanted)


def test_it_is_a_module_without_weights_and_leaves_none_behind():
    model = load_model(tiny("gpt2"))
    layers = SiteLayers(model, ["z", "z.1", "blocks.0.hook_resid_pre"], METRIC)
    assert list(map(str, layers.sites)) == ["z.0", "z.1", "z.2", "resid_pre.0"]
    assert layers["blocks.1.attn.hook_z"] is layers["z.1"]
    assert not list(layers.parameters())
    layers(TOKENS).sum().backward()
    assert all(w.grad is None and w.requires_grad for w in model.hf.parameters())
    with torch.no_grad():
        assert not layers(TOKENS).requires_grad
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules()]
    assert not any(hooks)


def test_hostile_input():
    model = load_model(tiny("gpt2"))
    layers = SiteLayers(model, "z.1", METRIC)
    with pytest.raises(ValueError, match="answers for 3 prompts, but 2 rows"):
        layers(TOKENS[:2])
    with pytest.raises(KeyError, match=r"no layer at 'z.2'; there are z.1"):
        layers["z.2"]
    for wrong in (torch.randn(3, 6, 5), TOKENS[0], torch.randn(3, 6), TOKENS[None]):
        with pytest.raises(ValueError, match="token ids .row, pos."):
            layers(wrong)
    with pytest.raises(ValueError, match="at least one"):
        SiteLayers(model, [])
    with pytest.raises(ValueError, match="unknown site 'resid_mid'"):
        SiteLayers(model, "resid_mid")(TOKENS)
    with pytest.raises(IndexError, match="layer 9"):
        SiteLayers(model, "z.9")
    with pytest.raises(TypeError, match="model must be a Model"):
        SiteLayers(model.hf, "z.1")
    bad = SiteLayers(model, "z.1", lambda logits: logits.sum())
    with pytest.raises(ValueError, match="one number per prompt"):
        bad(TOKENS)
