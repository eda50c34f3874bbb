"""Properties of levels, splits, calibrations and scores; hostile input.

Agreement is in test_neuron_golden.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechtut.neurons.records import ActivationRecord, NeuronRecord
from mechtut.neurons.scoring import (
    balanced_accuracy,
    calibrate,
    discretize,
    expected_value,
    records_of,
    score,
    split_records,
)

finite = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda v: round(v, 3))
lists = st.lists(finite, min_size=1, max_size=30)


@given(lists, st.floats(0.01, 1e3))
def test_levels_are_monotone_and_in_range(values, highest):
    levels = discretize(values, highest)
    assert all(isinstance(v, int) and 0 <= v <= 10 for v in levels)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [levels[i] for i in order] == sorted(levels)
    assert discretize([highest], highest) == [10] and discretize(
        [-highest], highest
    ) == [0]


@given(st.integers(0, 60), st.integers(0, 60))
def test_splits_share_nothing(n_top, n_random):
    splits = split_records(n_top, n_random)
    dealt = [label for part in splits.values() for label in part]
    assert len(dealt) == len(set(dealt)) == 4 * (n_top // 4) + 3 * (n_random // 3)
    assert all(label[0] == "T" for label in splits["train"])
    assert {
        label
        for label in dealt
        if int(label[1:]) >= (n_top if label[0] == "T" else n_random)
    } == set()


@given(st.integers(1, 5), st.integers(0, 30), st.integers(0, 30))
def test_too_few_records_is_an_error(n, n_top, n_random):
    if n_top >= 4 * n and n_random >= 3 * n:
        assert all(
            len(part) >= n for part in split_records(n_top, n_random, n).values()
        )
    else:
        with pytest.raises(ValueError, match=f"{4 * n} top and {3 * n} random"):
            split_records(n_top, n_random, n)


@given(
    st.lists(
        st.tuples(st.sampled_from(["0", "3", "7", "10"]), st.floats(-20, 0)),
        min_size=1,
        unique_by=lambda p: p[0],
    )
)
def test_expected_value_is_a_mean_of_levels(pairs):
    value = expected_value(pairs)
    levels = [int(t) for t, _ in pairs]
    assert min(levels) - 1e-9 <= value <= max(levels) + 1e-9
    assert expected_value([*pairs, ("unknown", -0.1), (" 5", -0.1)]) == pytest.approx(
        value
    ), "other strings do not count"


def test_expected_value_warns_when_nothing_was_said():
    with pytest.warns(UserWarning, match="none of the log-probabilities"):
        assert expected_value({"unknown": -0.1}) == 0.0


@given(st.lists(st.tuples(finite, finite), min_size=3, max_size=30))
def test_linear_calibration_is_least_squares(pairs):
    x, y = (np.array(v) for v in zip(*pairs, strict=True))
    fitted = calibrate(x, y, "linear")(x)
    error = ((np.array(fitted) - y) ** 2).sum()
    assert error <= ((y - y.mean()) ** 2).sum() * (1 + 1e-9) + 1e-6
    for slope, intercept in ((1, 0), (0, y.mean()), (-1, 2)):
        assert error <= ((slope * x + intercept - y) ** 2).sum() + 1e-6
    if len(set(x)) == 1:
        assert calibrate(x, y, "linear").slope == 0


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=30))
def test_percentile_calibration_gives_back_the_sorted_truth(pairs):
    x, y = zip(*pairs, strict=True)
    fitted = calibrate(x, y, "percentile")
    assert fitted([min(x) - 1, max(x) + 1]) == [min(y), max(y)]
    if len(set(x)) == len(x):
        assert np.allclose(fitted(sorted(x)), sorted(y))


@given(
    st.lists(st.tuples(finite, finite), min_size=2, max_size=30),
    st.floats(0.1, 10),
    finite,
)
def test_correlation_forgets_scale_and_shift(pairs, scale, shift):
    y, p = zip(*pairs, strict=True)
    a, b = score(y, p).correlation, score(y, [scale * v + shift for v in p]).correlation
    if (
        np.std(p) > 1e-2 and np.std(y) > 1e-2
    ):  # values are rounded to 1e-3: below that, rounding is the signal
        assert a == pytest.approx(b, abs=1e-6) and -1 - 1e-9 <= a <= 1 + 1e-9


def test_scores_of_the_truth_and_of_nothing():
    y = [0.0, 1.0, -2.0, 3.0]
    perfect, nothing = score(y, y), score(y, [0.0] * 4)
    assert (perfect.correlation, perfect.r2, perfect.absolute_deviation) == (
        pytest.approx(1),
        1,
        1,
    )
    assert (nothing.r2, nothing.absolute_deviation) == (0, 0) and math.isnan(
        nothing.correlation
    )


def test_excerpts_are_laid_end_to_end():
    assert score([[1.0, 2.0], [0.0]], [[3.0, 1.0], [1.0]]) == score(
        [1.0, 2.0, 0.0], [3.0, 1.0, 1.0]
    )


@pytest.mark.parametrize("function", [score, lambda y, p: calibrate(p, y, "linear")])
def test_hostile_input(function):
    for y, p, message in (
        ([], [], "at least one"),
        ([1.0], [1.0, 2.0], "not 2 and 1"),
        ([math.nan, 1.0], [1.0, 2.0], "true activation 0 is nan"),
        ([1.0, 1.0], [1.0, math.inf], "simulated activation 1 is inf"),
    ):
        with pytest.raises(ValueError, match=message):
            function(y, p)
    with pytest.raises(ValueError, match="method must be"):
        calibrate([1.0], [1.0], "quadratic")


def test_records_of_a_split():
    top = [ActivationRecord(["x"], [float(9 - i)]) for i in range(9)]
    record = NeuronRecord(
        0, 0, top, [ActivationRecord(["y"], [0.1 * i]) for i in range(7)]
    )
    kept_top, kept_random = records_of(record, "test")
    assert [r.activations[0] for r in kept_top] == [6.0, 2.0] and [
        r.tokens for r in kept_random
    ] == [["y"], ["y"]]
    with pytest.raises(ValueError, match="split must be one of"):
        records_of(record, "tset")
    with pytest.raises(ValueError, match="too few for a test split"):
        records_of(NeuronRecord(0, 0, top[:3], []), "test")


def test_balanced_accuracy():
    assert balanced_accuracy([True, True, False], [True, False, False]) == 0.75
    for truth, answers in (([True, True], [True, True]), ([True, False], [True])):
        with pytest.raises(ValueError, match="cases of both kinds"):
            balanced_accuracy(truth, answers)
