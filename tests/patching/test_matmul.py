"""Borrowed products: the same numbers however often they are asked for, and everything
given back.
"""

import copy

import pytest
import torch
from families import tiny

from mechtut.models.hooks import Edit
from mechtut.models.loading import load_model, weight_fingerprint
from mechtut.patching import matmul as kernels
from mechtut.patching.matmul import OFTEN, fast_matmul, onednn_available
from mechtut.patching.replay import Replay

MINI = load_model("mini", device="cpu")
TOKENS = torch.arange(40).view(2, 20)


@pytest.mark.skipif(
    not onednn_available(),
    reason="this PyTorch cannot run linear layers through oneDNN",
)
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64])
def test_arranging_the_unembedding_changes_no_bit(rows):
    """Of one row it would."""
    x = torch.randn(rows, MINI.d_model, generator=torch.Generator().manual_seed(0))
    with fast_matmul(MINI), torch.no_grad():
        first = MINI.unembed(x)
        for _ in range(OFTEN):
            assert torch.equal(MINI.unembed(x), first)


@pytest.mark.skipif(
    not onednn_available(),
    reason="this PyTorch cannot run linear layers through oneDNN",
)
def test_arranging_the_weights_changes_no_bit():
    with fast_matmul(MINI):
        first = MINI.logits(TOKENS)
        arranged = [
            vars(m)["forward"] for m in MINI.hf.modules() if "forward" in vars(m)
        ]
        for _ in range(OFTEN):
            assert torch.equal(MINI.logits(TOKENS), first)
    assert len(arranged) > 4 * MINI.n_layers
    assert not any("forward" in vars(m) for m in MINI.hf.modules())


@pytest.mark.parametrize("calls", [1, OFTEN + 1])
def test_gradients_reach_the_input(calls):
    """Whether or not the weights are arranged by then."""
    layer = MINI.hf.transformer.h[0].mlp.c_fc
    x = torch.randn(
        3, MINI.d_model, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    with fast_matmul(MINI):
        for _ in range(calls):
            (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert (
        found - plain
    ).abs().max() < 1e-5 * plain.abs().max()  # float32 rounding in sums of 768 terms


@pytest.mark.skipif(
    not onednn_available(),
    reason="this PyTorch cannot run linear layers through oneDNN",
)
def test_activation_is_the_same_function():
    """Over all that can occur, against float64; PyTorch's own float32 version is off by
    up to 5e-7 itself.
    """
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e4, 1e4, 0.0])])
    act = MINI.hf.transformer.h[0].mlp.act
    with fast_matmul(MINI):
        found = act(x)
    assert (
        found - torch.nn.functional.gelu(x.double(), approximate="tanh")
    ).abs().max() < 1e-6


@pytest.mark.skipif(
    not onednn_available(),
    reason="this PyTorch cannot run linear layers through oneDNN",
)
@pytest.mark.parametrize("inside", [True, False])
def test_mlp_and_its_activation(inside, monkeypatch):
    """Inside the first product or behind it, against float64, at values far from zero
    too.

    The bound is float32 rounding in sums of 768 terms.
    """
    monkeypatch.setattr(kernels, "_INSIDE", inside)
    mlp = MINI.hf.transformer.h[2].mlp
    x = 4 * torch.randn(50, MINI.d_model, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(mlp).double()(x.double())
    with fast_matmul(MINI), torch.no_grad():
        found = mlp(x)
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("part", ["c_fc", "act"])
def test_watching_a_part_of_the_mlp_still_works(part):
    """A hook inside the MLP sees what it sees without the fast products, and what it
    puts there counts.
    """
    mlp = MINI.hf.transformer.h[2].mlp
    x = torch.randn(5, MINI.d_model, generator=torch.Generator().manual_seed(1))
    seen = []
    handle = getattr(mlp, part).register_forward_hook(
        lambda module, args, out: seen.append(out) or 2 * out
    )
    try:
        with torch.no_grad():
            plain = mlp(x)
            with fast_matmul(MINI):
                found = mlp(x)
    finally:
        handle.remove()
    assert (
        len(seen) == 2
        and torch.allclose(*seen, atol=1e-5)
        and torch.allclose(found, plain, atol=1e-4)
    )


class Linear(torch.nn.Linear):
    """An adapter with the name of the layer that it stands for, as PEFT has them."""

    def forward(self, x):
        return super().forward(x) + x @ self.lora


class Conv1D(torch.nn.Module):
    """The same around GPT-2's layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + 0.5


def _adapted_linear(model):
    parent = model.blocks[1].mlp
    old = parent.down_proj
    new = Linear(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    g = torch.Generator().manual_seed(0)
    lora = 0.3 * torch.randn(old.in_features, old.out_features, generator=g)
    new.lora = torch.nn.Parameter(lora)
    parent.down_proj = new


def _adapted_conv(model):
    model.blocks[1].mlp.c_fc = Conv1D(model.blocks[1].mlp.c_fc)


def _adapted_activation(model):
    class NewGELUActivation(torch.nn.Module):
        def forward(self, x):
            return x.relu()

    model.blocks[1].mlp.act = NewGELUActivation()


def _weight_norm(model):
    layer = model.blocks[1].mlp.down_proj
    torch.nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data *= 1.5


def _tensor_subclass(model):
    class Scaled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return out * 2 if func is torch.nn.functional.linear else out

    layer = model.blocks[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Scaled))


@pytest.mark.parametrize(
    "kind, adapt",
    [
        ("llama", _adapted_linear),
        ("llama", _weight_norm),
        ("llama", _tensor_subclass),
        ("gpt2", _adapted_conv),
        ("gpt2", _adapted_activation),
    ],
)
def test_layers_that_only_have_the_name_keep_their_own_forward(kind, adapt):
    model = load_model(tiny(kind))
    before, tokens = model.logits(TOKENS), TOKENS
    adapt(model)
    with torch.no_grad():
        plain = model.hf(tokens, use_cache=False).logits
    assert (plain - before).abs().max() > 1e-3
    with fast_matmul(model):
        for _ in range(2):
            assert torch.allclose(model.logits(tokens), plain, atol=1e-4)
    edits = [[Edit("resid_post", 0, 0.0, pos=-1, mode="add")]]
    found = Replay(model, tokens).run(edits)[0, :, 0]
    assert torch.allclose(found, plain[:, -1], atol=1e-4)


def test_fingerprints_see_adapters_and_buffers():
    one, other = load_model(tiny("llama")), load_model(tiny("llama"))
    assert weight_fingerprint(one) == weight_fingerprint(other)
    layer = other.blocks[1].mlp.down_proj
    layer.register_buffer("scale", torch.ones(1))
    second = weight_fingerprint(other)
    layer.scaling, layer.active_adapters = {"default": 1.0}, ["default"]
    third = weight_fingerprint(other)
    layer.scaling = {"default": 2.0}
    fourth = weight_fingerprint(other)
    assert len({weight_fingerprint(one), second, third, fourth}) == 4


@pytest.mark.skipif(
    not onednn_available(),
    reason="this PyTorch cannot run linear layers through oneDNN",
)
def test_the_faster_product_is_chosen_once(monkeypatch):
    """By a clock that says which is faster; a class of shapes is measured once."""
    now, speed, calls = [0.0], {"own": 1.0, "other": 1.0}, []

    def timed(name, product):
        def run(*arguments):
            calls.append(name)
            now[0] += speed[name]
            return product(*arguments)

        return run

    linear = torch.nn.functional.linear
    monkeypatch.setattr(kernels, "_linear", timed("other", kernels._linear))
    monkeypatch.setattr(torch.nn.functional, "linear", timed("own", linear))
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: now[0])
    for avx in (True, False):
        monkeypatch.setattr(kernels, "_AVX512", avx)
        for other, wanted in ((0.4, True), (2.5, False), (1.4, avx), (0.7, avx)):
            monkeypatch.setattr(kernels, "_onednn", {})
            speed["other"] = other
            x, weight = torch.ones(5, 4096), torch.ones(1024, 4096)
            assert kernels.onednn_is_faster(x, weight, None) == wanted
            measured = len(calls)
            kernels.onednn_is_faster(
                torch.ones(7, 4096), weight, None
            )  # the same class
            assert len(calls) == measured
            kernels.onednn_is_faster(torch.ones(8, 4096), weight, None)
            assert len(calls) > measured
            measured = len(calls)
            many = [torch.ones(n, 4096) for n in (200, 300, 900)]
            kernels.onednn_is_faster(many[0], weight, None)
            assert len(calls) == measured + 4, "of what takes long the best of two"
            assert all(
                kernels.onednn_is_faster(x, weight, None) == wanted for x in many
            )
            assert len(calls) == measured + 4, "of many rows some are enough"
            few = torch.ones(5, 8), torch.ones(4, 8)
            measured = len(calls)
            assert (
                kernels.onednn_is_faster(*few, None) == avx and len(calls) == measured
            )


def test_weights_that_change_inside_the_block():
    """Arranged once, and again when an edit has changed them in place."""
    model = load_model("mini", device="cpu")
    weight = model.blocks[2].mlp.c_proj.weight
    saved = weight.detach().clone()
    try:
        with fast_matmul(model), torch.no_grad():
            for _ in range(OFTEN + 2):
                before = model.logits(TOKENS)
            weight.mul_(0.5)
            after = model.logits(TOKENS)
        assert torch.allclose(after, model.logits(TOKENS), atol=1e-3)
        assert (after - before).abs().max() > 0.1
    finally:
        with torch.no_grad():
            weight.copy_(saved)
