"""The instruments of the Patchscopes page, against single ones and whole passes."""

import pytest

from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.papers.patchscopes import (
    back_patch,
    cross_model,
    describe,
    extract,
    token_identity,
)
from mechtut.patching.patchscopes import (
    IDENTITY_PROMPT,
    IDENTITY_PROMPTS,
    patchscope,
    patchscope_grid,
)
from mechtut.patching.places import Source, Target, read_states, source_tokens

PEOPLE = ["Riley Martin works as a", "Jamie Clark lives in", "Everyone knows that"]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def mini():
    return load_model("mini", device="cpu")


def test_two_questions_to_one_state(mini):
    """The arrow goes behind the patched token, and its own token is what is wanted."""
    places = [Source(text, pos=1) for text in PEOPLE]
    ids = mini.to_tokens("Paris speaks").tolist()
    arrow = mini.continuation("Paris speaks", " ->")
    for asks, end in (("next", []), ("current", arrow)):
        grid = token_identity(
            mini, places, asks, layers=[2, 6], prompt="Paris speaks", **QUIET
        )
        for i, text in enumerate(PEOPLE):
            tokens = mini.to_tokens(text)
            states = capture(mini, text, "resid_post")["resid_post"]
            for column, layer in enumerate((2, 6)):
                put = Edit("resid_post", layer, states[layer, :, [1]], pos=1)
                with intervene(mini, [put]):
                    read = mini.logits([ids + end])[0, -1]
                own = mini.logits(text)[0, 1].argmax()
                wanted = tokens[1] if asks == "current" else own
                cell = grid.by("surprisal_of_source_under_readout").values
                assert int(grid.source_top[i]) == int(wanted)
                assert int(grid.top[i, column, column]) == int(read.argmax())
                nats = -read.log_softmax(-1)[wanted]
                assert float(cell[i, column, column]) == pytest.approx(
                    float(nats), abs=1e-4
                )


def test_wanted_tokens_are_checked(mini):
    with pytest.raises(ValueError, match="wanted has 1 tokens for 3 prompts"):
        patchscope_grid(mini, PEOPLE, "Paris", wanted=[3], **QUIET)
    with pytest.raises(ValueError, match="token id 99999 is outside"):
        patchscope_grid(mini, PEOPLE[0], "Paris", wanted=[99999], **QUIET)


def test_one_reading_serves_all_positions_of_a_prompt(mini):
    text = PEOPLE[0]
    places = [Source(text, pos=i) for i in (0, 3, 1)] + [Source(PEOPLE[1], pos=0)]
    found = read_states(mini, places, [-1, 5])
    acts = capture(mini, text, ["resid_pre.0", "resid_post.5"])
    for row, i in enumerate((0, 3, 1)):
        for column, site in enumerate((("resid_pre", 0), ("resid_post", 5))):
            plain = acts[site][0, i]
            apart = (found[row, column, 0] - plain).abs().max()
            assert apart < 1e-5 * plain.abs().max()
    ids = mini.to_tokens(text)
    assert source_tokens(mini, places).tolist()[:3] == ids[[0, 3, 1]].tolist()


def test_descriptions_and_attributes(mini):
    said = describe(
        mini, PEOPLE[:2], layers=[0, 7], prompt="Paris", new_tokens=2, **QUIET
    )
    one = patchscope(mini, Source(PEOPLE[1], 7), Target("Paris", 7), new_tokens=2)
    assert said.at(7)[1] == one.text[0]
    people = [f"{a} {b}" for a in ("Riley", "Jamie") for b in ("Martin", "Clark")]
    answers = ["singer", "Paris", "singer", "Paris"]
    found = extract(
        mini, people, answers, people, "Paris works as a", layers=[0, 3],
        target_layers=[0, 1], folds=2, new_tokens=1, **QUIET,
    )  # fmt: skip
    table = found.to_pandas()
    assert table.layer.tolist() == [0, 3]
    hits = found.success.hits
    assert table["same layer"][0] == hits[:, 0, 0].mean()
    assert table["same layer"].isna().tolist() == [False, True]
    assert table["best layer"].tolist() == hits.mean(0).amax(1).tolist()
    with pytest.raises(ValueError, match="answers"):
        extract(mini, people, answers[:2], people, "Paris", layers=[0], **QUIET)


def test_back_patching_leads_down(mini):
    ask, answer = PEOPLE[0], " singer"
    grid = back_patch(
        mini, [ask], [answer], layers=[1, 6], target_layers=[0, 4], **QUIET
    )
    assert grid.mean.isnan().tolist() == [[False, True], [False, False]]
    one = patchscope(mini, Source(ask, 6), Target(ask, 4))
    assert int(grid.top[0, 1, 1]) == int(one.top_ids)
    right = int(one.top_ids) == mini.continuation(ask, answer)[0]
    assert float(grid.mean[1, 1]) == right
    with pytest.raises(ValueError, match="leads down"):
        back_patch(mini, [ask], [answer], layers=[1], target_layers=[1, 4], **QUIET)


def test_across_models(mini):
    """Between a model and itself the map is the identity: the plain grid."""
    texts = [f"{a} {b} works as a singer in Paris and enjoys hockey, as the book says"
             for a in ("Riley", "Jamie", "Morgan", "Quinn", "Reed", "Taylor")
             for b in ("Martin", "Clark", "Lane", "Taylor", "James")]  # fmt: skip
    held = [f"Everyone knows that {text}" for text in texts[:1]]
    grid = cross_model(mini, mini, texts, held, [(2, 2)], "next", **QUIET)
    places = [Source(held[0], pos=i) for i in range(1, len(mini.encode(held[0])))]
    ids = mini.to_tokens(IDENTITY_PROMPT).tolist()
    plain = patchscope_grid(
        mini, places, Target(ids), source_layers=[2], target_layers=[2], **QUIET
    )
    known = [i for i, place in enumerate(places) if place.pos > 3]
    assert len(grid.top) == len(places)
    assert (grid.top[known] == plain.top[known]).float().mean() > 0.9
    with pytest.raises(ValueError, match="aligned"):
        cross_model(mini, mini, ["Paris"], held, [(2, 2)], **QUIET)


def test_every_prompt_of_the_gallery_ends_with_one_token_to_patch(mini):
    for prompt in IDENTITY_PROMPTS.values():
        assert prompt == prompt.rstrip() and len(mini.encode(prompt)) > 0
