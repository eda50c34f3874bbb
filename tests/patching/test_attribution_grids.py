"""Attribution patching against torch's hooks on the Hugging Face model itself."""

import pytest
import torch
from families import CONFIGS, EXPERTS, different, tiny
from torch import nn

from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.patching.attribution import Agreement, agreement, attribute_grid
from mechtut.patching.grids import AnswerMetric, Grid, patch_grid

QUIET = {"progress": False}
DRAW = torch.Generator().manual_seed(0)
CLEAN, OTHER = (torch.randint(5, 90, (3, 6), generator=DRAW) for _ in range(2))
RIGHT, WRONG = torch.tensor([7, 8, 9]), torch.tensor([17, 18, 19])
METRIC = AnswerMetric("logit_diff", RIGHT, WRONG)
# where the stream enters a block, and where z does: written out, not looked up
BLOCKS = {
    "gpt2": ("transformer.h", "attn.c_proj"),
    "llama": ("model.layers", "self_attn.o_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense"),
    "gemma2": ("model.layers", "self_attn.o_proj"),
}


def difference(logits):
    rows = range(len(logits))
    return logits[rows, -1, RIGHT] - logits[rows, -1, WRONG]


def by_hand(hf, tokens, places, start=None):
    """The inputs of modules and their gradients, by nothing but torch's hooks."""
    seen, handles = [], []

    def enter(module, args, kwargs):
        x = start.clone().requires_grad_() if start is not None else args[0]
        return (x, *args[1:]), kwargs

    def note(module, args):
        args[0].retain_grad()
        seen.append(args[0])

    if start is not None:
        first = hf.get_submodule(places[0].rsplit(".", 1)[0] + ".0")
        handles.append(first.register_forward_pre_hook(enter, with_kwargs=True))
    handles += [hf.get_submodule(p).register_forward_pre_hook(note) for p in places]
    try:
        value = difference(hf(tokens, use_cache=False).logits)
        value.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    hf.zero_grad()
    return value.detach(), [(x.detach(), x.grad) for x in seen]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_one_gradient_by_hand(kind, direction, site):
    hf = tiny(kind).double()
    model, (blocks, proj) = load_model(hf), BLOCKS[kind]
    tail = f".{proj}" if site == "z" else ""
    places = [f"{blocks}.{i}{tail}" for i in range(3)]
    lender, base = (CLEAN, OTHER) if direction == "denoising" else (OTHER, CLEAN)
    target, lent = by_hand(hf, lender, places)
    before, own = by_hand(hf, base, places)
    by = "head" if site == "z" else "position"
    given = (model, CLEAN, OTHER, METRIC, site)
    grid = attribute_grid(*given, by=by, direction=direction, **QUIET)
    assert torch.allclose(grid.before, before) and torch.allclose(grid.target, target)
    for layer in range(3):
        (x, slope), (there, _) = own[layer], lent[layer]
        product = slope * (there - x)
        if site == "z":
            wanted = product.unflatten(-1, (model.n_heads, -1)).sum((1, 3))
        else:
            wanted = product.sum(-1)
        assert torch.allclose(grid.change[:, layer], wanted, atol=1e-10)
    exact = patch_grid(*given, by=by, direction=direction, **QUIET)
    assert grid.axes == exact.axes and grid.labels == exact.labels
    assert grid.values.shape == exact.values.shape
    assert grid.how == f"attribution, {direction}"
    assert all(w.grad is None and w.requires_grad for w in hf.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_steps_by_hand(kind):
    hf = tiny(kind).double()
    model, blocks = load_model(hf), BLOCKS[kind][0]
    places = [f"{blocks}.{i}" for i in range(3)]
    _, lent = by_hand(hf, CLEAN, places)
    before, own = by_hand(hf, OTHER, places)
    slopes = [0.0] * 3
    for k in range(4):
        start = own[0][0] + (k + 0.5) / 4 * (lent[0][0] - own[0][0])
        _, found = by_hand(hf, OTHER, places, start)
        slopes = [a + g / 4 for a, (_, g) in zip(slopes, found, strict=True)]
    grid = attribute_grid(model, CLEAN, OTHER, METRIC, steps=4, **QUIET)
    assert torch.allclose(grid.before, before)
    for layer in range(3):
        product = slopes[layer] * (lent[layer][0] - own[layer][0])
        assert torch.allclose(grid.change[:, layer], product.sum(-1), atol=1e-10)


@pytest.mark.parametrize("kind", different(CONFIGS))
def test_all_families_and_completeness(kind):
    """Over the whole way of the first stream, gradients add up to the difference."""
    model = load_model(tiny(kind).double())
    given = (model, CLEAN, OTHER, METRIC)
    off = []
    for steps in (1, 100):
        grid = attribute_grid(*given, by="layer", layers=[0], steps=steps, **QUIET)
        off.append(float((grid.values[:, 0] - grid.target).abs().max()))
    if kind not in EXPERTS:  # a mixture jumps from one expert to another
        assert off[1] < 0.02 < off[0]
    z = attribute_grid(*given, "z", by="head", **QUIET)
    assert z.values.shape == (3, 3, model.n_heads) and z.change.abs().max() > 1e-3


def test_equal_to_patching_where_the_model_is_linear():
    """From the last MLP on, a model without its last norm is a matrix."""
    hf = tiny("gpt2").double()
    model = load_model(hf)
    hf.transformer.ln_f = nn.Identity()
    for site, by in (("mlp_out", "position"), ("resid_post", "position")):
        given = (model, CLEAN, OTHER, METRIC, site)
        exact = patch_grid(*given, by=by, layers=[2], **QUIET)
        for steps in (1, 3):
            told = attribute_grid(*given, by=by, layers=[2], steps=steps, **QUIET)
            assert torch.allclose(told.values, exact.values, atol=1e-10)
            assert exact.change.abs().max() > 0.1
    found = agreement(told, exact, k=1)
    assert found.correlation == pytest.approx(1) and found.slope == pytest.approx(1)
    assert found.overlap == 1 and found.same_sign == 1 and found.error < 1e-10


def test_small_steps_are_right_everywhere():
    """A metric of two prompts that are nearly one: the line is the curve."""
    hf = tiny("llama").double()
    with torch.no_grad():
        table = hf.get_input_embeddings().weight
        table[41] = table[40] + 1e-4 * torch.randn(32, generator=DRAW).double()
    clean, other = CLEAN.clone(), CLEAN.clone()
    clean[:, 2], other[:, 2] = 40, 41
    model = load_model(hf)
    for site, by in (("q", "head"), ("k", "head"), ("v", "head"), ("z", "head")):
        given = (model, clean, other, METRIC, site)
        told, exact = (f(*given, by=by, **QUIET) for f in (attribute_grid, patch_grid))
        assert told.values.shape == exact.values.shape
        assert torch.allclose(told.recovered, exact.recovered, atol=0.02)
        assert exact.recovered.abs().max() > 0.02


def test_groups_of_prompts_change_nothing():
    model = load_model(tiny("gpt_neox").double())
    given = (model, CLEAN, OTHER, METRIC, "z")
    for steps in (1, 2):
        grids = [
            attribute_grid(*given, by="head", batch_size=n, steps=steps, **QUIET)
            for n in (1, 2, 16)
        ]
        for grid in grids[1:]:
            assert torch.allclose(grid.values, grids[0].values, atol=1e-12)
            assert torch.allclose(grid.before, grids[0].before)
    alone = attribute_grid(
        model,
        CLEAN[1:2],
        OTHER[1:2],
        AnswerMetric("logit_diff", RIGHT[1:2], WRONG[1:2]),
        "z",
        by="head",
        **QUIET,
    )
    whole = attribute_grid(*given, by="head", **QUIET)
    assert torch.allclose(alone.values[0], whole.values[1], atol=1e-12)


def test_chosen_places_metrics_and_files(tmp_path):
    model = load_model(tiny("gpt2").double())
    whole = attribute_grid(model, CLEAN, OTHER, METRIC, "mlp_out", **QUIET)
    chosen = {"layers": [2, 0], "positions": [-1, 1]}
    some = attribute_grid(model, CLEAN, OTHER, METRIC, "mlp_out", **chosen, **QUIET)
    assert some.labels == (("2", "0"), ("5", "1"))
    assert torch.allclose(some.values, whole.values[:, [2, 0]][:, :, [5, 1]])

    def entropy(logits):
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    with torch.no_grad():
        own = attribute_grid(model, CLEAN, OTHER, entropy, **QUIET)
    assert not own.values.requires_grad
    assert torch.allclose(own.target, entropy(model.logits(CLEAN)[None, :, -1])[0])
    assert own.provenance["arguments"]["metric"] == "entropy"
    exact = patch_grid(model, CLEAN, OTHER, entropy, **QUIET)
    found = agreement(own, exact)
    kept = Agreement.load(found.save(tmp_path / "a"))
    assert torch.equal(kept.exact, found.exact) and kept.labels == found.labels
    assert Grid.load(own.save(tmp_path / "b")).how == "attribution, denoising"
    assert found.plot().get_ylabel() == "estimated change"
    assert own.plot().get_xlabel() == "layer"
    table = found.to_pandas()
    assert list(table.layer) == ["0", "1", "2"] and list(table.cells) == [6, 6, 6]
    line = attribute_grid(model, CLEAN, OTHER, entropy, by="layer", **QUIET)
    assert line.plot().get_ylabel() == "share recovered"
    assert agreement(line, line).plot().get_xlabel().startswith("measured")
    half = attribute_grid(load_model(tiny("gpt2").bfloat16()), CLEAN, OTHER, entropy)
    assert half.values.dtype == torch.float32


def grid_of(change):
    """A grid with these changes from 0."""
    n, n_layers, n_cells = change.shape
    return Grid(
        values=change,
        before=torch.zeros(n),
        target=torch.ones(n),
        axes=("layer", "head"),
        labels=tuple(tuple(map(str, range(m))) for m in (n_layers, n_cells)),
        site="z",
        how="denoising",
    )


def test_the_numbers_of_an_agreement():
    exact = torch.randn(12, 5, 8, generator=DRAW).double()
    noise = torch.randn(12, 5, 8, generator=DRAW).double()
    told = 0.5 * exact + 0.1 * noise + 3
    found = agreement(grid_of(told), grid_of(exact), k=4)
    one, other = told.mean(0).flatten(), exact.mean(0).flatten()
    wanted = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
    assert found.correlation == pytest.approx(wanted)
    assert found.low < wanted < found.high <= 1
    design = torch.stack([other, torch.ones(40).double()], 1)
    slope = torch.linalg.lstsq(design, one[:, None]).solution[0]
    assert found.slope == pytest.approx(float(slope))
    assert found.error == pytest.approx(float((one - other).abs().mean()))
    # of 40 independent cells, 1.96 / sqrt(40) = 0.31
    assert 0.2 < found.chance < 0.45
    large = [i for i in range(40) if abs(other[i]) >= max(abs(other)) / 100]
    signs = sum(bool(one[i] * other[i] > 0) for i in large) / len(large)
    assert found.same_sign == pytest.approx(signs)
    top = [sorted(range(40), key=lambda i: -abs(x[i]))[:4] for x in (one, other)]
    assert found.overlap == len(set(top[0]) & set(top[1])) / 4
    again = agreement(grid_of(told), grid_of(exact), k=4)
    assert (again.low, again.chance) == (found.low, found.chance)
    unrelated = agreement(grid_of(noise), grid_of(exact))
    assert abs(unrelated.correlation) < 0.5
    row = found.to_pandas().iloc[2]
    pair = torch.stack([told.mean(0)[2], exact.mean(0)[2]])
    assert row.correlation == pytest.approx(float(torch.corrcoef(pair)[0, 1]))
    single = agreement(grid_of(told[:1]), grid_of(exact[:1]))
    assert single.low != single.low and single.correlation == single.correlation
    flat = agreement(grid_of(told), grid_of(torch.ones(12, 5, 8)))
    assert flat.correlation != flat.correlation  # nothing to agree with


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corrupted": OTHER[:, :5]}, "must have equal length"),
        ({"corrupted": torch.cat([OTHER[:1], CLEAN[1:]])}, "of pair 1 are the same"),
        ({"metric": lambda logits: logits.sum(-1) * 0}, "pair 0 is zero"),
        ({"metric": lambda logits: logits.sum()}, "one number per prompt"),
        ({"metric": lambda logits: logits.detach().sum(-1)}, "has no gradient"),
        (
            {"metric": lambda logits: (logits.argmax(-1) == 3).float()},
            "has no gradient",
        ),
        ({"metric": lambda logits: logits.amax(-1).round()}, "pair 0 is zero"),
        (
            {"metric": lambda logits: logits[..., 5] - logits[..., 5].mean(1, True)},
            "logits of other prompts",
        ),
        (
            {"metric": lambda logits: (logits[..., 5] - logits[..., 5]).sqrt()},
            "gradient is not finite",
        ),
        ({"site": "mlp_out", "by": "head"}, "has no heads"),
        ({"layers": [9]}, "layer 9 does not exist"),
        ({"positions": [6]}, "position 6 is outside"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ],
)
def test_hostile_input(change, words):
    model = load_model(tiny("gpt2").double())
    given = {"clean": CLEAN, "corrupted": OTHER, "metric": METRIC} | change
    with pytest.raises((ValueError, IndexError), match=words):
        attribute_grid(model, **given, **QUIET)


def test_grids_that_cannot_be_compared():
    model = load_model(tiny("gpt2").double())
    given = (model, CLEAN, OTHER, METRIC)
    told = attribute_grid(*given, **QUIET)
    with pytest.raises(ValueError, match="site is 'resid_pre'"):
        agreement(told, patch_grid(*given, "mlp_out", **QUIET))
    with pytest.raises(ValueError, match="labels is"):
        agreement(told, patch_grid(*given, layers=[1], **QUIET))
    with pytest.raises(ValueError, match="of the same run"):
        agreement(told, patch_grid(*given, direction="noising", **QUIET))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        attribute_grid(*given, **QUIET)
    assert capture(model, CLEAN, "z.1")["z.1"].requires_grad is False


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_neurons_and_patterns_are_slopes(kind):
    """A little of the way to the other run, there and back (Llama norms in float32)."""
    model = load_model(tiny(kind).double())
    quiet = {"progress": False}

    def slope(site, layer, way, step, **place):
        own = capture(model, OTHER, site)[site][layer]
        own = own[:, :, place["neuron"]] if "neuron" in place else own[:, place["head"]]
        ends = []
        for sign in (1, -1):
            edit = Edit(site, layer, own + sign * step * way, **place)
            with intervene(model, [edit]):
                ends.append(METRIC(model.logits(OTHER)[None, :, -1])[0])
        return (ends[0] - ends[1]) / (2 * step)

    neurons = {"by": "neuron", "neurons": [5, 0], **quiet}
    grid = attribute_grid(model, CLEAN, OTHER, METRIC, "mlp_act", **neurons)
    ours, theirs = (capture(model, x, ["mlp_act", "pattern"]) for x in (CLEAN, OTHER))
    for layer, i in ((0, 0), (2, 1)):
        neuron = [5, 0][i]
        way = (ours["mlp_act"] - theirs["mlp_act"])[layer, :, :, neuron]
        found = slope("mlp_act", layer, way, 1e-2, neuron=neuron)
        assert torch.allclose(grid.change[:, layer, i], found, rtol=1e-3, atol=1e-4)
    heads = attribute_grid(model, CLEAN, OTHER, METRIC, "pattern", by="head", **quiet)
    way = ours["pattern"] - theirs["pattern"]
    for layer, head in ((0, 1), (2, 3)):
        found = slope("pattern", layer, way[layer, :, head], 1e-2, head=head)
        # eager attention takes its softmax in float32
        assert torch.allclose(heads.change[:, layer, head], found, rtol=1e-2, atol=1e-4)
    one = attribute_grid(
        model, CLEAN, OTHER, METRIC, "pattern", by="head_query_key", **quiet
    )
    assert torch.allclose(one.change.sum((-1, -2)), heads.change, atol=1e-9)
    with pytest.raises(ValueError, match="'resid_mid' cannot be captured"):
        attribute_grid(model, CLEAN, OTHER, METRIC, "resid_mid", **quiet)
