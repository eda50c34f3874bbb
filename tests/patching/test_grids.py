"""Grids of patching and ablation against plain hooks: one whole forward pass a cell."""

import pytest
import torch
from families import tiny

from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.patching.grids import AnswerMetric, Grid, ablate_grid, patch_grid

QUIET = {"progress": False}
DRAW = torch.Generator().manual_seed(0)
CLEAN, OTHER = (torch.randint(5, 90, (3, 6), generator=DRAW) for _ in range(2))
RIGHT, WRONG = torch.tensor([7, 8, 9]), torch.tensor([17, 18, 19])
METRIC = AnswerMetric("logit_diff", RIGHT, WRONG)


def model_of(kind):
    return load_model(tiny(kind).double())


def difference(logits):
    """The plain logit difference, written out."""
    rows = range(len(logits))
    return logits[rows, -1, RIGHT] - logits[rows, -1, WRONG]


def plain(model, edits, tokens):
    with intervene(model, edits):
        return difference(model.logits(tokens))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_positions_equal_plain_hooks(kind, site, direction):
    model = model_of(kind)
    lender, base = (CLEAN, OTHER) if direction == "denoising" else (OTHER, CLEAN)
    acts = capture(model, lender, site)
    grid = patch_grid(model, CLEAN, OTHER, METRIC, site, direction=direction, **QUIET)
    assert grid.axes == ("layer", "position")
    for told, tokens in ((grid.before, base), (grid.target, lender)):
        assert torch.allclose(told, difference(model.logits(tokens)), atol=1e-10)
    for layer in range(model.n_layers):
        for pos in range(6):
            value = acts[site, layer][:, [pos]]
            found = plain(model, [Edit(site, layer, value, pos=pos)], base)
            assert torch.allclose(grid.values[:, layer, pos], found, atol=1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("site", ["z", "q", "v"])
def test_heads_equal_plain_hooks(kind, site):
    model = model_of(kind)
    acts = capture(model, CLEAN, site)
    grid = patch_grid(model, CLEAN, OTHER, METRIC, site, by="head", **QUIET)
    n = model.n_kv_heads if site == "v" else model.n_heads
    assert grid.values.shape == (3, model.n_layers, n)
    for layer in range(model.n_layers):
        for head in range(n):
            edit = Edit(site, layer, acts[site, layer][:, :, head], head=head)
            found = plain(model, [edit], OTHER)
            assert torch.allclose(grid.values[:, layer, head], found, atol=1e-10)


def test_windows_and_chosen_places():
    model = model_of("gpt2")
    acts = capture(model, CLEAN, "mlp_out")
    chosen = {"layers": [2, 0], "positions": [-1, 1], "window": 2}
    grid = patch_grid(model, CLEAN, OTHER, METRIC, "mlp_out", **chosen, **QUIET)
    assert grid.labels == (("2", "0"), ("5", "1"))
    for i, inside in enumerate([(1, 2), (0,)]):  # around 2, and around 0 cut at the end
        for j, pos in enumerate([5, 1]):
            edits = [
                Edit("mlp_out", k, acts["mlp_out", k][:, [pos]], pos=pos)
                for k in inside
            ]
            found = plain(model, edits, OTHER)
            assert torch.allclose(grid.values[:, i, j], found, atol=1e-10)


def test_the_ends_are_zero_and_one():
    """All positions of the first stream are the other prompt itself."""
    model = model_of("gpt2")
    grid = patch_grid(model, CLEAN, OTHER, METRIC, by="layer", layers=[0], **QUIET)
    assert torch.allclose(grid.recovered, torch.ones(3, 1).double(), atol=1e-10)
    nothing = patch_grid(
        model, CLEAN, OTHER, METRIC, "mlp_out", layers=[2], positions=[0], **QUIET
    )
    assert (
        nothing.mean.abs().max() < 1e-12
    )  # the last layer's first token moves nothing


@pytest.mark.parametrize("how", ["zero", "mean", "mean_by_position", "resample"])
@pytest.mark.parametrize("site", ["z", "mlp_out"])
def test_ablations_equal_plain_hooks(how, site):
    model = model_of("llama")
    by = "head" if site == "z" else "position"
    grid = ablate_grid(model, CLEAN, METRIC, site, how=how, by=by, **QUIET)
    acts = capture(model, CLEAN, site)[site]
    means = {
        "zero": torch.zeros_like(acts),
        "mean": acts.mean((1, 2), keepdim=True).expand_as(acts),
        "mean_by_position": acts.mean(1, keepdim=True).expand_as(acts),
    }
    assert grid.target.isnan().all() and grid.how == how
    for layer in range(model.n_layers):
        for cell in range(grid.values.shape[2]):
            place = {"head": cell} if site == "z" else {"pos": cell}
            at = (
                (slice(None), slice(None), cell)
                if site == "z"
                else (slice(None), [cell])
            )
            if how == "resample":  # of two others, one by one
                rows = [[j for j in range(3) if j != i] for i in range(3)]
                several = [
                    plain(
                        model,
                        [Edit(site, layer, acts[layer][list(r)][at], **place)],
                        CLEAN,
                    )
                    for r in [
                        (a, b, c) for a in rows[0] for b in rows[1] for c in rows[2]
                    ]
                ]
                gap = (torch.stack(several) - grid.values[:, layer, cell]).abs()
                assert (gap.amin(0) < 1e-10).all()
            else:
                edit = Edit(site, layer, means[how][layer][at], **place)
                found = plain(model, [edit], CLEAN)
                assert torch.allclose(grid.values[:, layer, cell], found, atol=1e-10)


def test_metrics_by_hand():
    logits = torch.randn(2, 3, 40, generator=DRAW)
    p = logits.softmax(-1)[:, range(3), RIGHT]
    by_name = {"probability": p, "log_probability": p.log()}
    by_name["logit_diff"] = logits[:, range(3), RIGHT] - logits[:, range(3), WRONG]
    for name, wanted in by_name.items():
        assert torch.allclose(
            AnswerMetric(name, RIGHT, WRONG)(logits), wanted, atol=1e-6
        )


def test_a_function_of_ones_own_and_a_folder(tmp_path):
    model = model_of("gpt2")
    own = patch_grid(model, CLEAN, OTHER, entropy, folder=tmp_path / "a", **QUIET)
    again = patch_grid(model, CLEAN, OTHER, entropy, folder=tmp_path / "a", **QUIET)
    assert torch.equal(own.values, again.values)
    assert torch.allclose(own.target, entropy(model.logits(CLEAN)[None, :, -1])[0])
    kept = Grid.load(own.save(tmp_path / "b"))
    assert torch.equal(kept.values, own.values) and kept.labels == own.labels
    table = own.to_pandas()
    assert list(table) == ["layer", "position", "mean", "half_width", "n"]
    assert len(table) == own.mean.numel() and own.plot().get_xlabel() == "layer"
    line = patch_grid(model, CLEAN, OTHER, METRIC, by="layer", **QUIET)
    assert line.plot().get_ylabel() == "share recovered"


def entropy(logits):
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corrupted": OTHER[:, :5]}, "must have equal length"),
        ({"corrupted": OTHER[:2]}, "must have equal length"),
        ({"corrupted": torch.cat([OTHER[:1], CLEAN[1:]])}, "of pair 1 are the same"),
        ({"metric": lambda logits: logits.sum(-1) * 0}, "pair 0 is 0 on both sides"),
        (
            {"metric": lambda logits: logits.sum()},
            r"one number per prompt, .* \(1, 3\)",
        ),
        ({"site": "mlp_out", "by": "head"}, "has no heads"),
        ({"site": "pattern"}, "site must be one of"),
        ({"layers": [9]}, "layer 9 does not exist"),
        ({"layers": []}, "at least one"),
        ({"positions": [6]}, "position 6 is outside"),
        ({"positions": [1, -5]}, "twice"),
        ({"window": 0}, "window must be a whole number of at least 1"),
    ],
)
def test_hostile_input(change, words):
    given = {"clean": CLEAN, "corrupted": OTHER, "metric": METRIC} | change
    with pytest.raises((ValueError, IndexError), match=words):
        patch_grid(model_of("gpt2"), **given, **QUIET)


def test_hostile_ablations_and_metrics():
    model = model_of("gpt2")
    with pytest.raises(ValueError, match="needs equal lengths"):
        ablate_grid(model, CLEAN, METRIC, reference=OTHER[:, :4], **QUIET)
    with pytest.raises(ValueError, match="no other to draw from"):
        one = AnswerMetric("probability", RIGHT[:1])
        ablate_grid(model, CLEAN[:1], one, how="resample", **QUIET)
    with pytest.raises(ValueError, match="needs wrong answers"):
        AnswerMetric("logit_diff", RIGHT)
    with pytest.raises(ValueError, match="of prompt 0 are the same"):
        AnswerMetric("logit_diff", RIGHT, RIGHT)
    with pytest.raises(ValueError, match="answers for 2 prompts, but 3 prompts"):
        patch_grid(model, CLEAN, OTHER, AnswerMetric("probability", RIGHT[:2]), **QUIET)
    with pytest.raises(ValueError, match="vocabulary"):
        far = AnswerMetric("probability", RIGHT + 10**6)
        patch_grid(model, CLEAN, OTHER, far, **QUIET)
