"""The procedure of the steering page: choose on one half, measure on the other."""

import pytest
import torch

from mechtut import World, load_model
from mechtut.papers.steering import steered_texts, steering_study
from mechtut.prompts.completions import complete
from mechtut.steering.acting import next_logits, steering_edits
from mechtut.steering.sweeps import TokenOdds, predict_effect
from mechtut.steering.vectors import mean_difference

FACTS = [f for f in World().facts if f.relation == "profession"]
PAIRS = [(f"{f.prompt} singer", f"{f.prompt} pilot") for f in FACTS[:6]]
PROMPTS = [f.prompt for f in FACTS[20:28]]


@pytest.fixture(scope="module")
def model():
    return load_model("mini", device="cpu")


@pytest.fixture(scope="module")
def odds(model):
    return TokenOdds.of(model, [" singer"], [" pilot"])


@pytest.fixture(scope="module")
def study(model, odds):
    texts = ["Everyone knows that Rome is in Italy."]
    given = {"layers": [1, 4, 6], "coefficients": (-1.0, 1.0), "controls": 2}
    return steering_study(model, PAIRS, PROMPTS, odds, texts, **given)


def test_one_half_chooses_and_the_other_measures(model, odds, study):
    assert study.swept.effects.shape[-1] == study.report.effects.shape[-1] == 4
    plain = odds(next_logits(model, PROMPTS[4:]))
    assert torch.allclose(study.report.baseline.float(), plain, atol=1e-4)
    edits = steering_edits(model, study.vector, study.layer, 1.0)
    change = odds(next_logits(model, PROMPTS[4:], edits)) - plain
    assert torch.allclose(study.report.effects[0, 1].float(), change, atol=1e-4)
    wanted = predict_effect(model, study.vector, PROMPTS[:4], odds)
    assert torch.allclose(study.predicted, wanted)


def test_the_layer_is_the_one_where_most_was_measured(study):
    both = study.swept.effects[0, :, 1] - study.swept.effects[0, :, 0]
    assert study.layer == study.swept.layers[int(both.mean(-1).argmax())]


def test_controls_have_the_vectors_length_and_labels_were_shuffled(study):
    names = ("vector", "random 1", "random 2", "shuffled labels")
    assert study.report.names == names
    plain = abs(float(study.report.effects[0].mean(-1)[1]))
    for i in (1, 2, 3):
        assert abs(float(study.report.effects[i].mean(-1)[1])) < plain / 2


def test_without_layers_the_prediction_makes_a_short_list(model, odds):
    texts = ["Everyone knows that Rome is in Italy."]
    given = {"coefficients": (1.0,), "controls": 1}
    found = steering_study(model, PAIRS, PROMPTS[:4], odds, texts, **given)
    assert found.swept.layers == tuple(range(8))  # the model has no more


def test_texts_are_those_of_a_hook(model):
    v = mean_difference(model, PAIRS)
    told = steered_texts(model, v, 5, PROMPTS[:2], [0, 2], 3)
    handle = model.blocks[5].register_forward_hook(
        lambda _m, _a, out: out + 2 * v.at(5)
    )
    wanted = [model.decode(complete(model, p, 3)) for p in PROMPTS[:2]]
    handle.remove()
    assert told[told.coefficient == 2].text.tolist() == wanted
    plain = [model.decode(complete(model, p, 3)) for p in PROMPTS[:2]]
    assert told[told.coefficient == 0].text.tolist() == plain
    assert wanted != plain


def test_three_prompts_cannot_choose_and_measure(model, odds):
    with pytest.raises(ValueError, match="give four"):
        steering_study(model, PAIRS, PROMPTS[:3], odds, ["Rome is in Italy."])
