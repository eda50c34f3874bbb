"""Borrowed products: the same numbers however often they are asked for, and everything
given back.
"""

import copy

import pytest
import torch

from mechtut.models.loading import load_model
from mechtut.patching import matmul as kernels
from mechtut.patching.matmul import OFTEN, fast_matmul, onednn_available

MINI = load_model("mini", device="cpu")
TOKENS = torch.arange(40).view(2, 20)


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
