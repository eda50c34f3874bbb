"""The first grids of a task, and what heads lose against what they write."""

import pytest
import torch
from families import tiny

from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.papers.activation_patching import (
    ActivationPatching,
    SelfRepair,
    activation_patching,
    self_repair,
)
from mechtut.patching.grids import AnswerMetric, patch_grid

DRAW = torch.Generator().manual_seed(0)
CLEAN, OTHER = (torch.randint(5, 90, (3, 6), generator=DRAW) for _ in range(2))
RIGHT, WRONG = torch.tensor([7, 8, 9]), torch.tensor([17, 18, 19])
METRIC = AnswerMetric("logit_diff", RIGHT, WRONG)
TEXTS = {
    "clean": ["Riley Martin works as a", "Taylor Martin works as a"],
    "corrupted": ["Taylor Martin works as a", "Riley Martin works as a"],
    "right": [" singer", " chemist"],
    "wrong": [" chemist", " singer"],
}


def test_first_grids_are_the_grids(tmp_path):
    model = load_model("mini", device="cpu")
    found = activation_patching(model, **TEXTS, folder=tmp_path / "a", progress=False)
    ids = [
        model.continuation(p, t)[0]
        for p, t in zip(TEXTS["clean"], TEXTS["right"], strict=True)
    ]
    metric = AnswerMetric("logit_diff", torch.tensor(ids), torch.tensor(ids[::-1]))
    for site, by in (("attn_out", "position"), ("z", "head")):
        alone = patch_grid(
            model,
            TEXTS["clean"],
            TEXTS["corrupted"],
            metric,
            site,
            by=by,
            progress=False,
        )
        assert torch.equal(found.grids[site].values, alone.values)
    kept = ActivationPatching.load(found.save(tmp_path / "b"))
    assert list(kept.grids) == ["resid_pre", "attn_out", "mlp_out", "z"]
    table = kept.to_pandas()
    assert len(table) == 3 * 8 * 5 + 8 * 6 and set(table.site) == set(kept.grids)
    assert len(kept.plot().axes) == 8  # a colour bar each


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_direct_and_total_effects_equal_plain_hooks(kind):
    model = load_model(tiny(kind).double())
    heads = [(0, 3), (2, 1), (1, 0)]
    found = self_repair(model, CLEAN, OTHER, METRIC, heads, progress=False)
    ours, theirs = (capture(model, x, ["z", "resid_post"]) for x in (CLEAN, OTHER))
    last = model.n_layers - 1

    def metric(logits):
        return METRIC(logits[None])[0]

    before = metric(model.logits(CLEAN)[:, -1])
    for i, (layer, head) in enumerate(heads):
        edit = Edit("z", layer, theirs["z", layer][:, :, head], head=head)
        with intervene(model, [edit]):
            total = metric(model.logits(CLEAN)[:, -1]) - before
        # what the block's attention writes with and without the change, alone
        with intervene(model, [edit]):
            changed = capture(model, CLEAN, f"attn_out.{layer}")["attn_out", layer]
        own = capture(model, CLEAN, f"attn_out.{layer}")["attn_out", layer]
        stream = ours["resid_post", last] + changed - own
        with torch.no_grad():
            direct = metric(model.unembed(stream)[:, -1]) - before
        assert torch.allclose(found.total[:, i], total, atol=1e-10)
        assert torch.allclose(found.direct[:, i], direct, atol=1e-10)
    share = 1 - found.total.mean(0) / found.direct.mean(0)
    assert torch.allclose(found.repaired, share)
    # nothing comes behind the last layer's attention but its own MLP
    if kind == "gpt_neox":  # whose MLP reads beside it, and not behind it
        assert torch.allclose(found.total[:, 1], found.direct[:, 1], atol=1e-10)


def test_results_are_kept_and_shown(tmp_path):
    model = load_model(tiny("gpt2").double())
    found = self_repair(model, CLEAN, OTHER, METRIC, [(1, 2), (0, 1)], progress=False)
    again = SelfRepair.load(found.save(tmp_path))
    assert again.heads == ((1, 2), (0, 1)) and torch.equal(again.direct, found.direct)
    table = again.to_pandas()
    assert table["head"].tolist() == ["1.2", "0.1"] and (table.n == 3).all()
    assert again.plot().get_xlabel() == "direct effect"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"right": [" singer"]}, "2 prompts|right"),
        ({"wrong": None}, "needs wrong answers"),
        ({"wrong": [" singer", " pilot"]}, "prompt 0 are the same"),
        ({"corrupted": ["Riley works", "Riley Martin works as a"]}, "tokens"),
        ({"metric": "margin"}, "metric must be one of"),
        ({"right": ["", " singer"]}, "adds no token"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        activation_patching(load_model("mini", device="cpu"), **(TEXTS | change))


@pytest.mark.parametrize("heads", [[], [(0, 1), (0, 1)], [(0, 9)], [(7, 0)]])
def test_heads_that_are_not_there_are_refused(heads):
    with pytest.raises((ValueError, IndexError)):
        self_repair(load_model(tiny("gpt2")), CLEAN, OTHER, METRIC, heads)
