"""Gradients through the verbs, against small steps of plain forward passes."""

import pytest
import torch
from families import CONFIGS, EXPERTS, different, tiny
from torch import nn
from torch.overrides import TorchFunctionMode

from mechtut.models.hooks import SITES, Edit, Site, capture, intervene, visiting
from mechtut.models.loading import load_model, recording

TOKENS = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(0))
STEP = 1e-5  # no kink of a ReLU and no other expert within
CLOSE = {"rel": 1e-6, "abs": 1e-7}


class AllDouble(TorchFunctionMode):
    """Norms and softmaxes in float64 too, which many families compute in float32
    whatever the weights are: too coarse for small steps.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(x):
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        given = {k: wide(v) for k, v in (kwargs or {}).items()}
        return func(*map(wide, args), **given)


@pytest.fixture
def all_double():
    with AllDouble():
        yield


def drawn(*shape):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def model_of(kind):
    return load_model(tiny(kind).double())


def sites_of(model):
    """A name of every site that the family has, of layer 1."""
    tapped = ("q", "k", "v", "pattern")
    names = [s for s in SITES if model.family.attention_interface or s not in tapped]
    if model.config.model_type in EXPERTS:
        names.remove("mlp_act")
    return [s if s == "embed" else f"{s}.1" for s in names]


def metric(logits):
    """A number that is no linear function of anything."""
    return (logits[:, -1].softmax(-1) * torch.arange(logits.shape[-1])).sum()


def by_steps(model, site, direction, **place):
    """The slope along a direction, from plain passes."""
    at = Site.parse(site)

    def moved(by):
        value = by * STEP * direction
        with intervene(model, [Edit(at.name, at.layer, value, mode="add", **place)]):
            return float(metric(model.logits(TOKENS)))

    return slope_of(moved)


def slope_of(function):
    """The slope at 0 with steps of one and two, right up to their fourth power."""
    one, two = (function(s) - function(-s) for s in (1, 2))
    return (8 * one - two) / (12 * STEP)


@pytest.mark.usefixtures("all_double")
@pytest.mark.parametrize("kind", different(CONFIGS))
def test_gradients_at_every_site_are_slopes(kind):
    model = model_of(kind)
    sites = sites_of(model)
    acts = capture(model, TOKENS, sites, gradients=True)
    slopes = torch.autograd.grad(metric(acts.logits), list(acts.by_site.values()))
    for site, slope in zip(sites, slopes, strict=True):
        direction = drawn(*slope.shape)
        if site == "pattern.1":  # no small step: to see what comes later
            direction = direction.tril()
        told = float((slope * direction).sum())
        assert told == pytest.approx(by_steps(model, site, direction), **CLOSE), site
        assert abs(told) > 1e-3, site
    assert all(w.grad is None and w.requires_grad for w in model.hf.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_recorded_or_not_the_bits_are_the_same(kind):
    model = load_model(tiny(kind))
    sites = [*sites_of(model), "resid_post"]
    plain = capture(model, TOKENS, sites)
    recorded = capture(model, TOKENS, sites, gradients=True)
    assert torch.equal(plain.logits, recorded.logits)
    for site in plain:
        assert torch.equal(plain[site], recorded[site]), site
        assert recorded[site].requires_grad and not plain[site].requires_grad
    assert recorded.logits.requires_grad and not plain.logits.requires_grad


@pytest.mark.usefixtures("all_double")
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(
    ("site", "place"),
    [
        ("resid_pre.1", {"pos": 2}),
        ("mlp_out.0", {"pos": slice(1, 3)}),
        ("z.1", {"head": 1}),
        ("q.1", {"pos": [1, 4], "head": 3}),
        ("k.1", {"head": 0}),
        ("pattern.1", {"pos": 5, "head": 2}),
        ("attn_out.2", {"pos": "last"}),
    ],
)
@pytest.mark.parametrize("mode", ["set", "add"])
def test_the_value_of_an_edit_gets_its_gradient(kind, site, place, mode):
    model, at = model_of(kind), Site.parse(site)
    shape = {"z": (model.d_head,), "q": (model.d_head,), "k": (model.d_head,)}
    shape = shape.get(at.name, (6,) if at.name == "pattern" else (model.d_model,))
    value = drawn(*shape).sigmoid().requires_grad_()
    edit = Edit(at.name, at.layer, value, mode=mode, **place)
    acts = capture(model, TOKENS, [], edits=[edit], gradients=True)
    (slope,) = torch.autograd.grad(metric(acts.logits), value)
    direction = drawn(*shape).flip(0)

    def moved(by):
        there = value.detach() + by * STEP * direction
        with intervene(model, [Edit(at.name, at.layer, there, mode=mode, **place)]):
            return float(metric(model.logits(TOKENS)))

    told = float((slope * direction).sum())
    assert told == pytest.approx(slope_of(moved), **CLOSE)

    with intervene(model, [edit]):  # the same by the other verb, with `backward`
        metric(model.logits(TOKENS, gradients=True)).backward()
        assert not model.logits(TOKENS).requires_grad
    assert torch.allclose(value.grad, slope, atol=1e-12)
    assert all(w.grad is None and w.requires_grad for w in model.hf.parameters())


def test_an_edited_site_is_captured_after_the_edit():
    model = model_of("gpt2")
    edit = Edit("resid_post", 0, torch.zeros(32), pos=3)
    sites = ["embed", "resid_post.0"]
    acts = capture(model, TOKENS, sites, edits=[edit], gradients=True)
    assert not acts["resid_post.0"][:, 3].any()
    at_input, at_site = torch.autograd.grad(
        metric(acts.logits), [acts["embed"], acts["resid_post.0"]]
    )
    assert at_site[:, 3].abs().sum() > 1e-6  # the zeros matter for what follows
    assert at_input.abs().sum() > 1e-6  # by way of the other positions
    everywhere = Edit("resid_post", 1, torch.zeros(32))
    acts = capture(model, TOKENS, "embed", edits=[everywhere], gradients=True)
    (nothing,) = torch.autograd.grad(metric(acts.logits), acts["embed"])
    assert not nothing.any()


def test_the_surrounding_mode_is_followed_by_hooks_and_not_by_verbs():
    model, modes = model_of("gpt2"), []
    see = {Site("z", 1): lambda x: modes.append(torch.is_grad_enabled())}
    with visiting(model, see), intervene(model, [Edit("z", 1, 0.0, head=0)]):
        loss = model.hf(TOKENS, use_cache=False).logits.sum()
        model.logits(TOKENS)
        with torch.no_grad():
            model.hf(TOKENS, use_cache=False)
            model.logits(TOKENS, gradients=True)
    assert modes == [True, False, False, True]
    loss.backward()  # the user's own pass is theirs, weights and all
    assert all(w.grad is not None for w in model.hf.parameters())
    with torch.no_grad():  # asking is asking, wherever it is asked
        assert capture(model, TOKENS, "z.1", gradients=True).logits.requires_grad
        assert not torch.is_grad_enabled()


def test_frozen_models_and_padding():
    frozen = load_model(tiny("llama").double().requires_grad_(False))
    learning = model_of("llama")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    slopes = []
    for model in (frozen, learning):
        given = {"attention_mask": mask, "gradients": True}
        acts = capture(model, TOKENS, "resid_pre.1", **given)
        found = torch.autograd.grad(metric(acts.logits), acts["resid_pre.1"])[0]
        slopes.append(found)
    assert torch.equal(*slopes)
    assert not slopes[0][0, :2].any()  # nobody reads padding
    assert not any(w.requires_grad for w in frozen.hf.parameters())
    assert all(w.requires_grad for w in learning.hf.parameters())


def test_weights_are_restored_after_errors_and_in_nested_blocks():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].bias.requires_grad_(False)
    before = [w.requires_grad for w in net.parameters()]
    with pytest.raises(ZeroDivisionError), recording(net):
        with recording(net):
            assert not any(w.requires_grad for w in net.parameters())
        assert not any(w.requires_grad for w in net.parameters())
        raise ZeroDivisionError
    assert [w.requires_grad for w in net.parameters()] == before


def test_any_module():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    batch = drawn(3, 4)
    acts = capture(net, batch, ["0", "1"], gradients=True)
    assert torch.equal(acts.logits, net(batch))
    first, second = torch.autograd.grad(
        acts.logits.sum(), [acts["0"], acts["1"]], allow_unused=False
    )
    wanted = net[2].weight.sum(0).expand(3, -1).detach()
    assert torch.allclose(second, wanted)
    assert torch.allclose(first, wanted * (net[0](batch) > 0))
    assert all(w.grad is None and w.requires_grad for w in net.parameters())
    assert not capture(net, batch, "1")["1"].requires_grad
    # whole numbers have no gradient, and are shown as they are
    counts = nn.Sequential(nn.Identity(), nn.Embedding(4, 2))
    ids = torch.tensor([[1, 2]])
    acts = capture(counts, ids, ["0", "1"], gradients=True)
    assert torch.equal(acts["0"], ids) and acts["1"].requires_grad


def test_inference_mode_is_refused():
    model = model_of("gpt2")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="leave it"):
        capture(model, TOKENS, "z.1", gradients=True)
    with pytest.raises(TypeError, match="gradients must be True or False"):
        capture(model, TOKENS, "z.1", gradients="yes")
