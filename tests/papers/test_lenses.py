"""Lenses side by side, and heads' direct shares beside patching them."""

from dataclasses import replace

import pytest
import torch
from families import tiny

from mechtut.lenses.trajectory import AffineLens, LogitLens
from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.papers.lenses import (
    LensComparison,
    attribution_and_patching,
    compare_lenses,
)
from mechtut.patching.grids import AnswerMetric
from mechtut.patching.places import Target

DRAW = torch.Generator().manual_seed(0)
IDS = torch.randint(5, 90, (3, 6), generator=DRAW)
PROMPT = torch.randint(5, 90, (4,), generator=DRAW).tolist()
LAYERS, POSITIONS = [-1, 0, 1], [2, -1]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def affine(model, generator):
    d = model.d_model
    draw = torch.randn(2, d, d, generator=generator, dtype=torch.float64) / d**0.5
    return AffineLens(
        layers=(-1, 1),
        weight=draw,
        bias=draw[:, 0],
        r2=torch.ones(2),
        n=9,
        **AffineLens.facts(model),
    )


def numbers(log_q, log_p):
    """KL, surprisal, rank and top token from log-probabilities of one position."""
    top = int(log_p.argmax())
    kl = sum(float(p.exp() * (p - q)) for p, q in zip(log_p, log_q, strict=True))
    rank = sum(bool(q > log_q[top]) for q in log_q)
    return kl, -float(log_q[top]), rank, int(log_q.argmax())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_numbers_equal_plain_passes(kind):
    model = load_model(tiny(kind).double())
    lens = affine(model, torch.Generator().manual_seed(1))
    given = {"logit": LogitLens.of(model), "prompt": Target(PROMPT, pos=1)}
    found = compare_lenses(model, IDS, given, LAYERS, POSITIONS)
    mapped = compare_lenses(model, IDS, {"affine": lens}, [-1, 1], POSITIONS)
    acts = capture(model, IDS, ["resid_pre.0", "resid_post"])
    log_p = acts.logits.log_softmax(-1)
    for text in range(3):
        for k, position in enumerate(POSITIONS):
            own = log_p[text, position]
            assert int(found.model_top[text, k]) == int(own.argmax())
            for j, layer in enumerate(LAYERS):
                site = ("resid_pre", 0) if layer == -1 else ("resid_post", layer)
                state = acts[site][text, position]
                with intervene(model, [Edit(*site, state, pos=1)]):
                    read = model.logits(PROMPT)[0, -1]
                for i, logits in enumerate((model.unembed(state), read)):
                    wanted = numbers(logits.log_softmax(-1), own)
                    seen = [x[i, j, text, k] for x in fields(found)]
                    assert [float(x) for x in seen] == pytest.approx(wanted, abs=1e-6)
                if layer != 0:
                    m = [-1, 1].index(layer)
                    carried = state @ lens.weight[m] + lens.bias[m]
                    wanted = numbers(model.unembed(carried).log_softmax(-1), own)
                    seen = [x[0, m, text, k] for x in fields(mapped)]
                    assert [float(x) for x in seen] == pytest.approx(wanted, abs=1e-6)


def fields(found):
    return found.kl, found.surprisal, found.rank, found.top


def test_the_last_layer_is_the_model():
    model = load_model(tiny("llama").double())
    found = compare_lenses(model, IDS, {"logit": LogitLens.of(model)}, [2], [0, 3])
    assert found.kl.max() < 1e-9 and found.rank.max() == 0
    assert torch.equal(found.top[0, 0], found.model_top)


def made():
    kl = torch.tensor([[[[1.0, 3.0], [5.0, 5.0]]], [[[0.0, 0.0], [1.0, 3.0]]]])
    rank = torch.tensor([[[[0, 4], [0, 0]]], [[[1, 1], [0, 1]]]])
    return LensComparison(
        names=("one", "other"),
        layers=(3,),
        kl=kl,
        surprisal=kl + 1,
        rank=rank,
        top=rank,
        model_top=torch.zeros(2, 2, dtype=torch.long),
    )


def test_intervals_are_over_texts(tmp_path):
    found = made()
    table = found.to_pandas().set_index("lens")
    # two texts of means 2 and 5: t = 12.706 with one degree of freedom
    assert table.kl["one"] == 3.5
    assert table.kl_half_width["one"] == pytest.approx(12.706 * 1.5, rel=1e-3)
    assert table.precision_at_1["one"] == 0.75 and table.surprisal["other"] == 2
    assert table.n_texts["one"] == 2 and table.n["one"] == 4
    gap = found.difference("one", "other", "kl")
    assert gap["mean"][0] == 2.5  # 2 - 0 and 5 - 2
    assert gap.half_width[0] == pytest.approx(12.706 * 0.5, rel=1e-3)
    again = LensComparison.load(found.save(tmp_path / "kept"))
    assert torch.equal(again.kl, found.kl) and again.names == found.names
    ax = found.plot("precision_at_1")
    assert ax.get_ylabel() == "precision at 1"
    assert ax.get_lines()[0].get_ydata().tolist() == [0.75]


def test_what_is_refused():
    model = load_model(tiny("llama").double())
    logit = {"logit": LogitLens.of(model)}
    with pytest.raises(IndexError, match="layer 3 does not exist"):
        compare_lenses(model, IDS, logit, [3], [0])
    with pytest.raises(IndexError, match="6"):
        compare_lenses(model, IDS, logit, [1], [6])
    with pytest.raises(ValueError, match="no layer 0"):
        lens = affine(model, torch.Generator().manual_seed(1))
        compare_lenses(model, IDS, {"affine": lens}, [0], [0])
    other = load_model(tiny("gpt2").double())
    with pytest.raises(ValueError, match="fit"):
        compare_lenses(other, IDS, logit, [0], [0])
    with pytest.raises(ValueError, match="at least"):
        compare_lenses(model, IDS, {}, [0], [0])
    with pytest.raises(ValueError, match="'third' is not among"):
        made().difference("one", "third", "kl")
    metric = AnswerMetric("log_probability", torch.tensor([7, 8, 9]))
    with pytest.raises(ValueError, match="must be 'logit_diff'"):
        attribution_and_patching(model, IDS, IDS.flip(0), metric, progress=False)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_estimate_and_measurement_equal_plain_passes(kind):
    model = load_model(tiny(kind).double())
    other = torch.randint(5, 90, (3, 6), generator=torch.Generator().manual_seed(5))
    right, wrong = torch.tensor([7, 8, 9]), torch.tensor([17, 18, 19])
    metric = AnswerMetric("logit_diff", right, wrong)
    found = attribution_and_patching(model, IDS, other, metric, progress=False)
    runs = [capture(model, x, ["z", "resid_post"]) for x in (IDS, other)]
    before, rows = metric(runs[1].logits[None, :, -1])[0], torch.arange(3)
    layer, head = 2, 1
    with intervene(
        model, [Edit("z", layer, runs[0]["z", layer][:, [-1], head], pos=-1, head=head)]
    ):
        after = metric(model.logits(other)[None, :, -1])[0]
    assert torch.allclose(found.exact[:, layer, head], after - before, atol=1e-6)
    shares = []
    for acts in runs:  # the norm's scale held: derivative of the logits along the share
        alone = torch.zeros_like(acts["z", layer][:, -1])
        alone[:, head] = acts["z", layer][:, -1, head]
        block = model.part(layer, model.family.attn_proj)
        zero = torch.zeros_like(alone).flatten(1)
        written = block(alone.flatten(1)) - block(zero)
        x = acts["resid_post", 2][:, -1]
        norm = model.hf.get_submodule(model.family.norm)
        centred = x - x.mean(-1, keepdim=True) if kind == "gpt2" else x
        scale = centred.square().mean(-1, keepdim=True).add(_eps(norm)).sqrt()
        if kind == "gpt2":
            written = written - written.mean(-1, keepdim=True)
        weight = model.hf.get_submodule(model.family.unembed).weight
        logits = (written / scale * norm.weight) @ weight.T
        shares.append(logits[rows, right] - logits[rows, wrong])
    wanted = shares[0] - shares[1]
    assert torch.allclose(found.estimate[:, layer, head], wanted, atol=1e-6)
    assert wanted.abs().max() > 1e-5
    same = replace(found, estimate=found.exact)
    assert same.means[0].equal(same.means[1]) and -1 <= found.correlation <= 1


def _eps(norm):
    return getattr(norm, "eps", None) or norm.variance_epsilon
