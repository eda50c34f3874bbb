"""Causal tracing against numbers produced by the authors' own code (kmeng01/rome) on
small models.
"""

import numpy as np
import pytest
import torch
from golden_models import GOLDEN, read_json, rome_model

from mechtut.papers.causal_tracing import trace, trace_facts
from mechtut.prompts.subject_noise import Noise

CASES = read_json("rome/trace.json")
ARRAYS = np.load(GOLDEN / "rome" / "trace.npz")
# float64: thirty-odd matrix products of width 64 leave about 1e-15; float32 rounding of
# the same sums leaves a few 1e-6.
TOLERANCE = {"f64": 1e-10, "f32": 1e-5}
MODELS = {
    "f64": rome_model("tiny_rand", torch.float64),
    "f32": rome_model("tiny_rand", torch.float32),
}


def options(case: dict) -> dict:
    """The arguments of `trace` that ask for what the authors' case did."""
    kind, _, variant = case["name"].split(".", 2)[2].partition(".")
    mean, root = (torch.tensor(ARRAYS[f"embedding_{k}"]) for k in ("mean", "root"))
    noise = {
        "uniform": Noise(case["level"], "uniform"),
        "replace": Noise(case["level"], replace=True),
        "noise_m": Noise(1, "embedding", mean=mean, root=root),
        "noise_t3": Noise(3, "student_t", mean=mean, root=root),
    }.get(variant, Noise(case["level"]))
    out = {
        "noise": noise,
        "n_samples": 3 if variant == "samples3" else 10,
        "quirks": [],
    }
    if kind in ("mlp", "attn"):
        out |= {"component": f"{kind}_out", "window": case["window"]}
    if kind in ("severed_mlp", "severed_attn"):
        out |= {"sever": f"{kind[8:]}_out", "quirks": ["severed_noise"]}
    if variant == "replace":
        out["quirks"] = ["additive_low"]
    if variant == "subject_last":
        out["tokens"] = "subject_last"
    if (
        variant == "extra1"
    ):  # one more token is corrupted, the true last subject token is restored
        out["tokens"] = [case["subject_range"][1] - 2]
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_every_number_of_the_authors(case):
    dtype = case["name"][:3]
    result = trace(
        MODELS[dtype], case["prompt"], case["subject_range"], **options(case)
    )
    expected = ARRAYS[case["name"]]
    assert (
        list(result.tokens) == case["tokens"]
        and result.answer.strip() == case["answer"]
    )
    assert np.abs(result.scores.numpy() - expected).max() <= TOLERANCE[dtype]
    assert abs(result.corrupted_prob - case["low"]) <= TOLERANCE[dtype]
    assert abs(result.clean_prob - case["high"]) <= TOLERANCE[dtype]


def test_the_cases_are_all_there():
    kinds = {c["name"].split(".", 2)[2] for c in CASES}
    assert (
        len(CASES) == 64
        and {"state.noise_m", "state.noise_t3", "severed_attn", "attn.w3", "mlp.w2"}
        <= kinds
    )


def test_subject_is_found_where_the_authors_find_it():
    asked = set()
    for case in CASES:
        prompt = case["prompt"], case["subject"]
        if not case["name"].endswith("extra1") and prompt not in asked:
            asked.add(prompt)
            found = trace(MODELS["f32"], *prompt, tokens=[0], n_samples=1).subject_range
            assert list(found) == case["subject_range"], case["name"]
    assert len(asked) > 1


def test_quirks_matter():
    """Without the quirk's name the authors' odd numbers are not reproduced: the default
    is the consistent variant.
    """
    by_name = {c["name"]: c for c in CASES}
    for name in ("f64.p0.severed_mlp", "f64.p0.state.replace"):
        case = by_name[name]
        ours = trace(
            MODELS["f64"],
            case["prompt"],
            case["subject_range"],
            **{**options(case), "quirks": ()},
        )
        differs = np.abs(ours.scores.numpy() - ARRAYS[name]).max() + abs(
            ours.corrupted_prob - case["low"]
        )
        assert differs > 1e-3


@pytest.mark.parametrize(
    "kind, component, level",
    [
        ("state", "resid_post", "s3"),
        ("mlp", "mlp_out", "s3"),
        ("attn", "attn_out", "u1.0"),
    ],
)
def test_averages_over_facts(kind, component, level):
    """25 facts by token role; the authors ran float32 and printed float32 means."""
    noise = 3.0 if level == "s3" else Noise(1.0, "uniform")
    expected = read_json("rome/averages.json")[f"{level}.{kind}"]
    result = trace_facts(
        rome_model("tiny_facts", torch.float32),
        read_json("rome/knowns.json"),
        component=component,
        noise=noise,
        quirks=["one_token_answers"],
    )
    assert result.n_facts == 25 and len(result.skipped) == 5
    assert np.abs(result.scores.numpy() - np.array(expected["result"])).max() <= 1e-5
    assert np.abs(result.std.numpy() - np.array(expected["result_std"])).max() <= 1e-5
    assert abs(float(result.corrupted_probs.mean()) - expected["low_score"]) <= 1e-5
    printed = dict(line.rsplit(" ", 1) for line in expected["printed"])
    ours = {
        "Average Total Effect": result.total_effect,
        "Best average indirect effect on last subject": float(
            result.indirect_effect[2].max()
        ),
        "Best average indirect effect on last token": float(
            result.indirect_effect[5].max()
        ),
        "Average best-fixed score": float(result.best[:, 0].mean()),
        "Average best-fixed on last subject token score": float(
            result.best[:, 1].mean()
        ),
        "Average best-fixed on last word score": float(result.best[:, 2].mean()),
        "Argmax at last subject token": float(result.scores[2].argmax()),
        "Max at last subject token": float(result.scores[2].max()),
    }
    for name, value in ours.items():
        assert abs(value - float(printed[name])) <= 1e-5, name
