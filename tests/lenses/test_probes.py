"""Linear probes: scikit-learn's numbers, and folds that split no subject."""

import warnings

import numpy as np
import pytest
import torch
from golden_models import GOLDEN, read_json

from mechtut.lenses.probes import (
    DirectionProbe,
    Probe,
    ProbeScores,
    probe,
    probe_layers,
)

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


def test_states_of_very_different_sizes_are_fitted_or_told(monkeypatch):
    real = torch.optim.LBFGS  # 25,000 steps would take half a minute to say the same
    monkeypatch.setattr(
        torch.optim, "LBFGS", lambda *a, **k: real(*a, **{**k, "max_iter": 100})
    )
    x = torch.randn(60, 12, generator=DRAW) * 30 + 150
    x[:, 0] *= 1e4
    labels = [str(i % 3) for i in range(60)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        probe = Probe.fit(x, labels)
    weight, bias = (t.clone().requires_grad_() for t in (probe.weight, probe.bias))
    log_p = (x.double() @ weight.T + bias).log_softmax(-1)
    nll = -log_p[range(60), [i % 3 for i in range(60)]].sum()
    (nll + weight.square().sum() / 2).backward()
    slope = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
    assert slope <= 1e-4 or any("gradient of" in str(w.message) for w in told)


@pytest.mark.parametrize("kind", ["task", "control"])
def test_direction_of_scikit_learn(kind):
    """scikit-learn 1.9.1, two classes, C = 1 (tests/golden/steering/probes)."""
    about = read_json("steering/probes/probes.json")
    z = np.load(GOLDEN / f"steering/probes/{kind}.npz")
    train, test, told = about["train_rows"], about["test_rows"], about["results"][kind]
    given = (torch.tensor(z["X"]), z["y"], range(40), False)
    how = {"test": test, "standardise": False}
    found = probe(*given, **how)
    assert np.abs(found.weight.numpy() / z["coef"] - 1).max() < 1e-3
    assert found.bias == pytest.approx(float(z["intercept"][0]), 1e-3)
    assert found.accuracy == pytest.approx(told["logistic_test"])
    assert found.train_accuracy == told["logistic_train"]
    mean = probe(*given, **how, method="mean")
    assert np.abs(mean.weight.numpy() - z["dm"]).max() < 1e-9
    assert mean.accuracy == pytest.approx(told["mean_test"])
    assert len(train) + len(test) == 40 and len(found.labels) == len(test)


def test_selectivity_of_the_golden_words():
    """Words are the types; the control labels that were dealt to them are given."""
    about = read_json("steering/probes/probes.json")
    task, other = (
        np.load(GOLDEN / f"steering/probes/{kind}.npz") for kind in ("task", "control")
    )
    vocabulary = read_json("steering/models/tokenizer/tokenizer.json")["model"]["vocab"]
    at = about["word_position"] - 1  # a token of its own begins the text
    words = [text.split()[at] for text in about["texts"]]
    control = {w: about["control_labels"][str(vocabulary[w])] for w in set(words)}
    assert [control[w] for w in words] == other["y"].tolist()
    with pytest.warns(UserWarning, match="2 of 12 held-out states"):
        found = probe(
            torch.tensor(task["X"]),
            task["y"],
            range(40),
            control,
            types=words,
            test=about["test_rows"],
            standardise=False,
        )
    told = about["results"]
    assert float(found.control.mean()) == pytest.approx(
        told["control"]["logistic_test"]
    )
    assert found.selectivity == pytest.approx(told["selectivity"])


def _two_kinds(n: int, d: int = 6):
    """States of two labels that differ along one axis, and noise of unlike sizes."""
    draw = torch.Generator().manual_seed(1)
    y = [i % 2 for i in range(n)]
    x = torch.randn(n, d, generator=draw).double()
    x[:, 0] += 3 * torch.tensor(y).double()
    return x * torch.logspace(-1, 2, d).double(), y


def test_training_statistics_only_and_weights_for_states_as_they_are():
    """By hand: scikit-learn's objective on states divided by the spread of training."""
    x, y = _two_kinds(40)
    found = probe(x, y, range(40), False, test=range(30, 40))
    mean, spread = x[:30].mean(0), x[:30].std(0, unbiased=False)
    z, labels = (x[:30] - mean) / spread, torch.tensor(y[:30]).double()
    w = (found.weight * spread).requires_grad_()
    b = torch.tensor(found.bias + float(mean @ found.weight)).requires_grad_()
    nll = torch.nn.functional.binary_cross_entropy_with_logits
    (nll(z @ w + b, labels, reduction="sum") + w.square().sum() / 2).backward()
    assert w.grad.abs().max() < 1e-5 and b.grad.abs() < 1e-5
    far = x.clone()
    far[30:] *= 1000  # what is held out does not count
    again = probe(far, y, range(40), False, test=range(30, 40))
    assert torch.equal(again.weight, found.weight) and again.bias == found.bias
    assert torch.allclose(found.score(x[30:]), found.scores, rtol=1e-12)


def test_whitened_is_fishers_direction():
    x, y = _two_kinds(60)
    found = probe(x, y, range(60), False, test=[0, 1], method="whitened")
    rest, labels = x[2:].numpy(), np.array(y[2:])
    zero, one = rest[labels == 0], rest[labels == 1]
    inside = np.concatenate([zero - zero.mean(0), one - one.mean(0)])
    covariance = inside.T @ inside / len(inside)
    want = np.linalg.solve(covariance, one.mean(0) - zero.mean(0))
    assert np.allclose(found.weight, want, 1e-6)
    middle = (zero.mean(0) + one.mean(0)) / 2
    assert float(found.score(torch.tensor(middle))) == pytest.approx(0, abs=1e-9)


def test_items_are_whole_and_the_interval_counts_them():
    x, y = _two_kinds(80)
    groups = [f"q{i // 4}" for i in range(80)]
    found = probe(x, y, groups, seed=3)
    assert len(set(found.groups)) == 6 and len(found.labels) == 24
    told = found.right.reshape(6, 4).mean(1)  # q by q, as they are in order
    p, n = float(told.mean()), 6
    root = 1.96 * (p * (1 - p) / n + 1.96**2 / 4 / n**2) ** 0.5
    low = (p + 1.96**2 / 2 / n - root) / (1 + 1.96**2 / n)
    assert found.interval[0] == pytest.approx(low)
    assert torch.equal(probe(x, y, groups, seed=3).weight, found.weight)
    assert set(probe(x, y, groups, seed=4).groups) != set(found.groups)


def test_control_that_hangs_on_items_is_chance_and_on_words_is_not():
    """Each state names its word: any labels of words are learned, none of items."""
    words = [i % 8 for i in range(160)]
    x = torch.eye(8)[words].double() * 5
    y = [w % 2 for w in words]
    by_sentence = probe(x, y, range(160), types=words)
    assert by_sentence.accuracy == 1 and by_sentence.selectivity == 0
    with pytest.warns(UserWarning, match="selectivity is too high"):
        probe(x, y, words, types=words)
    assert probe(x, y, words, control=False).selectivity is None


def test_a_probe_is_kept_and_shown(tmp_path):
    x, y = _two_kinds(40)
    found = probe(x, y, range(40))
    again = DirectionProbe.load(found.save(tmp_path))
    assert torch.equal(again.weight, found.weight)
    assert again.to_pandas().equals(found.to_pandas())
    assert len(found.plot().patches) > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [0, 1, 2, 1]}, "a label of y must be at least 0 and at most 1, not 2"),
        ({"y": [1, 1, 1, 1]}, "all are 1"),
        ({"y": [0, 1]}, "equally long"),
        ({"groups": [0, 0, 1, 2], "test": [1]}, "item 0 has states in both"),
        ({"test": 0.0}, "holds 0 of 4 items out"),
        ({"test": 1.0}, "holds 4 of 4 items out"),
        ({"types": list("abc")}, "equally long"),
        ({"control": {0: 1}}, "no label for type 1"),
        ({"x": torch.full((4, 2), torch.nan)}, "NaN"),
        ({"x": torch.ones(4, 2), "test": [3]}, "no direction"),
    ],
)
def test_probe_refuses(change, message):
    given = {"x": torch.eye(4)[:, :2], "y": [0, 1, 0, 1], "groups": [0, 1, 2, 3]}
    with pytest.raises((ValueError, IndexError), match=message):
        probe(**{**given, "control": False, **change})
