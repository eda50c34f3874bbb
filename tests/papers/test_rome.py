"""ROME and editing beyond the golden numbers: every family, coming off to the bit,
resuming, hostile input.
"""

import json

import pytest
import torch
from families import CONFIGS, WITH_NEURONS, tiny
from golden_models import GOLDEN, rome_model

from mechtut.editing import covariance, evaluation
from mechtut.editing.covariance import key_covariance
from mechtut.editing.evaluation import target_nll
from mechtut.editing.requests import context_templates, locate
from mechtut.editing.weights import WeightEdit, fine_tune, mlp_projection
from mechtut.models import families
from mechtut.models.loading import load_model
from mechtut.papers import rome
from mechtut.papers.rome import RomeConfig, edit_fact
from mechtut.prompts import facts
from mechtut.prompts.facts import world_cases

MODEL = rome_model("tiny_facts", torch.float32)
REQUEST = {
    "prompt": "{} plays the sport of",
    "subject": "Lummar Farroin",
    "target": "cricket",
}
TEXTS = [
    "Lummar Farroin plays the sport of hockey.",
    "Nobody knew the answer.",
    "We met at noon today. Yes.",
] * 40


def weights_of(model, layer=0):
    return mlp_projection(model, layer).weight.detach().clone()


def ridge(model, layer=0):
    """A covariance that can be inverted, of the right width."""
    module = mlp_projection(model, layer)
    width = families.as_stored(module, module.weight).shape[0]
    return torch.eye(width, dtype=torch.float64)


@pytest.mark.parametrize("kind", WITH_NEURONS)
def test_every_family(kind):
    """The rank-one change gives exactly the wanted value at the subject, whatever the
    weight's layout.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "rome" / "tokenizer.json"),
        eos_token="<|endoftext|>",
    )
    model = load_model(
        tiny(
            kind,
            vocab_size=512,
            **({"sliding_window": 32} if "sliding_window" in CONFIGS[kind] else {}),
        ),
        tokenizer,
    )
    before, plain = (
        weights_of(model, 1),
        model.logits(model.to_tokens("It was late")[None]),
    )
    config = RomeConfig(
        steps=12, weight_decay=0, kl_factor=0, clamp=100
    )  # random weights: let it move freely
    edit = edit_fact(
        model,
        **REQUEST,
        layer=1,
        covariance=ridge(model, 1),
        templates=["{}", "Yes. {}"],
        config=config,
    )
    assert (
        torch.equal(weights_of(model, 1), before) and edit.losses[-1] < edit.losses[0]
    )
    module = mlp_projection(model, 1)
    asked = (REQUEST["prompt"], REQUEST["subject"], "subject_last")
    key, old = rome._key_and_value(model, module, *asked)
    with torch.no_grad():  # Falcon adds attention to that output afterwards
        assert torch.allclose(module(key), old, atol=1e-5)
    with edit:
        _, value = rome._key_and_value(
            model,
            mlp_projection(model, 1),
            REQUEST["prompt"],
            REQUEST["subject"],
            "subject_last",
        )
        assert torch.allclose(
            value, edit.value, atol=1e-3 * float(edit.value.abs().max())
        )
        assert torch.linalg.matrix_rank(weights_of(model, 1) - before, rtol=1e-4) == 1
    assert torch.equal(weights_of(model, 1), before)
    assert torch.equal(model.logits(model.to_tokens("It was late")[None]), plain)


def test_edits_nest_and_come_off_in_order():
    one = edit_fact(
        MODEL, **REQUEST, layer=0, covariance=ridge(MODEL), templates=["{}"]
    )
    original = weights_of(MODEL)
    other = WeightEdit(
        model=MODEL, layer=0, delta=0.1 * torch.ones(256, 64), request={}
    )
    with one:
        with other:
            with pytest.raises(RuntimeError, match="later edits"):
                one.revert()
            with pytest.raises(RuntimeError, match="applied already"):
                one.apply()
        assert torch.allclose(weights_of(MODEL), original + one.delta, atol=1e-5)
    assert torch.equal(weights_of(MODEL), original)
    with pytest.raises(RuntimeError, match="not applied"):
        one.revert()
    with pytest.raises(ZeroDivisionError), one:
        raise ZeroDivisionError
    assert torch.equal(weights_of(MODEL), original)


def test_targets_of_several_tokens():
    goal = "ice hockey"
    assert len(facts.target_ids(MODEL, goal)) > 1
    edit = edit_fact(
        MODEL,
        **{**REQUEST, "target": goal},
        layer=0,
        covariance=ridge(MODEL),
        templates=["{}", "Yes. {}"],
    )
    prompt = REQUEST["prompt"].format(REQUEST["subject"])
    before = target_nll(MODEL, [prompt], [goal])[0]
    with edit:
        assert target_nll(MODEL, [prompt], [goal])[0] < before - 1


def test_covariance_is_streamed_and_resumed(tmp_path, monkeypatch):
    whole = key_covariance(MODEL, TEXTS, 0)
    keys = torch.cat(
        [
            covariance.mlp_keys(
                MODEL,
                MODEL.to_tokens(t)[None],
                torch.ones(1, len(MODEL.to_tokens(t))).long(),
                0,
            )
            for t in TEXTS
        ]
    )
    assert torch.allclose(
        whole, (keys.double().T @ keys.double()) / len(keys), atol=1e-6
    )
    real, calls = covariance._chunk_sum, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(covariance, "_chunk_sum", dies)
    with pytest.raises(KeyboardInterrupt):
        key_covariance(MODEL, iter(TEXTS), 0, chunk=30, folder=tmp_path)
    assert torch.allclose(
        key_covariance(MODEL, iter(TEXTS), 0, chunk=30, folder=tmp_path),
        whole,
        atol=1e-6,
    )  # float32, other batches
    assert len(calls) == 5  # the third chunk again, and the fourth
    with pytest.raises(ValueError, match="another sweep"):
        key_covariance(MODEL, ["Other text."], 0, chunk=30, folder=tmp_path)


def test_templates_follow_their_seed():
    one, same, other = (context_templates(MODEL, seed) for seed in (0, 0, 1))
    assert one == same != other and len(one) == 21 and one[0] == "{}"
    assert all(t.count("{}") == 1 and t.endswith("{}") for t in one)


def test_locate():
    twice = "Lummar Farroin is here. {} plays"
    tokens, last = locate(MODEL, twice, "Lummar Farroin")
    assert (
        "".join(MODEL.to_str_tokens(tokens)[: last + 1])
        == "Lummar Farroin is here. Lummar Farroin"
    )
    assert locate(MODEL, twice, "Lummar Farroin", "subject_first")[1] == last - 3
    assert locate(MODEL, twice, "Lummar Farroin", "last")[1] == len(tokens) - 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"subject": ""}, "need a subject"),
        ({"prompt": "He plays the sport of"}, "exactly one {}"),
        ({"prompt": "{} and {} play"}, "exactly one {}"),
        ({"target": " "}, "has no tokens"),
        ({"token": "first"}, "subject_last, subject_first, last"),
        ({"covariance": torch.eye(7)}, "width 256"),
        ({"covariance": torch.full((256, 256), float("nan"))}, "NaN"),
        ({"covariance": torch.zeros(256, 256)}, "cannot be inverted"),
        ({"prompt": "It was late. " * 30 + "{}"}, "at most 64"),
    ],
)
def test_hostile_requests_leave_the_weights_alone(change, words):
    before = weights_of(MODEL)
    with pytest.raises(ValueError, match=words):
        edit_fact(
            MODEL,
            **{
                **REQUEST,
                "layer": 0,
                "covariance": ridge(MODEL),
                "templates": ["{}"],
                **change,
            },
        )
    assert torch.equal(weights_of(MODEL), before)


def test_more_hostile_input():
    with pytest.raises(IndexError, match=r"layers 0\.\.3"):
        edit_fact(MODEL, **REQUEST, layer=9, covariance=ridge(MODEL))
    with pytest.raises(ValueError, match="loss did not fall"):
        edit_fact(
            MODEL,
            **REQUEST,
            layer=3,
            covariance=ridge(MODEL),
            templates=["{}"],
            config=RomeConfig(weight_decay=1e9, clamp=1e-9),
        )
    with pytest.raises(ValueError, match="no text"):
        key_covariance(MODEL, [], 0)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 2"):
        RomeConfig(steps=1)
    with pytest.raises(ValueError, match="facts with neighbours"):
        from mechtut.mini.world import World

        world_cases(World(), 10**6)


def test_fine_tuning_is_constrained():
    tuned = fine_tune(MODEL, **REQUEST, layer=0, steps=15, learning_rate=1e-2)
    held = fine_tune(
        MODEL, **REQUEST, layer=0, steps=15, learning_rate=1e-2, max_change=1e-3
    )
    assert (
        tuned.losses[-1] < tuned.losses[0]
        and held.delta.abs().max() <= 1e-3 + 1e-9 < tuned.delta.abs().max()
    )


def test_original_file_formats(tmp_path):
    line = {
        "src": "What sport does Lummar Farroin play?",
        "subject": "Lummar Farroin",
        "answers": ["cricket"],
        "rephrase": "Which sport?",
        "loc": "nq question: who is it",
        "loc_ans": "Fenmar Elmstov",
    }
    (tmp_path / "zsre.json").write_text(json.dumps([line]))
    record = facts.load_zsre(tmp_path / "zsre.json", MODEL)[0]
    assert record["requested_rewrite"]["prompt"] == "What sport does {} play?"
    assert (
        "".join(n["target"] for n in record["neighborhood_prompts"])
        == " Fenmar Elmstov"
    )
    (tmp_path / "cf.json").write_text(json.dumps([record]))
    assert facts.load_counterfact(tmp_path / "cf.json") == [record]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a list"):
        facts.load_counterfact(tmp_path / "bad.json")


def test_generation_measures():
    assert evaluation.ngram_entropy("a b c d e", 2) == pytest.approx(
        2.0
    )  # four different pairs
    assert evaluation.generation_entropy(["no no no no"]) == 0
    assert evaluation.reference_score(
        ["the tower is old"], ["the tower is old"]
    ) == pytest.approx(1)
    assert evaluation.reference_score(["blue"], ["the tower is old"]) == 0


def test_a_kept_edit_can_be_saved(tmp_path):
    """`apply` and `save_pretrained`: the folder holds the edited model, and loads like
    any other.
    """
    edit = edit_fact(
        MODEL, **REQUEST, layer=0, covariance=ridge(MODEL), templates=["{}"]
    )
    prompt = MODEL.to_tokens(REQUEST["prompt"].format(REQUEST["subject"]))[None]
    before = MODEL.logits(prompt)
    with edit:
        edited = MODEL.logits(prompt)
        MODEL.hf.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), MODEL.tokenizer, device="cpu")
    assert torch.equal(again.logits(prompt), edited) and not torch.equal(edited, before)


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(ValueError, match="mixture of experts in place of an MLP"):
        mlp_projection(load_model(tiny("mixtral")), 1)


def test_a_covariance_is_symmetric():
    whole = ridge(MODEL)
    for broken in (whole + torch.ones_like(whole).tril(-1), -whole):
        with pytest.raises(ValueError, match="a covariance is symmetric"):
            edit_fact(
                *(MODEL, "{} works as a", "Ana", "chef"), layer=0, covariance=broken
            )


def test_an_edit_of_another_model_is_not_measured():
    here, there = rome_model("tiny_facts", torch.float32), MODEL
    change = torch.zeros(len(ridge(there)), there.d_model)
    edit = WeightEdit(model=there, layer=0, delta=change, request={})
    case = {"requested_rewrite": {}}
    with pytest.raises(ValueError, match="made for another model"):
        evaluation.evaluate_edit(here, edit, case)
