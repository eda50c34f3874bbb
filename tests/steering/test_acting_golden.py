"""Steering against reference numbers: the authors' own code, or plain transformers code
that was checked against it.
"""

import pytest
import torch
from golden_steering import NEAR, TYPES, apart
from golden_steering import steering_model as model_of
from golden_steering import steering_numbers as golden

from mechtut.models.hooks import Where
from mechtut.prompts.completions import complete
from mechtut.steering.ablation import (
    ablation_direction,
    orthogonalise,
    select_direction,
    token_log_odds,
)
from mechtut.steering.acting import next_logits, steer, steering_edits
from mechtut.steering.evaluation import steerability
from mechtut.steering.vectors import act_add, equal_norms, mean_difference

each = pytest.mark.parametrize("half", TYPES)
kinds = pytest.mark.parametrize("kind", ["gpt2", "llama"])


@kinds
@each
def test_activation_addition(kind, half):
    (told, z), model = golden("actadd", kind), model_of(kind, half)
    v = act_add(model, told["plus"], told["minus"], told["layer"], told["coeff"])
    assert apart(v.values, z[f"{half}_vector"]) < NEAR[kind][half]
    assert float(v.values[0].abs().max()) == 0.0  # both begin with <bos>
    ids = told["prompt_ids"]
    assert apart(model.logits(ids)[0], z[f"{half}_clean_logits"]) < NEAR[kind][half]
    for where in ("front", "mid", "back"):
        with steer(model, v, where=where):
            found = model.logits(ids)[0]
        assert apart(found, z[f"{half}_steered_{where}"]) < NEAR[kind][half], where
    assert complete(model, (ids, 0), 10) == told[f"{half}_greedy10_clean"]
    with steer(model, v):
        assert complete(model, (ids, 0), 10) == told[f"{half}_greedy10"]


@kinds
@each
def test_prompts_of_unequal_length_and_inserted_fillers(kind, half):
    (told, z), model = golden("actadd", kind), model_of(kind, half)
    layer, c, ids = told["layer"], told["coeff"], told["prompt_ids"]
    for pad, filler in (("pad", "pad"), ("filler", told["filler_id"])):
        v = act_add(model, *told["long"], layer, c, pad=filler)
        assert apart(v.values, z[f"{half}_long_vector_{pad}"]) < NEAR[kind][half]
        with steer(model, v):
            found = model.logits(ids)[0]
        assert apart(found, z[f"{half}_long_steered_{pad}"]) < NEAR[kind][half]
    v = act_add(model, told["plus"], told["minus"], layer, c)
    with steer(model, v):  # "pad_remove": fillers behind <bos>, dropped afterwards
        found = model.logits(told["padded_prompt_ids"])[0]
    kept = [0, *range(len(v.values), len(found))]
    assert apart(found[kept], z[f"{half}_pad_remove_logits"]) < NEAR[kind][half]


def contrast(told, part):
    def written(item, letter):
        question = item["question"]
        return told["template"].format(question=question, letter=letter)

    return [
        (written(item, item["match"]), written(item, item["other"]))
        for item in told[part]
    ]


@kinds
@each
def test_contrastive_activation_addition(kind, half):
    (told, z), model = golden("caa", kind), model_of(kind, half)
    v = mean_difference(model, contrast(told, "train"), pos=told["read_position"])
    other = mean_difference(
        model, contrast(told, "second_behaviour_train"), pos=told["read_position"]
    )
    assert apart(v.values, z[f"{half}_vectors"]) < NEAR[kind][half]
    assert apart(other.values, z[f"{half}_second_vectors"]) < NEAR[kind][half]
    scaled = equal_norms([v, other])[0]
    assert apart(scaled.values, z[f"{half}_vectors_normalised"]) < NEAR[kind][half]
    letters = model.encode("A")[-1], model.encode("B")[-1]
    marker = model.encode("[/INST]")[-1]
    prompts, starts = [], []
    for item in told["test"]:
        ids = model.encode(f"[INST] {item['question']} [/INST] (")
        prompts.append(ids)
        starts.append(len(ids) - 1 - ids[::-1].index(marker))
    rules = {"inst_end": 0, "after_inst_end": 1, "all": None}
    for rule, shift in rules.items():
        wanted = z[f"{half}_ab_{rule}"]
        for row, m in zip(wanted, told["multipliers"], strict=True):
            for ids, start, numbers in zip(prompts, starts, row, strict=True):
                where = "all" if shift is None else slice(start + shift, None)
                edits = steering_edits(model, v, told["layer"], m, where)
                logits = next_logits(model, [ids], edits)[0].double()
                p = logits.softmax(-1)
                found = torch.cat([p[list(letters)], logits[list(letters)]])
                assert apart(found, numbers) < NEAR[kind][half]
    saved = told[f"{half}_greedy10"]
    where = slice(saved["start"], None)
    with steer(model, v, told["layer"], saved["multiplier"], where):
        assert complete(model, (saved["prompt_ids"], 0), 10) == saved["new_ids"]


@kinds
@each
def test_steerability(kind, half):
    told, z = golden("caa", kind)
    propensity = torch.tensor(z[f"{half}_propensity"]).double()
    found = steerability(propensity.T, told["multipliers"])
    assert apart(found.slopes, z[f"{half}_steerability"]) < 1e-6
    if half == "f64":
        assert apart(found.slopes, z[f"{half}_steerability"]) < 1e-8
    assert found.anti_steerable == told[f"{half}_anti_steerable_fraction"]


@kinds
@each
def test_ablation_addition_and_their_scores(kind, half):
    (told, z), model = golden("refusal", kind), model_of(kind, half)
    made = ablation_direction(
        model, told["harmful_train"], told["harmless_train"], told["positions"]
    )
    assert apart(made.values, z[f"{half}_mean_diffs"]) < NEAR[kind][half]
    v = made.vector(**told["selected"])
    harmful, harmless = told["harmful_val"], told["harmless_val"]
    without = steering_edits(model, v.values[0], mode="ablate")
    more, less = (steering_edits(model, v, coefficient=c) for c in (1, -1))
    score = token_log_odds(told["refusal_tokens"])
    runs = {
        "clean_harmful": next_logits(model, harmful),
        "clean_harmless": next_logits(model, harmless),
        "ablated_harmful": next_logits(model, harmful, without),
        "ablated_harmless": next_logits(model, harmless, without),
        "added_harmless": next_logits(model, harmless, more),
        "subtracted_harmful": next_logits(model, harmful, less),
    }
    # the authors divide by a norm + 1e-8
    near = max(NEAR[kind][half], 1e-5)
    for name, logits in runs.items():
        assert apart(logits, z[f"{half}_{name}_logits"]) < near, name
    order = ("clean_harmful", "ablated_harmful", "clean_harmless", "added_harmless")
    scores = torch.stack([score(runs[name]) for name in order])
    assert apart(scores, z[f"{half}_refusal_scores"]) < 10 * near
    changed = orthogonalise(model, v)
    name = "weights_only" if kind == "llama" else "all"
    found = next_logits(changed, harmful)
    assert apart(found, z[f"{half}_orthogonal_{name}_logits"]) < near
    if kind == "gpt2":  # biases and positions write too
        assert apart(found, z[f"{half}_orthogonal_weights_only_logits"]) > 0.05


@kinds
def test_the_choice_of_a_direction(kind):
    (told, z), model = golden("refusal", kind), model_of(kind, "f64")
    made = ablation_direction(
        model, told["harmful_train"], told["harmless_train"], told["positions"]
    )
    told["selection"].pop("note", None)
    thresholds = told["selection"]
    found = select_direction(
        model,
        made,
        told["harmful_val"],
        told["harmless_val"],
        token_log_odds(told["refusal_tokens"]),
        most_kl=thresholds["kl_threshold"],
        least_added=thresholds["induce_refusal_threshold"],
        layer_share=1 - thresholds["prune_layer_percentage"],
    )
    together = torch.stack([found.ablated, found.added, found.kl], -1)
    assert apart(together, z["f64_sweep"]) < 1e-5  # stored in float32
    kept = [
        [made.positions[i], made.layers[j]] for i, j in found.kept.nonzero().tolist()
    ]
    assert kept == thresholds["kept"]
    assert [found.pos, found.layer] == thresholds["best"]


def test_from_a_marker_on_in_a_batch():
    """The rule of CAA for prompts whose markers are at different places."""
    model = model_of("llama", "f64")
    told, _ = golden("caa", "llama")
    v = mean_difference(model, contrast(told, "train"), pos=-2).at(2)
    ids = torch.tensor([told["f64_greedy10"]["prompt_ids"]] * 2)
    where = Where("from", (3, 9))
    with steer(model, v, 2, where=where):
        both = model.logits(ids)
    for row, start in enumerate((3, 9)):
        with steer(model, v, 2, where=slice(start, None)):
            assert apart(model.logits(ids[:1])[0], both[row].numpy()) < 1e-12
