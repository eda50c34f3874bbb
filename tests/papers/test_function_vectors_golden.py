"""Function vectors against numbers produced by the authors' own code
(ericwtodd/function_vectors) on a small model.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_fv import ARRAYS, SEED, TASK, TEXT, fv_model

from mechtut.papers.function_vectors import (
    CLASSES,
    function_vector,
    indirect_effect,
    indirect_effect_by_class,
    inject,
    top_heads,
)
from mechtut.patching.last_token import Change, run_changes
from mechtut.prompts.accuracy import target_ranks
from mechtut.prompts.completions import answer_nll, complete, decode_vector
from mechtut.prompts.few_shot import (
    ICLPrompt,
    Template,
    encode,
    every_query,
    layout,
    sample_prompts,
)
from mechtut.prompts.mean_activations import layer_average, mean_head_activations

MODEL = fv_model()
PLAIN = replace(MODEL, add_bos=False)  # their running text has no BOS
PROMPTS = sample_prompts(TASK, 100, 10, SEED)
SHUFFLED = sample_prompts(TASK, 25, 10, SEED, "shuffle")
MEANS = mean_head_activations(MODEL, PROMPTS, slots="all")
FIXED = function_vector(
    MODEL, MEANS, [tuple(h) for h in TEXT["fixed_heads"]], bias_per_head=True
)
LAYERS = range(MODEL.n_layers)


def apart(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max())


def test_the_model_is_theirs_bit_for_bit():
    """The stored model file is 5.6 MB; this is the hash of all its weights."""
    digest = hashlib.sha256()
    for _, p in sorted(MODEL.hf.transformer.named_parameters()):
        digest.update(p.detach().numpy().tobytes())
    assert digest.hexdigest()[:16] == "83d6988720890659"


def test_split():
    for part, pairs in TASK.split(SEED)._asdict().items():
        assert [x for x, _ in pairs] == TEXT["split"][part]["input"]
        assert [y for _, y in pairs] == TEXT["split"][part]["output"]


def test_prompts_token_by_token():
    assert [encode(MODEL, p).ids for p in PROMPTS] == TEXT["mean_prompts_ids"]
    assert [encode(MODEL, p).ids for p in SHUFFLED] == TEXT["ie_prompts_ids"]
    assert [encode(MODEL, p).target for p in SHUFFLED] == TEXT["ie_target_ids"]
    for ours, theirs in zip(SHUFFLED, TEXT["ie_prompts"], strict=True):
        assert [list(pair) for pair in ours.demonstrations] == theirs["demonstrations"]
        assert (ours.query, ours.target) == (theirs["query"], theirs["target"])


@pytest.mark.parametrize("name", ["icl", "shuffled", "zero"])
def test_roles_and_slots(name):
    theirs = TEXT["prompts"][name]
    prompt = every_query(
        TASK,
        0 if name == "zero" else 10,
        SEED,
        "shuffle" if name == "shuffled" else None,
    )[0]
    assert prompt.text == theirs["string"].removeprefix("<|endoftext|>")
    where = layout(MODEL, prompt)
    assert where.ids == theirs["ids"]
    labels = [label.removesuffix("_token") for _, _, label in theirs["labels"]]
    for ours, label in zip(where.roles, labels, strict=True):
        plain = (
            "".join(c for c in label if not c.isdigit())
            .replace("__", "_")
            .removesuffix("_")
        )
        assert ours == ("label" if plain == "demonstration_label" else plain)
    if name != "zero":
        assert where.slots[-1] + 1 == 97
        assert dict(theirs["idx_map_updated"]) == dict(enumerate(where.slots))


def test_mean_activations():
    assert apart(MEANS, ARRAYS["mean_head_activations"]) <= 1e-5
    assert (
        apart(
            mean_head_activations(MODEL, PROMPTS),
            ARRAYS["mean_head_activations"][:, :, -1],
        )
        <= 1e-5
    )
    assert (
        apart(layer_average(MODEL, PROMPTS), ARRAYS["mean_layer_activations"]) <= 1e-5
    )


def test_indirect_effects():
    effects = indirect_effect(MODEL, SHUFFLED, MEANS)
    assert apart(effects, ARRAYS["indirect_effect"]) <= 1e-7
    given = [(p["demonstrations"], p["query"], p["target"]) for p in TEXT["ie_prompts"]]
    words = [ICLPrompt([tuple(d) for d in shown], q, y) for shown, q, y in given]
    ids = list(zip(TEXT["ie_prompts_ids"], TEXT["ie_target_ids"], strict=True))
    for prompts in (words, ids):
        assert (
            apart(
                indirect_effect(MODEL, prompts, MEANS[:, :, -1]),
                ARRAYS["indirect_effect"],
            )
            <= 1e-7
        )
    assert top_heads(effects, 5) == [(layer, head) for layer, head, _ in TEXT["top5"]]
    vector = function_vector(MODEL, MEANS, top_heads(effects, 5), bias_per_head=True)
    assert apart(vector, ARRAYS["fv_top5"][0]) <= 1e-5


def test_effects_by_token_class():
    ours = indirect_effect_by_class(MODEL, SHUFFLED[:2], MEANS)
    assert ours.shape[-1] == len(CLASSES) == 10
    assert apart(ours, ARRAYS["indirect_effect_token_classes"]) <= 1e-7


def test_function_vector_and_its_words():
    assert apart(FIXED, ARRAYS["fv_fixed"][0]) <= 1e-5
    words = decode_vector(MODEL, FIXED, 10)
    for (token, p), (ours, q) in zip(
        TEXT["fv_to_vocab_fixed"], words.itertuples(index=False), strict=True
    ):
        assert token == ours and abs(p - q) <= 1e-4


@pytest.mark.parametrize("name, shots", [("zero", 0), ("shuffled", 10)])
def test_intervened_logits_and_losses(name, shots):
    ids = torch.tensor([TEXT["prompts"][name]["ids"]])
    changes = [Change(5, torch.zeros(128)), *(Change(layer, FIXED) for layer in LAYERS)]
    logits = run_changes(MODEL, ids, torch.tensor([ids.shape[1] - 1]), changes)[0]
    assert apart(logits[0], ARRAYS[f"interv_{name}_clean_logits"][0]) <= 2e-5
    assert apart(logits[1:], ARRAYS[f"interv_{name}_fv_logits"]) <= 2e-5
    prompt = every_query(TASK, shots, SEED, "shuffle" if shots else None)[0]
    for layer in LAYERS:
        with inject(MODEL, FIXED, layer):
            assert (
                apart(
                    MODEL.logits(ids)[0, -1], ARRAYS[f"interv_{name}_fv_logits"][layer]
                )
                <= 2e-5
            )
        nll = (
            answer_nll(MODEL, prompt),
            answer_nll(
                MODEL, prompt, lambda pos, at=layer: inject(MODEL, FIXED, at, pos=pos)
            ),
        )
        assert apart(nll, ARRAYS[f"interv_{name}_nll"][layer]) <= 1e-5


@pytest.mark.parametrize(
    "key, shots, corrupt", [("zero_shot", 0, None), ("shuffled_10", 10, "shuffle")]
)
def test_ranks_at_every_layer(key, shots, corrupt):
    ranks = target_ranks(MODEL, every_query(TASK, shots, SEED, corrupt), FIXED)
    for layer in LAYERS:
        theirs = TEXT["eval"][str(layer)][key]
        assert ranks[:, 0].tolist() == theirs["clean_rank_list"]
        assert ranks[:, 1 + layer].tolist() == theirs["intervention_rank_list"]


@pytest.mark.parametrize("shots", [0, 1, 2, 10])
def test_baselines_by_number_of_examples(shots):
    theirs = (
        TEXT["icl_baseline_10shot"]
        if shots == 10
        else TEXT["dataset_baseline_0to2"][str(shots)]
    )
    prompts = every_query(TASK, shots, SEED)
    assert (
        target_ranks(MODEL, prompts, FIXED, [])[:, 0].tolist()
        == theirs["clean_rank_list"]
    )


@pytest.mark.parametrize("number", range(3))
def test_other_templates(number):
    template = Template.parse(TEXT["portability"]["templates"][number])
    prompts = every_query(TASK, 10, SEED, template=template)
    assert (
        target_ranks(MODEL, prompts, FIXED, [])[:, 0].tolist()
        == TEXT["portability"]["fs"][str(number)]
    )


@pytest.mark.parametrize("cache", [True, False])
def test_generation(cache):
    case = TEXT["natural"]
    start = PLAIN.to_tokens(case["sentence"]).tolist()
    n = len(case["clean"]) - len(start)
    assert start + complete(PLAIN, case["sentence"], n, cache=cache) == case["clean"]
    with inject(MODEL, FIXED, case["edit_layer"]):
        assert start + complete(PLAIN, case["sentence"], n, cache=cache) == case["fv"]
