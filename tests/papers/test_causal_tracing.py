"""Tracing beyond the golden numbers: the engine against the loop, resuming, results on
disk, and hostile input.
"""

import numpy as np
import pytest
import torch
from golden_models import read_json, rome_model

from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import embedding_std, load_model
from mechtut.papers.causal_tracing import (
    AverageTrace,
    CausalTrace,
    trace,
    trace_facts,
    window_layers,
)
from mechtut.prompts.subject_noise import Noise, find_subject, token_roles

MODEL = rome_model("tiny_facts", torch.float64)
PROMPT, SUBJECT = "Lumgath Elmstov plays the sport of", "Lumgath Elmstov"


def naive_scores(component, window, sever=None, n_samples=4):
    """The definition, one full forward per cell."""
    ids = MODEL.to_tokens(PROMPT)
    span = find_subject(MODEL, ids, SUBJECT)
    noise = Noise(3, std=embedding_std(MODEL)).draw(
        n_samples, span[1] - span[0], MODEL.d_model
    )
    corrupt = Edit("embed", None, noise, pos=range(*span), mode="add")
    clean, batch = capture(MODEL, ids[None], component), ids.repeat(n_samples, 1)
    answer = int(clean.logits[0, -1].argmax())
    frozen = capture(MODEL, batch, sever, edits=[corrupt])[sever] if sever else None
    scores = torch.empty(len(ids), MODEL.n_layers, n_samples, dtype=torch.float64)
    for pos in range(len(ids)):
        for layer in range(MODEL.n_layers):
            layers = (
                [layer]
                if component == "resid_post"
                else window_layers(layer, window, MODEL.n_layers)
            )
            edits = (
                []
                if frozen is None
                else [
                    Edit(sever, i, frozen[i][:, pos : pos + 1], pos=pos)
                    for i in range(MODEL.n_layers)
                ]
            )
            edits += [
                Edit(component, i, clean[f"{component}.{i}"][0, pos], pos=pos)
                for i in layers
            ]
            with intervene(MODEL, [corrupt, *edits]):
                scores[pos, layer] = MODEL.logits(batch)[:, -1].softmax(-1)[:, answer]
    return scores


@pytest.mark.parametrize(
    "component, window",
    [
        ("resid_post", 1),
        ("mlp_out", 1),
        ("mlp_out", 2),
        ("mlp_out", 3),
        ("attn_out", 10),
    ],
)
def test_equals_the_definition(component, window):
    ours = trace(
        MODEL, PROMPT, SUBJECT, component=component, window=window, n_samples=4
    )
    assert (ours.sample_scores - naive_scores(component, window)).abs().max() <= 1e-12


@pytest.mark.parametrize("sever", ["mlp_out", "attn_out"])
def test_severed_equals_the_definition(sever):
    ours = trace(MODEL, PROMPT, SUBJECT, sever=sever, n_samples=4)
    assert (
        ours.sample_scores - naive_scores("resid_post", 1, sever)
    ).abs().max() <= 1e-12


def test_given_noise_is_what_is_added():
    noise = Noise(3, std=embedding_std(MODEL)).draw(10, 4, MODEL.d_model)
    assert torch.equal(
        trace(MODEL, PROMPT, (0, 4), noise=noise).sample_scores,
        trace(MODEL, PROMPT, (0, 4)).sample_scores,
    )
    ids = MODEL.to_tokens(PROMPT)
    assert torch.equal(
        trace(MODEL, ids.tolist(), (0, 4), noise=noise).scores,
        trace(MODEL, ids, (0, 4), noise=noise).scores,
    )


def test_tokens_choose_rows_in_any_order():
    whole = trace(MODEL, "It was late. " + PROMPT, SUBJECT)
    some = trace(MODEL, "It was late. " + PROMPT, SUBJECT, tokens=[-1, 1, 6])
    n = len(whole.tokens)
    assert some.positions == (n - 1, 1, 6)
    assert torch.allclose(some.scores, whole.scores[[n - 1, 1, 6]], atol=1e-12)
    assert trace(MODEL, PROMPT, SUBJECT, tokens="subject").positions == (0, 1, 2, 3)


def test_batch_size_changes_nothing():
    whole = trace(MODEL, PROMPT, SUBJECT)
    assert torch.allclose(
        trace(MODEL, PROMPT, SUBJECT, batch_size=7).scores, whole.scores, atol=1e-12
    )


def test_effects_and_table():
    t = trace(MODEL, PROMPT, SUBJECT, seed=3)
    assert t.total_effect == pytest.approx(t.clean_prob - t.corrupted_prob)
    assert torch.equal(t.indirect_effect, t.scores - t.corrupted_prob)
    assert torch.allclose(
        t.scores[-1, -1], torch.tensor(t.clean_prob, dtype=torch.float64)
    )  # everything is mended there
    assert torch.allclose(
        t.scores[0, -1], torch.tensor(t.corrupted_prob, dtype=torch.float64)
    )  # nobody can see it
    table = t.to_pandas()
    assert list(table.columns) == [
        "position",
        "token",
        "layer",
        "score",
        "indirect_effect",
        "standard_error",
    ]
    assert len(table) == t.scores.numel() and table.score[5] == pytest.approx(
        float(t.scores.flatten()[5])
    )
    assert (
        t.noise_std == pytest.approx(3 * embedding_std(MODEL))
        and t.provenance["arguments"]["seed"] == 3
    )


def test_save_and_load(tmp_path):
    t = trace(MODEL, PROMPT, SUBJECT, component="mlp_out", window=3)
    again = CausalTrace.load(t.save(tmp_path / "one"))
    assert (
        torch.equal(again.sample_scores, t.sample_scores)
        and again.provenance == t.provenance
    )
    assert (again.tokens, again.subject_range, again.positions) == (
        t.tokens,
        t.subject_range,
        t.positions,
    )
    facts = read_json("rome/knowns.json")[:4]
    average = trace_facts(MODEL, facts)
    assert torch.equal(
        AverageTrace.load(average.save(tmp_path / "many")).scores, average.scores
    )
    with pytest.raises(ValueError, match="holds a CausalTrace"):
        AverageTrace.load(tmp_path / "one")


def test_facts_are_resumed(tmp_path, monkeypatch):
    facts = read_json("rome/knowns.json")[:5]
    expected = trace_facts(MODEL, facts)
    import mechtut.papers.causal_tracing as room

    real, calls = room.trace, []

    def dies_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(room, "trace", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        trace_facts(MODEL, facts, folder=tmp_path)
    assert torch.equal(
        trace_facts(MODEL, facts, folder=tmp_path).scores, expected.scores
    )
    assert (
        len(calls) == expected.n_facts + 1
    )  # the interrupted one again, nothing twice
    with pytest.raises(ValueError, match="another"):
        trace_facts(MODEL, facts, folder=tmp_path, component="mlp_out")


def test_token_roles():
    assert token_roles((2, 5), 9) == [[2], [3], [4], [5], [6, 7], [8]]
    assert token_roles((0, 1), 2) == [
        [0],
        [],
        [0],
        [1],
        [],
        [1],
    ]  # one subject token, one token after it
    assert token_roles((1, 3), 3) == [
        [1],
        [],
        [2],
        [],
        [],
        [2],
    ]  # the prompt ends with the subject


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_windows_are_those_of_the_authors(window):
    for layer in range(12):
        assert list(window_layers(layer, window, 12)) == list(
            range(max(0, layer - window // 2), min(12, layer - (-window // 2)))
        )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"subject": "Atlantis"}, "'Atlantis' is not in the prompt"),
        ({"subject": ""}, "subject is empty"),
        ({"subject": (3, 3)}, "empty or outside"),
        ({"subject": (2, 99)}, "empty or outside"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": "rugby " * 80}, "reads at most 64"),
        ({"component": "resid_mid"}, "unknown component 'resid_mid'"),
        ({"sever": "mlp"}, "sever must be"),
        ({"window": 0}, "window must be at least 1"),
        ({"n_samples": 0}, "n_samples must be .* at least 1"),
        ({"noise": -1.0}, "scale must be a number above 0"),
        ({"noise": 0.0}, "scale must be a number above 0"),
        ({"noise": float("nan")}, "finite number"),
        ({"noise": torch.zeros(10, 3, 64)}, "noise tensor must be"),
        ({"quirks": ["nonsense"]}, "unknown quirk 'nonsense'"),
        ({"tokens": "object"}, "'subject' or 'subject_last'"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_hostile_input(change, words):
    with pytest.raises(ValueError, match=words):
        trace(**{"model": MODEL, "prompt": PROMPT, "subject": SUBJECT, **change})


def test_positions_outside_the_prompt():
    with pytest.raises(IndexError, match="outside the prompt"):
        trace(MODEL, PROMPT, SUBJECT, tokens=[99])


def test_subject_twice_takes_the_first_and_says_so():
    twice = f"{SUBJECT} is here. {PROMPT}"
    with pytest.warns(UserWarning, match="occurs again"):
        assert trace(MODEL, twice, SUBJECT, tokens=[0], n_samples=1).subject_range == (
            0,
            4,
        )


def test_tokenizers_that_drop_spaces():
    """SentencePiece-like: a token decoded alone has no leading space, so the joined
    pieces read 'TheEiffelTower'.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁The", "▁Eiffel", "▁Tower", "▁is", "▁in"]
    raw = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    model = load_model(MODEL.hf, PreTrainedTokenizerFast(tokenizer_object=raw))
    tokens = model.to_tokens("The Eiffel Tower is in")
    assert "".join(model.to_str_tokens(tokens)) == "TheEiffelToweris" + "in"
    assert find_subject(model, tokens, "Eiffel Tower") == (1, 3)
    assert find_subject(model, tokens, "The Eiffel") == (0, 2)


def test_weights_that_broke_after_loading():
    model = rome_model("tiny_rand", torch.float32)
    with torch.no_grad():
        model.blocks[2].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        trace(model, PROMPT, SUBJECT)


def test_hostile_facts():
    with pytest.raises(ValueError, match="no facts"):
        trace_facts(MODEL, [])
    with pytest.raises(ValueError, match="needs text"):
        trace_facts(MODEL, [{"prompt": PROMPT, "subject": SUBJECT}])
    with pytest.raises(ValueError, match="answers none"):
        trace_facts(
            MODEL, [{"prompt": PROMPT, "subject": SUBJECT, "attribute": "chess"}]
        )


def test_noise_modes():
    x = (
        torch.randn(2000, 8, dtype=torch.float64)
        @ torch.randn(8, 8, dtype=torch.float64)
        + 3
    )
    like = Noise.like_embeddings(x).draw(4000, 1, 8)
    assert torch.allclose(like.mean((0, 1)), x.mean(0), atol=0.3)
    assert torch.allclose(torch.cov(like[:, 0].T), torch.cov(x.T), rtol=0.2, atol=0.8)
    assert Noise(2.0, "uniform", std=0.5).draw(50, 2, 8).abs().max() <= 1
    first, second = (Noise(1.0).draw(3, 2, 8, skip=k) for k in (0, 1))
    stream = np.random.RandomState(1).randn(6, 2, 8)
    assert np.array_equal(np.concatenate([first, second]), stream)
    for bad, words in [
        ({"kind": "embedding"}, "like_embeddings"),
        ({"kind": "pink"}, "must be one of .gaussian."),
    ]:
        with pytest.raises(ValueError, match=words):
            Noise(3.0, **bad)
    with pytest.raises(ValueError, match="more than 2"):
        Noise.like_embeddings(x, dof=2)


def test_the_embedded_model_shows_the_picture():
    """Early at the last subject token, late at the last token: on facts the notebook
    does not use.
    """
    from mechtut.mini.world import World

    average = trace_facts(load_model("mini", device="cpu"), World().facts[7::60])
    effect = average.indirect_effect
    assert average.n_facts >= 12 and average.total_effect > 0.4
    assert effect[2, 3:5].min() > 0.3 and effect[2, 3:5].min() > 3 * effect[0].max()
    assert effect[5, -1] > 0.4 and effect[5, 0] < 0.1 and effect[2, -1] < 0.05


def test_noise_that_does_nothing_is_told():
    with pytest.warns(UserWarning, match="nothing to bring back"):
        trace(MODEL, PROMPT, SUBJECT, noise=1e-9, n_samples=2)


def test_facts_at_some_tokens_only():
    facts = [{"prompt": PROMPT, "subject": SUBJECT}]
    said = trace(MODEL, PROMPT, SUBJECT, n_samples=2).answer.strip()
    facts[0]["attribute"] = said
    whole = trace_facts(MODEL, facts, n_samples=2)
    some = trace_facts(MODEL, facts, n_samples=2, tokens="subject_last")
    last = some.roles.index("last subject token")
    assert torch.equal(some.scores[last], whole.scores[last])
    assert some.counts == tuple(int(i == last) for i in range(len(some.roles)))
    assert some.scores[[i for i in range(6) if i != last]].isnan().all()
    assert some.best[0, 1] == whole.best[0, 1] and some.best[0, 2].isnan()


def test_facts_warn_once_for_all(recwarn):
    facts = read_json("rome/knowns.json")[:3]
    trace_facts(MODEL, facts, noise=1e-9, n_samples=2)
    assert sum("nothing to bring back" in str(w.message) for w in recwarn) == 1
