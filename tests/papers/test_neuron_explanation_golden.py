"""Agreement with what the authors' code (openai/automated-interpretability) computes on
synthetic records.

The numbers are those of shared/golden/neuron, unchanged. 1e-9 is far below what any
change of a formula would do and far above the rounding of another order of summation
(4e-15 was measured).
"""

import json
import math
import warnings
from pathlib import Path

import pytest

from mechtut.neurons.explainer_prompts import parse_levels
from mechtut.neurons.records import ActivationRecord
from mechtut.neurons.scoring import (
    calibrate,
    discretize,
    expected_value,
    max_activation,
    score,
    split_records,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "neuron"


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def number(x):
    """JSON has no NaN and no infinities: they are null and strings there."""
    return math.nan if x is None else float(x)


def close(ours, theirs):
    theirs = number(theirs)
    return (math.isnan(ours) and math.isnan(theirs)) or ours == pytest.approx(
        theirs, abs=1e-9, rel=1e-9
    )


@pytest.mark.parametrize(
    "case", load("01_discretise")["cases"], ids=lambda c: c["note"][:30]
)
def test_discretise(case):
    assert (
        discretize([number(a) for a in case["activations"]], case["max_activation"])
        == case["out"]
    )


def test_discretise_edges():
    data = load("01_discretise")
    first = data["calculate_max_activation"][0]
    records = [ActivationRecord(["x"] * len(r), r) for r in first["records"]]
    assert max_activation(records) == first["out"]
    with pytest.raises(ValueError):
        max_activation([])
    with pytest.raises(OverflowError):
        discretize([math.inf], 1.0)
    assert data["errors"] == {
        "calc_max_no_records": "ValueError",
        "calc_max_empty_record": "ValueError",
        "normalize_inf": "OverflowError",
    }


@pytest.mark.parametrize(
    "case", load("04_expected_value"), ids=lambda c: c["note"][:30]
)
def test_expected_values(case):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = expected_value([tuple(p) for p in case["top_logprobs"]])
        assert close(ours, case["expected_value"])
        assert close(expected_value(dict(case["top_logprobs"])), case["expected_value"])
    assert bool(said) == (not case["values_in_order"]), (
        "a warning exactly where no level was found"
    )


@pytest.mark.parametrize(
    ("name", "theirs"),
    [kv for kv in load("06_slices").items() if kv[0].startswith("top=")],
)
def test_slices(name, theirs):
    parts = dict(p.split("=") for p in name.split())
    n = (
        None
        if parts["n_examples_per_split"] == "None"
        else int(parts["n_examples_per_split"])
    )
    assert split_records(int(parts["top"]), int(parts["random"]), n) == theirs


def test_slices_too_few():
    assert "too few top records (19 < 5*4)" in load("06_slices")["errors"]
    with pytest.raises(ValueError, match="20 top"):
        split_records(19, 15, 5)
    for name, (start, stop, step) in load("06_slices")["raw_slices_4splits_5"].items():
        assert split_records(26, 17, 5)[name][:5] == [
            f"T{i}" for i in range(start, stop, step)
        ]


@pytest.mark.parametrize("case", load("08_scores"), ids=lambda c: c["note"][:30])
def test_scores(case):
    ours = score(case["true"], case["pred"])
    assert close(ours.correlation, case["ev_correlation"])
    assert close(ours.r2, case["rsquared"])
    assert close(ours.absolute_deviation, case["absolute_dev_explained"])


@pytest.mark.parametrize("case", load("09_calibration"), ids=lambda c: c["note"][:30])
@pytest.mark.parametrize("method", ["linear", "percentile"])
def test_calibration(case, method):
    fitted = calibrate(case["uncalibrated"], case["true"], method)
    assert all(map(close, fitted(case["ask"]), case[method]["out"]))
    for name, value in case[method]["params"].items():
        assert close(getattr(fitted, name), value)
    assert (
        calibrate(case["uncalibrated"], case["true"], "none")(case["ask"])
        == case["ask"]
    )


# Where we depart on purpose: their parser turns what it cannot read into zeros. Ours
# keeps the value before a closing mark
# (theirs loses it), follows the tokens where it can, and raises `ValueError` where it
# cannot, so that a failure is no score.
FAULTS = {
    "well-formed with trailing marker: LAST VALUE IS LOST (0)": [3, 10, 5],
    "token mismatch -> all zero": None,
    "out of range -> 0 for that token": None,
    "non-integer -> 0": None,
    "extra line -> all zero": None,
    "empty": None,
    "token is a tab: split('\\t')[1] is '' -> 0": [3, 1],
}


@pytest.mark.parametrize(
    "case", load("10_logprob_free")[:-1], ids=lambda c: c["note"][:30]
)
def test_parsing_without_log_probabilities(case):
    wanted = FAULTS.get(case["note"], case["out"])
    if wanted is None:
        with pytest.raises(ValueError):
            parse_levels(case["completion"], case["tokens"], mark="༗", max_missing=0)
    else:
        assert (
            parse_levels(case["completion"], case["tokens"], mark="༗", max_missing=0)
            == wanted
        )
