"""Waves: numpy's transform, plain loops and the authors' numbers."""

import numpy as np
import pytest
import torch
from families import gap
from grokking_golden import arrays, network, numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtut.grokking.fourier import (
    component_norms,
    fourier2,
    fourier_basis,
    frequencies,
    key_frequencies,
    logit_coefficients,
    mlp_activity,
    neuron_frequencies,
    neuron_logit_map,
)
from mechtut.grokking.network import ModularAddition

ODD = st.sampled_from([7, 9, 11, 15, 21])


def pairs(p):
    return torch.cartesian_prod(torch.arange(p), torch.arange(p)).T


@given(ODD, st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_basis_is_that_of_numpys_transform(p, seed):
    basis = fourier_basis(p)
    assert gap(basis @ basis.T, torch.eye(p)) < 1e-12
    x = np.random.default_rng(seed).normal(size=p)
    theirs, ours = np.fft.rfft(x), basis.numpy() @ x
    assert ours[0] == pytest.approx(theirs[0].real / p**0.5, abs=1e-12)
    scale = (2 / p) ** 0.5
    assert np.allclose(ours[1::2], theirs[1:].real * scale, atol=1e-12)
    assert np.allclose(ours[2::2], -theirs[1:].imag * scale, atol=1e-12)


@given(ODD, st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_two_axes_are_two_transforms(p, seed):
    x = torch.randn(p * p, 2, generator=torch.Generator().manual_seed(seed)).double()
    basis = fourier_basis(p)
    found = fourier2(x)
    for n in range(2):
        assert gap(found[..., n], basis @ x[:, n].reshape(p, p) @ basis.T) < 1e-12
    assert float(found.square().sum()) == pytest.approx(float(x.square().sum()))
    assert found.shape == (p, p, 2) and fourier2(x[:, 0]).shape == (p, p)


@given(ODD, st.data())
@settings(max_examples=20, deadline=None)
def test_waves_of_a_sum_have_their_place(p, data):
    """The textbook's formulas: two products each, of equal size; also k = p // 2."""
    k = data.draw(st.integers(1, p // 2))
    a, b = pairs(p)
    angle = 2 * np.pi * k * (a + b).double() / p
    c, s = 2 * k - 1, 2 * k
    found = fourier2(torch.stack([angle.cos(), angle.sin()], 1)) / (p / 2)
    wanted = torch.zeros(p, p, 2).double()
    wanted[c, c, 0], wanted[s, s, 0], wanted[s, c, 1], wanted[c, s, 1] = 1, -1, 1, 1
    assert gap(found, wanted) < 1e-12


def test_a_neurons_frequency():
    """The highest frequency too; a dead neuron and a constant one have none."""
    p = 11
    a, b = pairs(p)
    wave = lambda k, x: torch.cos(2 * np.pi * k * x.double() / p)  # noqa: E731
    acts = torch.stack(
        [
            wave(5, a + b) + 3,
            wave(2, a) + wave(2, a - b),
            wave(1, a) + wave(2, b),
            torch.zeros(p * p),
            torch.full((p * p,), 0.1),
        ],
        1,
    )
    found = neuron_frequencies(acts)
    assert found.frequency.tolist()[:2] == [5, 2]
    assert found.frequency.tolist()[3:] == [0, 0]
    assert gap(found.fve, torch.tensor([1, 1, 0.5, 0, 0])) < 1e-9
    assert gap(found.quadratic[:2], torch.tensor([1, 0.5])) < 1e-9


def test_numbers_of_the_authors():
    model, known = network(), arrays()
    found = neuron_frequencies(mlp_activity(model))
    assert torch.equal(found.frequency, known["neuron_freq"])
    assert gap(found.fve, known["neuron_fve"]) < 1e-9
    assert int((found.fve < 0.85).sum()) == numbers()["unclustered"]
    assert key_frequencies(model) == tuple(numbers()["key_freqs"]) == (5, 12, 15)
    norms = component_norms(model.W_E.T[:-1])
    assert gap(norms, known["embed_fourier_norms"]) < 1e-9
    norms = component_norms(neuron_logit_map(model))
    assert gap(norms, known["neuron_logit_fourier_norms"]) < 1e-9
    logits = model.all_logits()
    assert gap(fourier2(logits).norm(dim=-1), known["logit_fourier_norms"]) < 1e-8
    coefficient, similarity = logit_coefficients(logits)
    assert gap(coefficient, known["cos_coeff"]) < 1e-8
    assert gap(similarity, known["cos_sim"]) < 1e-11
    assert set(frequencies(model).keys().values()) == {(5, 12, 15)}


def test_the_authors_loop_misses_the_highest_frequency():
    """Their result on this network, by their rule; ours has the 15."""
    power = fourier2(acts := mlp_activity(network()) - mlp_activity(network()).mean(0))
    power, total = power.square(), acts.square().sum(0)
    shares = []
    for k in range(1, 31 // 2):  # one short
        block = [0, 2 * k - 1, 2 * k]
        shares.append(power[block][:, block].sum((0, 1)) / total)
    theirs = (1 + torch.stack(shares).argmax(0)).unique().tolist()
    assert theirs == numbers()["authors_f32"]["key_freqs_authors"] == [1, 5, 12]


def test_coefficients_of_a_plain_loop():
    p = 9
    logits = torch.randn(p * p, p, generator=torch.Generator().manual_seed(0)).double()
    a, b, c = torch.cartesian_prod(*[torch.arange(p)] * 3).T
    found = logit_coefficients(logits)
    for k in range(1, p // 2 + 1):
        wave = torch.cos(2 * np.pi * k * (a + b - c).double() / p)
        wanted = float(wave @ logits.flatten() / wave.norm())
        assert float(found.coefficient[k - 1]) == pytest.approx(wanted, abs=1e-9)
    assert gap(found.similarity, found.coefficient / logits.norm()) < 1e-12


def test_shares_and_the_rule():
    model = ModularAddition(11, d_model=8, d_mlp=16)
    found = frequencies(model)
    for name in ("embedding", "neuron_logit_map", "logits"):
        assert float(getattr(found, name).sum()) == pytest.approx(1)
    assert found.keys()["neurons"] == () and float(found.neurons.sum()) == 0
    assert key_frequencies(model, fve=0.0) != ()
    assert len(found.to_pandas()) == 5 and len(found.plot()) == 4


def test_wrong_input():
    with pytest.raises(ValueError, match="p must be odd, not 12"):
        fourier_basis(12)
    with pytest.raises(ValueError, match="50 is not a square"):
        fourier2(torch.zeros(50, 2))
    with pytest.raises(ValueError, match="p must be odd, not 8"):
        neuron_frequencies(torch.zeros(64, 2))
    with pytest.raises(ValueError, match="49 inputs are of p = 7, but a row has 8"):
        logit_coefficients(torch.zeros(49, 8))
