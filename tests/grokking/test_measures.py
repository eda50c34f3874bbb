"""Progress measures: the authors' numbers in float64, and plain tensors."""

import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from families import gap
from grokking_golden import network, numbers, split
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtut.grokking.fourier import component_norms, mlp_activity, neuron_frequencies
from mechtut.grokking.measures import (
    ablations,
    addition_loss,
    distance_irrelevance,
    excluded_loss,
    gini,
    gradient_symmetricity,
    key_waves,
    logit_trig_fraction,
    progress,
    restricted_loss,
    shipped_progress,
    trig_fraction,
)
from mechtut.grokking.network import ModularAddition
from mechtut.grokking.training import GrokkingRecipe, shipped_run, train_modular

ODD = st.sampled_from([7, 9, 11, 13])


def like(value):
    """The tolerance of the golden files."""
    return pytest.approx(value, rel=1e-6, abs=1e-9 if value < 1e-6 else 0.0)


def test_numbers_of_the_authors():
    model, known, (train, test) = network(), numbers()["final"], split()
    logits, keys = model.all_logits(), numbers()["key_freqs"]
    for name, where in (("train", train), ("test", test), ("all", None)):
        assert addition_loss(logits, where) == like(known[f"{name}_loss"])
        assert restricted_loss(logits, keys, where) == like(known[f"restricted_{name}"])
    assert excluded_loss(logits, keys, train) == like(known["excluded_train_all_keys"])
    found = excluded_loss(logits, keys, train, only_cosine=True)
    assert found == like(known["excluded3d_train_all_keys"])
    each = excluded_loss(logits, range(1, 16), train, each=True)
    for k, value in known["excluded_train_each"].items():
        assert float(each[int(k) - 1]) == like(value)
    for table, name in ((model.W_E, "gini_embed"), (model.W_U, "gini_unembed")):
        assert gini(component_norms(table.T[:-1])) == like(known[name])


def plain_waves(logits, keys):
    """u uᵀ logits for the vectors cos k(a + b), sin k(a + b) of length p²."""
    p = logits.shape[1]
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    kept = torch.zeros_like(logits)
    for k in keys:
        angle = 2 * math.pi * k * (a + b).double() / p
        for u in (angle.cos(), angle.sin()):
            u = u / u.norm()
            kept += torch.outer(u, u @ logits)
    return kept


@given(ODD, st.integers(0, 2**31), st.data())
@settings(max_examples=25, deadline=None)
def test_waves_and_losses_by_plain_tensors(p, seed, data):
    keys = sorted(data.draw(st.sets(st.integers(1, p // 2), min_size=1)))
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(p * p, p, generator=draw).double() * 3
    where = torch.randperm(p * p, generator=draw)[: p + 2]
    kept = plain_waves(logits, keys)
    assert gap(key_waves(logits, keys), kept) < 1e-10
    right = [(i // p + i % p) % p for i in where.tolist()]

    def loss(x):
        x = x[where]
        return float(-x.log_softmax(1)[range(len(right)), right].mean())

    back = (logits - kept).mean(0)
    assert restricted_loss(logits, keys, where) == pytest.approx(loss(kept + back))
    assert excluded_loss(logits, keys, where) == pytest.approx(loss(logits - kept))
    each = excluded_loss(logits, keys, where, each=True)
    wanted = [loss(logits - plain_waves(logits, [k])) for k in keys]
    assert each.tolist() == pytest.approx(wanted)
    a, b, c = torch.cartesian_prod(*[torch.arange(p)] * 3).T
    flat = logits.flatten().clone()
    for k in keys:
        wave = torch.cos(2 * math.pi * k * (a + b - c).double() / p)
        flat -= wave * (wave @ logits.flatten()) / (wave @ wave)
    found = excluded_loss(logits, keys, where, only_cosine=True)
    assert found == pytest.approx(loss(flat.reshape(p * p, p)))
    share = kept.square().sum() / (logits - logits.mean(0)).square().sum()
    assert logit_trig_fraction(logits, keys) == pytest.approx(float(share))


def test_variance_of_neurons_by_least_squares():
    """The nine products of a frequency as columns of a regression."""
    p, keys = 9, [1, 4]
    acts = torch.randn(p * p, 3, generator=torch.Generator().manual_seed(0)).double()
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    columns = []
    for k in keys:
        waves = [
            [
                torch.ones(p * p),
                *((2 * math.pi * k * x / p).cos(), (2 * math.pi * k * x / p).sin()),
            ]
            for x in (a.double(), b.double())
        ]
        columns += [u * v for u in waves[0] for v in waves[1]]
    known = torch.stack(columns, 1).double()
    fitted = known @ torch.linalg.pinv(known) @ acts
    varies = acts - acts.mean(0)
    wanted = (fitted - acts.mean(0)).square().sum() / varies.square().sum()
    assert trig_fraction(acts, keys) == pytest.approx(float(wanted))


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=9).filter(lambda x: max(x) > 1e-3)
)
@settings(max_examples=30, deadline=None)
def test_gini_is_the_mean_difference_of_pairs(values):
    pairs = [abs(x - y) for x in values for y in values]
    wanted = sum(pairs) / (2 * len(values) * sum(values))
    assert gini(torch.tensor(values, dtype=torch.float64)) == pytest.approx(
        wanted, abs=1e-12
    )


def test_ablations_by_hand():
    """On the golden network, with changed activities put through the weights here."""
    model, parts = network(), split()
    table = ablations(model, parts).to_pandas().set_index("removed")
    acts, logits = mlp_activity(model), model.all_logits()
    found = neuron_frequencies(acts)
    w_l = (model.W_U.T @ model.W_out).detach()[:-1]

    def test_loss(changed):
        return addition_loss(logits + (changed - acts) @ w_l.T, parts.test)

    loose = found.fve < 0.85
    changed = torch.where(loose, acts.mean(0), acts)
    assert table.test_loss["neurons: those of no cluster"] == like(test_loss(changed))
    one = (found.fve >= 0.85) & (found.frequency == 12)
    changed = torch.where(one, acts.mean(0), acts)
    assert table.test_loss["neurons: cluster of frequency 12"] == like(
        test_loss(changed)
    )
    angles = 2 * math.pi * torch.arange(31).double() / 31
    a, b = torch.cartesian_prod(torch.arange(31), torch.arange(31)).T
    own = []
    for n, k in enumerate(found.frequency.tolist()):
        waves = torch.stack([torch.ones(31), (k * angles).cos(), (k * angles).sin()], 1)
        known = torch.einsum("ni,nj->nij", waves[a], waves[b]).flatten(1)
        own.append(known @ torch.linalg.lstsq(known, acts[:, n : n + 1]).solution)
    wanted = test_loss(torch.cat(own, 1))
    assert table.test_loss["neurons: waves of other frequencies"] == like(wanted)
    assert table.test_loss["logits: all that is no key wave"] == like(
        restricted_loss(logits, [5, 12, 15], parts.test)
    )
    waves = torch.stack(
        [
            torch.ones(31),
            *(f(k * angles) for k in (5, 12, 15) for f in (torch.cos, torch.sin)),
        ],
        1,
    ).double()
    kept = waves @ torch.linalg.pinv(waves) @ w_l
    wanted = addition_loss(logits + acts @ (kept - w_l).T, parts.test)
    assert table.test_loss["map to logits: waves of other frequencies"] == like(wanted)
    assert table.accuracy["nothing"] == 1 and table.accuracy["logits: key waves"] < 0.1


def test_equal_weights_make_gradients_equal():
    """With attention rate 0 and one position vector, only the sum of the embeddings is
    seen; the same weights with a softmax do not have that.
    """
    model = ModularAddition(7, d_model=8, d_mlp=12, attention=0.0).double()
    assert gradient_symmetricity(model) == pytest.approx(1)
    other = ModularAddition.from_weights(model.state_dict())
    assert gradient_symmetricity(other) < 0.999


def test_gradients_by_plain_autograd():
    model = ModularAddition(7, d_model=8, d_mlp=12).double()
    found = []
    for a in range(7):
        for b in range(7):
            x = model.W_E.detach().T[[a, b, 7]][None].requires_grad_()
            hook = model.embed.register_forward_hook(
                lambda module, args, out, x=x: x + model.W_pos
            )
            out = model(torch.tensor([[a, b, 7]]))
            hook.remove()
            for c in range(7):
                (g,) = torch.autograd.grad(out[0, c], x, retain_graph=True)
                found.append(float(torch.cosine_similarity(g[0, 0], g[0, 1], dim=0)))
    assert gradient_symmetricity(model) == pytest.approx(sum(found) / len(found))
    some = [gradient_symmetricity(model, n_inputs=9, seed=s) for s in (0, 0, 1)]
    assert some[0] == some[1] != some[2]


@pytest.mark.parametrize("p", [7, 9])
def test_distances_by_a_plain_loop(p):
    logits = torch.randn(p * p, p, generator=torch.Generator().manual_seed(0)).double()
    right = {
        (a, b): float(logits[a * p + b, (a + b) % p])
        for a in range(p)
        for b in range(p)
    }
    spread = lambda x: float(torch.tensor(x).double().std(correction=0))  # noqa: E731
    by_distance = [spread([right[i, (i + d) % p] for i in range(p)]) for d in range(p)]
    wanted = sum(by_distance) / p / spread(list(right.values()))
    assert distance_irrelevance(logits) == pytest.approx(wanted)


def test_the_shipped_measures_of_the_papers_size():
    """They begin where the recipe begins, and end with the paper's frequencies."""
    found, recipe = shipped_progress(), GrokkingRecipe()
    assert found.keys == (14, 35, 41, 42, 52) and recipe.p == 113
    assert found.steps.tolist() == list(range(0, 25_001, 500))
    logits, parts = recipe.network().all_logits(), recipe.split()
    for name in ("train", "test"):
        first = addition_loss(logits, getattr(parts, name))
        assert float(getattr(found, name)[0]) == pytest.approx(first, rel=1e-5)
    waves = component_norms(recipe.network().W_E.detach().T[:-1])
    assert torch.allclose(found.embedding[0], waves.float(), rtol=1e-4)
    ends = list(found.phases().values())
    assert ends == sorted(ends) and float(found.test[-1]) < 1e-6
    folder = files("mechtut") / "data/grokking"
    sizes = [f.stat().st_size for f in Path(str(folder)).rglob("*") if f.is_file()]
    assert sum(sizes) < 700_000


def test_progress_of_the_shipped_run():
    run = shipped_run()
    found = progress(run)
    table = found.to_pandas().set_index("step")
    parts, last = run.settings().split(), run.network()
    wanted = addition_loss(last.all_logits(), parts.test)
    assert table.test[table.index[-1]] == pytest.approx(wanted)
    ends = found.phases()
    assert ends["memorisation"] < ends["circuit formation"] < ends["clean-up"]
    # the keys are those of the last snapshot, at all steps
    middle = int(run.at[len(run.at) // 2])
    logits = run.network(middle).all_logits()
    wanted = restricted_loss(logits, found.keys)
    assert table.restricted[middle] == pytest.approx(wanted)
    assert len(found.plot()) == 3


@pytest.mark.parametrize("p", [29, 37])
def test_a_split_of_another_modulus(p):
    model = ModularAddition(31, d_model=8, d_mlp=16)
    other = GrokkingRecipe(p=p).split()
    with pytest.raises(ValueError, match=f"{p * p} places, and they are not the 961"):
        ablations(model, other, keys=[1])
    own = GrokkingRecipe(p=31).split()
    with pytest.raises(ValueError, match="each once"):  # as many, one pair twice
        ablations(model, own._replace(test=own.test.clamp(min=1)), keys=[1])


def test_every_label_says_what_is_gone():
    """By what the losses say: without `nothing` all is right, and so on."""
    model, parts = network(), split()
    logits = model.all_logits()
    table = ablations(model, parts).to_pandas().set_index("removed")
    assert table.test_loss["nothing"] == like(addition_loss(logits, parts.test))
    rest = [k for k in range(1, 16) if k not in (5, 12, 15)]
    for name, keys in (
        ("logits: key waves", [5, 12, 15]),
        ("logits: waves of a + b of other frequencies", rest),
    ):
        gone = logits - plain_waves(logits, keys)
        assert table.test_loss[name] == like(addition_loss(gone, parts.test))


def test_phases_are_looked_up_at_snapshots():
    run = shipped_run()
    ends, at = progress(run).phases(), run.at.tolist()
    for phase, first in (
        ("memorisation", run.first(of="train_loss")),
        ("clean-up", run.first()),
    ):
        assert ends[phase] == min(step for step in at if step >= first)
    assert ends["clean-up"] > run.first()


def test_wrong_input():
    logits = torch.randn(49, 7)
    for call in (key_waves, restricted_loss, excluded_loss, logit_trig_fraction):
        for k in (0, 4):  # 12 of another network
            with pytest.raises(ValueError, match=f"frequency {k} does not exist"):
                call(logits, [k])
    with pytest.raises(ValueError, match="without the logit of '='"):
        restricted_loss(torch.randn(49, 8), [1])
    for call in (key_waves, restricted_loss, excluded_loss, logit_trig_fraction):
        with pytest.raises(ValueError, match="frequency 2 is given more than once"):
            call(logits, [1, 2, 2])
    with pytest.raises(ValueError, match="frequency 1 is given more than once"):
        excluded_loss(logits, [1, 1], each=True)
    with pytest.raises(ValueError, match="frequency 3 is given more than once"):
        trig_fraction(logits, (3, 3, 1))
    with pytest.raises(ValueError, match="where is empty"):
        addition_loss(logits, torch.tensor([], dtype=torch.long))
    for places, told in (([0, 49], "0 to 49"), ([-1, 3], "-1 to 3")):
        with pytest.raises(ValueError, match=f"{told}, but the inputs of p = 7 are"):
            addition_loss(logits, torch.tensor(places))
    with pytest.raises(ValueError, match="amounts: none may be negative"):
        gini(torch.tensor([-1.0, 2.0]))
    for nothing in (0, 3):
        with pytest.raises(ValueError, match="not all zero"):
            gini(torch.zeros(nothing))
    with pytest.raises(ValueError, match="nothing to explain"):
        trig_fraction(torch.zeros(49, 2), [1])
    with pytest.raises(ValueError, match="there is no spread"):
        distance_irrelevance(torch.zeros(49, 7))
    recipe = GrokkingRecipe(p=31, d_model=8, d_mlp=16)
    run = train_modular(recipe, steps=1, progress=False)
    with pytest.raises(ValueError, match="no key frequency"):
        progress(run)
