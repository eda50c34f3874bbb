"""Linear probes: scikit-learn's numbers, and folds that split no subject."""

import warnings

import numpy as np
import pytest
import torch
from golden_models import GOLDEN

from mechtut.lenses.probes import Probe, ProbeScores, probe_layers

DRAW = torch.Generator().manual_seed(0)


def test_numbers_of_scikit_learn():
    z = np.load(GOLDEN / "patchscopes/linear_probe.f64.npz")
    x, n = torch.tensor(z["X"]), int(z["n_train"])
    labels = [str(label) for label in z["y"]]
    probe = Probe.fit(x[:n], labels[:n], tolerance=1e-9)
    assert np.abs(probe.weight.numpy() - z["coef"]).max() < 1e-6
    # a constant on all biases changes no prediction
    shift = probe.bias.numpy() - z["intercept"]
    assert np.abs(shift - shift.mean()).max() < 1e-5
    assert list(probe.predict(x[n:])) == [str(label) for label in z["predicted"]]


def test_least_loss_where_states_are_wide():
    """The gradient of the objective, by autograd in the full space, is 0."""
    x = torch.randn(9, 40, generator=DRAW).double()
    labels = ["a", "b", "c"] * 3
    probe = Probe.fit(x, labels, c=0.7, tolerance=1e-9)
    weight = probe.weight.clone().requires_grad_()
    bias = probe.bias.clone().requires_grad_()
    log_p = (x @ weight.T + bias).log_softmax(-1)
    nll = -log_p[range(9), [0, 1, 2] * 3].sum()
    (0.7 * nll + weight.square().sum() / 2).backward()
    assert weight.grad.abs().max() < 1e-7 and bias.grad.abs().max() < 1e-7


def test_no_subject_is_on_both_sides():
    """States that name their subject, and nothing else: held out they tell nothing."""
    subjects = [f"s{i}" for i in range(12)]
    groups = [s for s in subjects for _ in range(3)]
    states = torch.eye(12).repeat_interleave(3, 0)[:, None] * 10
    labels = [("a", "b")[subjects.index(g) % 2] for g in groups]
    known = Probe.fit(states[:, 0], labels)
    assert list(known.predict(states[:, 0])) == labels  # by heart
    scores = probe_layers(states, labels, groups, folds=4)
    assert float(scores.accuracy) <= 0.5
    told = scores.right[:, 0].reshape(12, 3)
    assert (told == told[:, :1]).all()


def test_control_labels_are_as_many_and_of_subjects():
    x = torch.randn(60, 2, 5, generator=DRAW)
    groups = [f"s{i // 2}" for i in range(60)]
    labels = [("a", "b")[i // 2 % 2] for i in range(60)]
    x[:, 1, 0] += torch.tensor([3.0 if label == "a" else -3.0 for label in labels])
    scores = probe_layers(x, labels, groups, layers=[4, 9])
    table = scores.to_pandas()
    assert table.layer.tolist() == [4, 9] and table.subjects.tolist() == [30, 30]
    assert table.accuracy[1] > 0.95 > 0.75 > table.accuracy[0]
    assert (table.control < 0.8).all() and scores.selectivity[1] > 0.2
    again = probe_layers(x, labels, groups, layers=[4, 9])
    assert torch.equal(again.right, scores.right)


def test_the_interval_is_over_subjects():
    """Nine states of one subject are not nine tries."""
    right = torch.tensor([1.0] * 9 + [0.0] + [1.0]).double()[:, None]
    groups = ("a",) * 9 + ("b", "c")
    table = ProbeScores(
        right=right, control=right, majority=0.5, layers=(0,), groups=groups
    ).to_pandas()
    assert table.half_width[0] == pytest.approx(4.3027 * (1 / 3) ** 0.5 / 3**0.5, 1e-3)


def test_wrong_input():
    x = torch.ones(4, 1, 2)
    with pytest.raises(ValueError, match="group 's' has labels"):
        probe_layers(x, ["a", "b", "a", "b"], ["s", "s", "t", "t"], folds=2)
    with pytest.raises(ValueError, match="folds=5 of 4 groups"):
        probe_layers(x, ["a", "b"] * 2, list("wxyz"))
    with pytest.raises(ValueError, match="two kinds"):
        Probe.fit(x[:, 0], ["a"] * 4)
    with pytest.raises(ValueError, match="NaN"):
        Probe.fit(x[:, 0] / 0, ["a", "b"] * 2)
    with pytest.raises(ValueError, match="labels"):
        Probe.fit(x[:, 0], ["a", "b"])


def test_states_of_very_different_sizes_are_fitted_or_told():
    x = torch.randn(300, 50, generator=DRAW) * 30 + 150
    x[:, 0] *= 1e4
    labels = [str(i % 5) for i in range(300)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        probe = Probe.fit(x, labels)
    weight, bias = (t.clone().requires_grad_() for t in (probe.weight, probe.bias))
    log_p = (x.double() @ weight.T + bias).log_softmax(-1)
    nll = -log_p[range(300), [i % 5 for i in range(300)]].sum()
    (nll + weight.square().sum() / 2).backward()
    slope = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
    assert slope <= 1e-4 or any("gradient of" in str(w.message) for w in told)
