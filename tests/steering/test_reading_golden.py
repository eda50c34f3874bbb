"""Reading against the packages' own code: RepE's reader class, repeng, steering-vectors
(tests/golden/steering/repe).
"""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from golden_steering import NEAR, apart, steering_model, steering_numbers

from mechtut.models.hooks import Where
from mechtut.prompts.completions import complete
from mechtut.steering.acting import steer
from mechtut.steering.reading import reading_vectors

LLAMA = NEAR["llama"]
# RepE and repeng keep directions in float32 at one point or another
DIRECTIONS = {"f32": 2e-5, "f64": 5e-6}
each = pytest.mark.parametrize("half", LLAMA)


def _read(half, method, **how):
    told, z = steering_numbers("repe")
    model = steering_model("llama", half)
    found = reading_vectors(model, told["train"], told["labels"], method, **how)
    return told, z, model, found


@each
def test_shuffled_pca_of_repe(half):
    """Their texts are in shuffled order already."""
    told, z, _, readers = _read(half, "pca", components=2, shuffle=False)
    sizes = z[f"{half}_explained"]
    assert apart(readers.directions, z[f"{half}_directions"]) < DIRECTIONS[half]
    shares = sizes[:, :2] / sizes.sum(1, keepdims=True)
    assert apart(readers.explained, shares) < DIRECTIONS[half]
    # what they take off states is the mean of the shuffled differences
    assert apart(readers.centre, z[f"{half}_diff_means"]) < LLAMA[half]
    assert readers.accuracy(told["test"]).tolist() == told[f"{half}_test_accuracy"]


@each
def test_scan_of_repe(half):
    told, z, _, readers = _read(half, "pca", shuffle=False)
    scan = readers.scan(told["prompt_ids"])
    assert apart(scan.scores, z[f"{half}_lat"]) < LLAMA[half]
    assert len(scan.tokens) == len(told["prompt_ids"])


@each
@pytest.mark.parametrize("method", ["pca_diff", "pca_center"])
def test_recipes_of_repeng(half, method):
    """Its top layer is behind the final norm."""
    told, z = steering_numbers("repe")
    how = {"layers": told["repeng_layers"], "normed_last": True}
    *_, readers = _read(half, method, **how)
    assert apart(readers.directions[:, 0], z[f"{half}_repeng_{method}"]) < 1e-5
    if half == "f64":
        assert apart(readers.directions[:, 0], z[f"{half}_repeng_{method}"]) < 5e-6


@each
def test_aggregators_of_steering_vectors(half):
    _, z, _, mean = _read(half, "mean")
    raw = mean.vector(scaled=True).values
    assert apart(raw, z[f"{half}_sv_mean"]) < LLAMA[half]
    symmetric = _read(half, "pca_symmetric")[-1].directions[:, 0]
    assert apart(symmetric, z[f"{half}_sv_pca"]) < DIRECTIONS[half]


@each
def test_logistic_of_steering_vectors(half):
    """scikit-learn stops there at its default tolerance, ours goes on."""
    _, z, _, readers = _read(half, "logistic")
    wanted = torch.tensor(z[f"{half}_sv_logistic"]).double()
    found = readers.directions[:, 0].double()
    assert (found - wanted).norm(dim=1).max() < 1e-2
    assert ((found * wanted).sum(-1) / wanted.norm(dim=1)).min() > 1 - 2e-5


def test_logistic_is_the_least_loss():
    """steering-vectors' objective, by Newton's method."""
    told, z, _, readers = _read("f64", "logistic")
    flat = np.ravel(told["labels"]) == 1
    for i, direction in enumerate(readers.directions[:, 0].numpy()):
        h = z["f64_block_outputs"][:, i]
        middle = (h[flat] + h[~flat]) / 2
        x = np.concatenate([h[flat] - middle, h[~flat] - middle])
        y = np.repeat([1.0, 0.0], len(middle))
        w = np.zeros(x.shape[1])
        for _ in range(30):
            p = 1 / (1 + np.exp(-x @ w))
            curvature = (x.T * (p * (1 - p))) @ x + np.eye(len(w))
            w -= np.linalg.solve(curvature, x.T @ (p - y) + w)
        assert np.abs(direction - w / np.linalg.norm(w)).max() < 1e-3


@each
def test_control_of_repe(half):
    """3 times the signed direction at blocks 1, 2 and 3, everywhere; along the side on
    which each state lies; and at one block and token, where the length is kept.
    """
    told, z, model, readers = _read(half, "pca", shuffle=False)
    vector, limit = readers.vector(layers=told["layers"]), LLAMA[half]
    for name, how in (
        ("linear_comb", {}),
        ("piecewise_linear", {"mode": "piecewise"}),
        ("last_normalised", {"layers": [2], "where": -1, "keep_norm": True}),
    ):
        with steer(model, vector, coefficient=told["coeff"], **how):
            logits = model.logits([told["prompt_ids"]])[0]
        assert apart(logits, z[f"{half}_control_{name}"]) < limit, name


@each
def test_control_of_repeng(half):
    """Its vectors at three blocks, which do not touch the normalised top layer."""
    told, z = steering_numbers("repe")
    how = {"layers": told["repeng_control_layers"]}
    *_, model, readers = _read(half, "pca_diff", **how)
    vector = told["coeff"] * readers.vector()
    with steer(model, vector):
        logits = model.logits([told["prompt_ids"]])[0]
        written = complete(model, (told["prompt_ids"], 0), 10)
    with steer(model, vector, keep_norm=True):
        normalised = model.logits([told["prompt_ids"]])[0]
    # its directions were float32 when they were added
    assert apart(logits, z[f"{half}_repeng_logits"]) < 1e-4
    assert apart(normalised, z[f"{half}_repeng_logits_normalised"]) < 1e-4
    assert written == told[f"{half}_repeng_greedy10"]


@each
def test_operators_of_steering_vectors(half):
    """The mean at all blocks from position 4 on: added, removed, removed and added."""
    told, z, model, readers = _read(half, "mean")
    vector, where = readers.vector(scaled=True), Where("from", 4)
    for name, modes in (
        ("add", ["add"]),
        ("ablate", ["ablate"]),
        ("ablate_add", ["ablate", "add"]),
    ):
        with ExitStack() as stack:
            for mode in modes:
                how = {"coefficient": 1.5, "where": where, "mode": mode}
                stack.enter_context(steer(model, vector, **how))
            logits = model.logits([told["prompt_ids"]])[0]
        assert apart(logits, z[f"{half}_sv_logits_{name}"]) < LLAMA[half], name
