"""Patchscopes against reference numbers of independent plain-transformers code, which
was checked against the authors' own.
"""

import numpy as np
import pytest
import torch
from golden_models import GOLDEN, read_json
from transformers import AutoModelForCausalLM

from mechtut.models.loading import load_model
from mechtut.patching.layer_maps import fit_affine
from mechtut.patching.patchscope_texts import rouge_l
from mechtut.patching.patchscopes import patchscope, patchscope_grid, patchscope_texts
from mechtut.patching.places import SoftPrompt, Source, Target

FOLDER = GOLDEN / "patchscopes"
# norms and rotary tables are float32 also in a float64 model, and differ by processor
TOLERANCE = {"gpt2t": 1e-9, "llamat": 1e-6, "neoxt": 1e-6, "gemma2t": 5e-6}
KINDS = list(TOLERANCE)


def model_of(name):
    hf = AutoModelForCausalLM.from_pretrained(
        FOLDER / name, attn_implementation="eager"
    )
    return load_model(hf.double())


def numbers(name):
    return np.load(FOLDER / f"{name}.f64.npz")


def near(found, wanted, tolerance):
    return float(np.abs(np.asarray(found) - wanted).max()) <= tolerance


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_every_case(name):
    model, z = model_of(name), numbers(f"patchscope.{name}")
    s, t, i, j = z["S"].tolist(), z["T"].tolist(), int(z["i"]), int(z["istar"])
    for case, (a, b) in enumerate(z["cases"].tolist()):
        for read_at in range(len(t)):
            seen = patchscope(model, Source(s, a, i), Target(t, b, j), read_at=read_at)
            wanted = z["logits"][case, read_at]
            assert near(seen.logits[0], wanted, TOLERANCE[name])
        several = Source(s, a, [0, 2, 4]), Target(t, b, [1, 3, 5])
        wanted = z["logits_positions_024_to_135"][case]
        assert near(patchscope(model, *several).logits[0], wanted, TOLERANCE[name])
        whole = Source(s, a, None), Target(s, b, None)
        wanted = z["logits_all_positions_T_is_S"][case]
        assert near(patchscope(model, *whole).logits[0], wanted, TOLERANCE[name])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_generated_tokens(name, cache):
    model, known = model_of(name), read_json("patchscopes/generate.f64.json")[name]
    assert any(run["istar"] == 0 for run in known["runs"])
    for run in known["runs"]:
        source = Source(known["S"], run["layer"], run["i"])
        target = Target(known["T"], run["target_layer"], run["istar"])
        how = {"new_tokens": 10, "stop": False, "cache": cache}
        seen = patchscope(model, source, target, **how)
        assert list(seen.tokens[0]) == run["tokens"]
        top = float(seen.logits.max())
        assert top == pytest.approx(run["top_logit"][0], abs=1e-6)


@pytest.mark.parametrize("name", ["gpt2t", "llamat", "neoxt"])
def test_metrics_by_layer(name):
    model, known = model_of(name), read_json("patchscopes/metrics.f64.json")[name]
    places = zip(known["sources"], known["positions"], strict=True)
    sources = [Source(ids, pos=i) for ids, i in places]
    grid = patchscope_grid(model, sources, Target(known["T"]), progress=False)
    assert grid.source_top.tolist() == known["source_argmax"]
    for layer, wanted in enumerate(known["by_layer"]):
        for kind, end in (("identity", layer), ("logit_lens", model.n_layers - 1)):
            assert grid.top[:, layer, end].tolist() == wanted[kind]["argmax"]
            for metric in (
                "precision_at_1",
                "surprisal_of_readout_under_source",
                "surprisal_of_source_under_readout",
            ):
                mean = float(grid.by(metric).mean[layer, end])
                assert mean == pytest.approx(wanted[kind][metric], abs=TOLERANCE[name])


def fitted_to(z):
    places = zip(z["fit_ids"].tolist(), z["fit_positions"].tolist(), strict=True)
    return [Source(ids, pos=i) for ids, i in places]


@pytest.mark.parametrize("name", ["gpt2t", "llamat"])
@pytest.mark.parametrize("convention", ["raw", "hf"])
def test_affine_maps_to_the_last_layer(name, convention):
    """Ours are from raw to raw states; the authors norm the last layer's first."""
    model, z = model_of(name), numbers(f"affine_to_last.{name}")
    last, ids, i = model.n_layers - 1, z["S"].tolist(), int(z["i"])
    pairs = [(layer, last) for layer in range(model.n_layers)]
    how = {"last_layer": convention}
    maps = fit_affine(model, fitted_to(z), pairs, **how)
    key, tolerance = {"raw": "", "hf": "pair_"}[convention], TOLERANCE[name]
    for layer, wanted in enumerate(z[f"{key}logits_{n}"] for n in range(last + 1)):
        if convention == "raw":
            found = torch.cat([maps.weight[layer], maps.bias[layer][None]])
            known = z[f"A_{layer}"][:, :-1]
            assert near(found, known, max(1e-8, tolerance) * np.abs(known).max())
        places = Source(ids, layer, i), Target(ids, last, i)
        seen = patchscope(model, *places, mapping=maps, read_at=i, **how)
        assert near(seen.logits[0], wanted, tolerance)


@pytest.mark.parametrize("name", ["gpt2t", "llamat"])
def test_a_soft_prompt_is_read_and_goes_on(name):
    model, z = model_of(name), numbers(f"future_lens.{name}")
    soft = SoftPrompt(torch.tensor(z["soft_prompt"]))
    source = Source(z["S"].tolist(), int(z["layer"]))
    target = Target(soft, int(z["target_layer"]), int(z["position"]))
    for cache in (True, False):
        seen = patchscope(model, source, target, new_tokens=4, stop=False, cache=cache)
        assert list(seen.tokens[0]) == z["greedy"].tolist()
        assert near(seen.logits[0], z["greedy_logits"][0], TOLERANCE[name])
    both = {"source_layers": [source.layer], "target_layers": [target.layer]}
    grid = patchscope_grid(model, source, target, progress=False, **both)
    assert int(grid.top) == int(z["greedy"][0])


def test_map_from_one_model_into_another():
    small, large = model_of("gpt2t"), model_of("llamat")
    z = numbers("cross_model.gpt2t_to_llamat")
    pairs = [tuple(p) for p in z["pairs"].tolist()]
    maps = fit_affine(small, fitted_to(z), pairs, target_model=large)
    for n, (a, b) in enumerate(pairs):
        found = torch.cat([maps.weight[n], maps.bias[n][None]])
        wanted = z[f"A_{n}"]
        assert near(found, wanted[:, : found.shape[1]], 1e-6)
        seen = patchscope(
            small,
            Source(z["S"].tolist(), a, int(z["i"])),
            Target(z["T"].tolist(), b, int(z["istar"])),
            mapping=maps,
            target_model=large,
        )
        assert near(seen.logits[0], z[f"logits_{n}"], 1e-6)


def test_rouge_l():
    for known in read_json("patchscopes/rougeL.json"):
        wanted = known["rougeL"]
        found = rouge_l(known["prediction"], known["reference"])
        assert found.precision == pytest.approx(wanted["precision"], abs=1e-12)
        assert found.recall == pytest.approx(wanted["recall"], abs=1e-12)
        assert found.f == pytest.approx(wanted["fmeasure"], abs=1e-12)


@pytest.fixture(scope="module")
def real():
    """SmolLM2, and what independent code saw on it: logits of 8 digits, float32."""
    return load_model("smollm2", device="cpu"), read_json(
        "patchscopes/smollm2.f32.json"
    )


def test_token_identity_on_a_real_model(real):
    model, known = real
    for case in known["token_identity"]:
        for pair in case["pairs"]:
            source = Source(case["S"], pair["layer"])
            target = Target(known["identity_prompt"], pair["target_layer"])
            seen = patchscope(model, source, target)
            ids = [token for token, _, _ in pair["top5"]]
            wanted = torch.tensor([logit for _, _, logit in pair["top5"]])
            assert near(seen.logits[0, ids], wanted.numpy(), 2e-3)
            assert float(seen.precision_at_1) == pair["precision_at_1"]
            for metric in (
                "surprisal_of_readout_under_source",
                "surprisal_of_source_under_readout",
            ):
                found = float(getattr(seen, metric))
                assert found == pytest.approx(pair[metric], abs=2e-3)


def test_texts_on_a_real_model(real):
    """Written from one shared beginning, row by row of other layers."""
    model, known = real
    attribute, hop = known["attribute"], known["multihop"]
    runs = [
        (known["description"]["entity"], known["description_prompt"], run)
        for run in known["description"]["runs"][1:]
    ]
    runs += [(attribute["S"], attribute["T"], attribute)]
    runs += [(hop["S"], hop["T"], run) for run in hop["runs"][:1]]
    for source, target, run in runs:
        end = run.get("target_layer", run["layer"])
        layers = {"source_layers": [run["layer"]], "target_layers": [end]}
        seen = patchscope_texts(model, source, target, progress=False, **layers)
        (text,) = seen.at(run["layer"], end)
        assert text == run["text"]
