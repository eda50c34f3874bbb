"""Grids of patching and ablation against plain hooks: one whole forward pass a cell."""

import pytest
import torch
from families import tiny

from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.patching.grids import (
    AnswerMetric,
    Grid,
    KLMetric,
    ablate_grid,
    ablate_in_order,
    patch_grid,
)

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


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("by", ["head", "head_position"])
def test_patterns_equal_plain_hooks(kind, by):
    model = model_of(kind)
    acts = capture(model, CLEAN, "pattern")
    grid = patch_grid(model, CLEAN, OTHER, METRIC, "pattern", by=by, **QUIET)
    for layer in range(model.n_layers):
        for head in range(model.n_heads):
            value = acts["pattern", layer][:, head]
            for pos in range(6) if by == "head_position" else [None]:
                rows = value if pos is None else value[:, [pos]]
                edit = Edit("pattern", layer, rows, pos=pos, head=head)
                found = plain(model, [edit], OTHER)
                told = grid.values[:, layer, head]
                told = told if pos is None else told[:, pos]
                assert torch.allclose(told, found, atol=1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_entries_of_a_pattern_equal_plain_hooks(kind):
    model, by = model_of(kind), "head_query_key"
    theirs = capture(model, CLEAN, "pattern")["pattern"]
    own = capture(model, OTHER, "pattern")["pattern"]
    places = {"positions": [4, 2], "layers": [2, 0]}
    grid = patch_grid(model, CLEAN, OTHER, METRIC, "pattern", by=by, **places, **QUIET)
    assert grid.axes == ("layer", "head", "query", "key")
    assert grid.values.shape == (3, 2, 4, 2, 5)
    for i, layer in enumerate([2, 0]):
        for head, (j, query), key in [(0, (0, 4), 3), (3, (1, 2), 0), (1, (0, 4), 4)]:
            value = own[layer][:, head].clone()
            value[:, query, key] = theirs[layer][:, head, query, key]
            found = plain(model, [Edit("pattern", layer, value, head=head)], OTHER)
            told = grid.values[:, i, head, j, key]
            assert torch.allclose(told, found, atol=1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
@pytest.mark.parametrize("site", ["z", "q", "k"])
def test_heads_at_positions_equal_plain_hooks(kind, site):
    model = model_of(kind)
    acts = capture(model, CLEAN, site)
    grid = patch_grid(model, CLEAN, OTHER, METRIC, site, by="head_position", **QUIET)
    assert grid.axes == ("layer", "head", "position")
    for layer, head, pos in [(0, 0, 1), (1, 1, 5), (2, 1, 0), (0, 1, 4)]:
        value = acts[site, layer][:, [pos], head]
        found = plain(model, [Edit(site, layer, value, pos=pos, head=head)], OTHER)
        assert torch.allclose(grid.values[:, layer, head, pos], found, atol=1e-10)
    assert grid.plot().get_xlabel() == "position"


ATTENTION = {"gpt2": "attn", "llama": "self_attn", "opt": "self_attn"}


@pytest.mark.parametrize("kind", list(ATTENTION))
def test_the_middle_of_a_block_equals_plain_hooks(kind):
    """Torch hooks alone: attention's output is made what the stream lacks."""
    model = model_of(kind)
    mids = {}

    def run(tokens, layer, then):
        block, stream = model.blocks[layer], {}
        attention = getattr(block, ATTENTION[kind])
        hooks = [
            block.register_forward_pre_hook(
                lambda _, args: stream.update(x=args[0])  # its input
            ),
            attention.register_forward_hook(
                lambda _, args, out: (then(out[0], stream["x"]), *out[1:])
            ),
        ]
        logits = model.logits(tokens)
        for hook in hooks:
            hook.remove()
        return logits

    for layer in range(model.n_layers):

        def keep(out, x, layer=layer):
            mids[layer] = out + x
            return out

        run(CLEAN, layer, keep)
    grid = patch_grid(model, CLEAN, OTHER, METRIC, "resid_mid", **QUIET)
    for layer in range(model.n_layers):
        for pos in range(6):

            def put(out, x, layer=layer, pos=pos):
                out = out.clone()
                out[:, pos] = mids[layer][:, pos] - x[:, pos]
                return out

            found = difference(run(OTHER, layer, put))
            assert torch.allclose(grid.values[:, layer, pos], found, atol=1e-10)


NEURONS = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "opt": "fc2"}


@pytest.mark.parametrize("kind", list(NEURONS))
def test_neurons_equal_plain_hooks(kind):
    model = model_of(kind)
    chosen, acts = [3, 0, 17], capture(model, CLEAN, "mlp_act")
    many = {"by": "neuron", "neurons": chosen}
    grid = patch_grid(model, CLEAN, OTHER, METRIC, "mlp_act", **many, **QUIET)
    late = patch_grid(
        model, CLEAN, OTHER, METRIC, "mlp_act", **many, positions=[-1, 2], **QUIET
    )
    assert grid.labels[1] == ("3", "0", "17")
    for layer in range(model.n_layers):
        for i, neuron in enumerate(chosen):
            for told, where in ((grid, range(6)), (late, [5, 2])):

                def change(_, args, layer=layer, neuron=neuron, where=where):
                    x = args[0].clone().view(3, 6, -1)
                    value = acts["mlp_act", layer][:, :, neuron]
                    x[:, list(where), neuron] = value[:, list(where)]
                    return (x.view_as(args[0]),)

                module = model.blocks[layer].get_submodule(NEURONS[kind])
                hook = module.register_forward_pre_hook(change)
                found = difference(model.logits(OTHER))
                hook.remove()
                assert torch.allclose(told.values[:, layer, i], found, atol=1e-10)


def test_left_padding_is_refused_or_right():
    """Rows of five and six tokens give what each gives alone."""
    model = model_of("llama")
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, 0] = 0
    short = AnswerMetric("logit_diff", RIGHT[:1], WRONG[:1])
    for site, by in (("resid_pre", "position"), ("z", "head"), ("pattern", "head")):
        given = {"site": site, "by": by, "attention_mask": mask}
        grid = patch_grid(model, CLEAN, OTHER, METRIC, **given, **QUIET)
        alone = patch_grid(
            model, CLEAN[:1, 1:], OTHER[:1, 1:], short, site, by=by, **QUIET
        )
        told = grid.values[:1, :, 1:] if by == "position" else grid.values[:1]
        assert torch.allclose(told, alone.values, atol=1e-8)
    lost = ablate_grid(model, CLEAN, METRIC, how="mean", attention_mask=mask, **QUIET)
    acts = capture(model, CLEAN, "z", attention_mask=mask)["z"]
    means = acts.flatten(1, 2)[:, mask.flatten().bool()].mean(1)
    with intervene(model, [Edit("z", 1, means[1, 2], head=2)]):
        found = difference(model.logits(CLEAN, mask))
    assert torch.allclose(lost.values[:, 1, 2], found, atol=1e-10)


@pytest.mark.parametrize("by", ["position", "head", "head_position", "layer"])
def test_what_comes_before_the_first_difference_is_left_out_exactly(by):
    model, other = model_of("llama"), OTHER.clone()
    other[:, :3] = CLEAN[:, :3]
    other[1, 3] = CLEAN[1, 3]  # this pair begins to differ later
    site = "resid_pre" if by in ("position", "layer") else "v"
    acts = capture(model, CLEAN, site)
    places = {"positions": [4, 1, 3]}
    grid = patch_grid(model, CLEAN, other, METRIC, site, by=by, **places, **QUIET)
    for cell in grid.mean.isfinite().nonzero().tolist():
        named = dict(zip(grid.axes, cell, strict=True))
        pos = places["positions"]
        pos = [pos[named["position"]]] if "position" in named else pos
        value = acts[site, cell[0]][:, pos]
        value = value[:, :, named["head"]] if "head" in named else value
        edit = Edit(site, cell[0], value, pos=pos, head=named.get("head"))
        told = grid.values[(slice(None), *cell)]
        assert torch.allclose(told, plain(model, [edit], other), atol=1e-10)
    if by.endswith("position"):
        early = grid.values[..., 1]
        assert torch.equal(
            early, grid.before.view(-1, *[1] * (early.ndim - 1)).expand_as(early)
        )


class _Pad:
    pad_token_id = 0


def test_padding_without_a_mask_is_refused(monkeypatch):
    """Also where the first row has most of it."""
    model = model_of("llama")
    for row in (0, 1):
        ids = CLEAN.clone()
        ids[row, 0] = 0
        padded = load_model(model.hf, _Pad())
        with pytest.raises(
            ValueError, match=f"clean prompts have padding in row {row}"
        ):
            patch_grid(padded, ids, OTHER, METRIC, **QUIET)


def test_any_position_can_be_read():
    model, acts = model_of("gpt2"), capture(model_of("gpt2"), CLEAN, "resid_pre")
    grid = patch_grid(model, CLEAN, OTHER, METRIC, read_at=3, **QUIET)
    for layer, pos in ((0, 2), (2, 3), (1, 0)):
        value = acts["resid_pre", layer][:, [pos]]
        with intervene(model, [Edit("resid_pre", layer, value, pos=pos)]):
            logits = model.logits(OTHER)[:, 3]
        found = logits[range(3), RIGHT] - logits[range(3), WRONG]
        assert torch.allclose(grid.values[:, layer, pos], found, atol=1e-10)
    assert torch.equal(grid.values[:, :, 4], grid.before[:, None].expand(3, 3))


def test_divergence_from_the_clean_prediction(tmp_path):
    model = model_of("gpt2")
    metric = KLMetric.of(model, CLEAN)
    grid = patch_grid(model, CLEAN, OTHER, metric, folder=tmp_path / "kl", **QUIET)
    ours, theirs = (model.logits(x)[:, -1].log_softmax(-1) for x in (CLEAN, OTHER))
    wanted = -torch.nn.functional.kl_div(
        theirs, ours, reduction="none", log_target=True
    )
    assert torch.allclose(grid.before, wanted.sum(-1), atol=1e-10)
    assert torch.allclose(grid.target, torch.zeros(3).double(), atol=1e-12)
    other = KLMetric.of(model, OTHER)  # another reference is another sweep
    with pytest.raises(ValueError, match="another"):
        patch_grid(model, CLEAN, OTHER, other, folder=tmp_path / "kl", **QUIET)
    with pytest.raises(ValueError, match="the reference is"):
        metric(torch.zeros(1, 2, 97))


@pytest.mark.parametrize("how", ["zero", "mean_by_position", "mean"])
def test_one_more_goes_in_every_cell(how):
    model, places = model_of("llama"), [(1, 2), (0, 0), (2, 3), (1, 0)]
    grid = ablate_in_order(model, CLEAN, METRIC, places, how=how, **QUIET)
    assert grid.axes == ("removed",) and grid.labels[0] == ("1.2", "0.0", "2.3", "1.0")
    acts = capture(model, CLEAN, "z")["z"]
    over = {"mean_by_position": 1, "mean": (1, 2)}
    means = torch.zeros_like(acts) if how == "zero" else acts.mean(over[how], True)
    for n in range(4):
        edits = [Edit("z", i, means[i][:, :, h], head=h) for i, h in places[: n + 1]]
        assert torch.allclose(grid.values[:, n], plain(model, edits, CLEAN), atol=1e-10)


def test_neurons_go_in_order():
    model, places = model_of("gpt2"), [(1, 2), (0, 100)]
    grid = ablate_in_order(model, CLEAN, METRIC, places, "mlp_act", how="zero", **QUIET)
    alone = ablate_grid(
        model, CLEAN, METRIC, "mlp_act", how="zero", by="neuron", neurons=[2], **QUIET
    )
    assert torch.allclose(grid.values[:, 0], alone.values[:, 1, 0], atol=1e-12)
    edits = [Edit("mlp_act", i, 0.0, neuron=n) for i, n in places]
    assert torch.allclose(grid.values[:, 1], plain(model, edits, CLEAN), atol=1e-10)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([], "at least one"),
        ([(0, 1), (0, 1)], "different"),
        ([(9, 0)], "layer 9 does not exist"),
        ([(0, 4)], "head must be .*3.* not 4"),
    ],
)
def test_places_that_are_not_there(places, words):
    with pytest.raises((ValueError, IndexError), match=words):
        ablate_in_order(model_of("llama"), CLEAN, METRIC, places, **QUIET)


def test_cells_by_their_size():
    grid = ablate_grid(model_of("gpt2"), CLEAN, METRIC, **QUIET)
    ranked = grid.ranked(largest=False)
    means = [float(grid.mean[place]) for place in ranked]
    assert means == sorted(means) and len(set(ranked)) == 12
    assert grid.ranked()[0] == ranked[-1]


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


def test_means_and_intervals_of_shares_and_changes():
    """A pair whose runs hardly differ does not outweigh the others."""
    change, way = torch.randn(2, 40, generator=DRAW).double() * 0.3, 5.0
    ways = torch.full((40,), way).double()
    ways[0], change = 0.001, change[0] + 1
    told = {"axes": ("layer",), "labels": (("0",),), "site": "z"}
    grid = Grid(
        values=change[:, None],
        before=torch.zeros(40).double(),
        target=ways,
        how="denoising",
        **told,
    )
    assert torch.allclose(grid.mean, change.sum()[None] / ways.sum())
    table = grid.to_pandas(shares=False)
    assert list(table) == ["layer", "change", "half_width", "n"]
    assert float(table.change[0]) == pytest.approx(float(change.mean()))
    half = 2.0227 * float(change.std()) / 40**0.5  # Student's, 39 degrees
    assert float(table.half_width[0]) == pytest.approx(half, rel=1e-3)
    draws = torch.randint(40, (4000, 40), generator=DRAW)
    spread = (change[draws].sum(1) / ways[draws].sum(1)).std()
    assert float(grid.half_width) == pytest.approx(1.96 * float(spread), rel=0.1)
    lost = Grid(
        values=change[:, None],
        before=torch.zeros(40).double(),
        target=torch.full((40,), torch.nan),
        how="zero",
        **told,
    )
    assert torch.allclose(lost.mean, change.mean()[None])
    assert float(lost.half_width) == pytest.approx(half, rel=1e-3)


def test_pairs_that_pull_both_ways_are_told():
    flipped = AnswerMetric(
        "logit_diff", torch.tensor([7, 18, 9]), torch.tensor([17, 8, 19])
    )
    model = model_of("gpt2")
    gap = flipped(model.logits(CLEAN)[None, :, -1] - model.logits(OTHER)[None, :, -1])
    rising = int((gap > 0).sum())
    assert 0 < rising < 3
    grid = patch_grid(model, CLEAN, OTHER, flipped, layers=[1], **QUIET)
    with pytest.warns(UserWarning, match=f"in {rising} of 3 pairs and falls"):
        assert grid.mean.isfinite().all()


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
        ({"site": "resid_middle"}, "site must be one of"),
        ({"site": "mlp_out", "by": "neuron"}, "has no neurons"),
        ({"site": "mlp_act", "neurons": [1]}, "neurons are for by='neuron', not by="),
        ({"site": "mlp_act", "by": "neuron", "neurons": [0, 500]}, "0..127"),
        ({"site": "mlp_act", "by": "neuron", "neurons": []}, "at least one"),
        ({"by": "head_query_key"}, "is for site 'pattern', not 'resid_pre'"),
        ({"site": "pattern", "window": 2}, "takes window=1, not 2"),
        ({"read_at": 6}, "position 6 is outside"),
        ({"attention_mask": torch.ones(3, 5).long()}, r"attention_mask is \(3, 5\)"),
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


@pytest.mark.parametrize("how", ["mean_by_position", "resample", "zero"])
def test_patterns_are_ablated_query_by_query(how):
    """With as many positions as heads, so that a weight on the wrong axis would fit."""
    model, mask = model_of("llama"), torch.ones(3, 4, dtype=torch.long)
    ids, mask[:, 0] = CLEAN[:, :4], 0  # the same padding everywhere
    options = {"attention_mask": mask, "how": how, "by": "head", **QUIET}
    grid = ablate_grid(model, ids, METRIC, "pattern", **options)
    pattern = capture(model, ids, "pattern", attention_mask=mask)["pattern"]
    for layer, head in ((0, 1), (2, 3)):
        own = pattern[layer, :, head]
        if how == "zero":
            wanted = [torch.zeros_like(own)]
        elif how == "mean_by_position":
            wanted = [own.mean(0).expand_as(own)]
        else:
            wanted = [
                own[list(rows)]
                for rows in (
                    (1, 0, 0),
                    (1, 0, 1),
                    (1, 2, 0),
                    (1, 2, 1),
                    (2, 0, 0),
                    (2, 0, 1),
                    (2, 2, 0),
                    (2, 2, 1),
                )
            ]
        gaps = []
        for value in wanted:
            with intervene(model, [Edit("pattern", layer, value, head=head)]):
                found = difference(model.logits(ids, mask))
            gaps.append((found - grid.values[:, layer, head]).abs().amax())
        # eager attention takes its softmax in float32
        assert min(gaps) < 1e-5
    with pytest.raises(ValueError, match="no mean over positions"):
        ablate_grid(model, ids, METRIC, "pattern", **(options | {"how": "mean"}))
    mask[1, 0] = 1
    if how != "zero":
        with pytest.raises(ValueError, match="same padding in every prompt"):
            ablate_grid(model, ids, METRIC, "pattern", **options)


def test_zeros_in_the_middle_need_no_reference():
    model = model_of("gpt2")
    options = {"how": "zero", "by": "position", **QUIET}
    own = ablate_grid(model, CLEAN, METRIC, "resid_mid", **options)
    other = ablate_grid(
        model, CLEAN, METRIC, "resid_mid", reference=OTHER[:2, :5], **options
    )
    assert torch.equal(own.values, other.values)


def test_a_reference_prediction_knows_of_padding():
    model, mask = model_of("llama"), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = 0
    metric = KLMetric.of(model, CLEAN, attention_mask=mask)
    grid = patch_grid(model, CLEAN, OTHER, metric, attention_mask=mask, **QUIET)
    assert grid.target.abs().max() < 1e-10
    ids = CLEAN.clone()
    ids[1, 0] = 0
    with pytest.raises(ValueError, match="padding in row 1"):
        KLMetric.of(load_model(model.hf, _Pad()), ids)
    with pytest.raises(IndexError, match="position 9 is outside"):
        KLMetric.of(model, CLEAN, read_at=9)


def test_cells_are_found_again_and_ranked_as_the_model_counts():
    model = model_of("gpt2")
    places = {"layers": [2, 0], "positions": [5, 3, 0], **QUIET}
    grid = patch_grid(model, CLEAN, OTHER, METRIC, **places)
    best = grid.ranked()[0]
    assert grid.mean[grid.index(best)] == grid.mean.max()
    assert grid.index((0, 3)) == (1, 1)
    with pytest.raises(ValueError, match=r"no cell \(1, 3\)"):
        grid.index((1, 3))
    order = ablate_in_order(model, CLEAN, METRIC, [(0, 1), (2, 2)], **QUIET)
    with pytest.raises(ValueError, match="in the order in which"):
        order.ranked()


def test_any_metric_is_kept_or_refused(tmp_path):
    """A view of the logits for a single prompt, weights of a reader's own, counts."""
    model = model_of("gpt2")
    one = patch_grid(model, CLEAN[:1], OTHER[:1], lambda x: x[..., 5], **QUIET)
    kept = Grid.load(one.save(tmp_path))
    assert torch.equal(kept.before, one.before) and one.half_width.isnan().all()
    weight = torch.randn(97).double().requires_grad_()
    own = patch_grid(model, CLEAN, OTHER, lambda x: x @ weight, **QUIET)
    assert not own.before.requires_grad and own.plot().get_xlabel() == "layer"
    for metric in (lambda x: x.argmax(-1), lambda x: x[..., 0] > 0):
        with pytest.raises(ValueError, match="make them floating"):
            patch_grid(model, CLEAN, OTHER, metric, **QUIET)
    with pytest.raises(ValueError, match=r"logits\[None, :, -1\]"):
        METRIC(model.logits(CLEAN)[:, -1])
