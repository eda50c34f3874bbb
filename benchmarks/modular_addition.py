"""Modular addition beside a plain implementation, and the seeds that the page shows.

    python benchmarks/modular_addition.py [--paper]
    python benchmarks/modular_addition.py --conditions FOLDER [--seeds 12]
    python benchmarks/modular_addition.py --full FOLDER

Prints the CPU seconds of a training step (the plain way runs all three positions
through autograd, with PyTorch's AdamW as it comes) and of the whole analysis of a
network (the plain way makes vectors of p² and tensors of p³, one frequency after the
other); what comes out is compared. With --conditions it trains the small recipe and
three others with some seeds each, one after the other (20 minutes), and saves them:
that is `mechtut/data/grokking/conditions`. With --full it trains the paper's network
(p = 113, an hour on one core; FOLDER/run keeps it, and is gone on with) and saves the
progress measures in half their digits: that is `mechtut/data/grokking/p113`.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from common import measure
from torch.nn import functional as F

from mechtut.grokking.fourier import (
    logit_coefficients,
    mlp_activity,
    neuron_frequencies,
)
from mechtut.grokking.measures import (
    addition_loss,
    excluded_loss,
    progress,
    restricted_loss,
    trig_fraction,
)
from mechtut.grokking.training import (
    SMALL,
    GrokkingRecipe,
    _Training,
    shipped_run,
    train_modular,
)
from mechtut.papers.modular_addition import compare_conditions, study


def whole_sequence(w, ids):
    """Activity and logits, all positions computed."""
    x = w["W_E"][:, ids].permute(1, 2, 0) + w["W_pos"]
    q, k, v = (torch.einsum("hed,npd->nphe", w[n], x) for n in ("W_Q", "W_K", "W_V"))
    scores = torch.einsum("nqhe,nphe->nhqp", q, k)
    mask = torch.tril(torch.ones(3, 3, dtype=x.dtype))
    scores = scores * mask - 1e10 * (1 - mask)
    pattern = (scores / q.shape[-1] ** 0.5).softmax(-1)
    z = torch.einsum("nhqp,nphe->nqhe", pattern, v).flatten(2)
    x = x + torch.einsum("df,nqf->nqd", w["W_O"], z)
    act = F.relu(torch.einsum("md,nqd->nqm", w["W_in"], x) + w["b_in"])
    x = x + torch.einsum("dm,nqm->nqd", w["W_out"], act) + w["b_out"]
    return act[:, -1], (x @ w["W_U"])[:, -1]


def step(recipe, n):
    """CPU seconds of a step, the median of several: ours, plain."""
    ours = _Training(recipe, torch.device("cpu"))
    weights = {
        k: v.detach().clone().requires_grad_()
        for k, v in recipe.network().named_parameters()
    }
    adam = torch.optim.AdamW(
        weights.values(), lr=recipe.lr, weight_decay=1.0, betas=(0.9, 0.98)
    )
    ids, answers = ours.batch

    def plain():
        _, logits = whole_sequence(weights, ids)
        loss = F.cross_entropy(logits.double(), answers)
        adam.zero_grad()
        loss.backward()
        adam.step()

    ours.update()
    plain()
    pairs = [(measure(ours.update)[0], measure(plain)[0]) for _ in range(n)]
    return [sorted(times)[n // 2] for times in zip(*pairs, strict=True)]


def analysis(model, train, keys):
    """Key numbers of a network, by this library."""
    acts, logits = mlp_activity(model), model.all_logits()
    every = range(1, model.p // 2 + 1)
    return {
        "fve": neuron_frequencies(acts).fve,
        "restricted": restricted_loss(logits, keys),
        "excluded": excluded_loss(logits, keys, train),
        "each": excluded_loss(logits, every, train, each=True),
        "coefficients": logit_coefficients(logits).coefficient,
        "neurons": trig_fraction(acts, keys),
        "loss": addition_loss(logits),
    }


def plain_analysis(model, train, keys):
    """The same with one vector or tensor for each wave."""
    p, ids = model.p, model.inputs()
    with torch.no_grad():
        acts, logits = whole_sequence(dict(model.named_parameters()), ids)
    logits, answers = logits[:, :-1], ids[:, :2].sum(1) % p
    a, b = ids[:, 0].double(), ids[:, 1].double()
    w = 2 * math.pi / p

    def along(x, vectors):
        return sum(torch.outer(u / u.norm(), (u / u.norm()) @ x) for u in vectors)

    def sums(k):
        return [torch.cos(k * w * (a + b)), torch.sin(k * w * (a + b))]

    def products(k):
        one = [torch.ones_like(a), torch.cos(k * w * a), torch.sin(k * w * a)]
        two = [torch.ones_like(b), torch.cos(k * w * b), torch.sin(k * w * b)]
        return [u * v for u in one for v in two][1:]

    every = range(1, p // 2 + 1)
    varies = acts - acts.mean(0)
    parts = torch.stack([along(varies, products(k)).square().sum(0) for k in every])
    kept = sum(along(logits, sums(k)) for k in keys)
    c = torch.arange(p)
    waves = [torch.cos(k * w * ((a + b)[:, None] - c)) for k in every]
    each = [logits - along(logits, sums(k)) for k in every]
    blocks = [u for k in keys for u in products(k)]
    total = along(varies, blocks).square().sum() / varies.square().sum()
    return {
        "fve": (parts / varies.square().sum(0)).max(0).values,
        "restricted": float(F.cross_entropy(kept + (logits - kept).mean(0), answers)),
        "excluded": float(F.cross_entropy((logits - kept)[train], answers[train])),
        "each": torch.stack([F.cross_entropy(x[train], answers[train]) for x in each]),
        "coefficients": torch.stack([(x * logits).sum() / x.norm() for x in waves]),
        "neurons": float(total),
        "loss": float(F.cross_entropy(logits, answers)),
    }


def conditions(seeds):
    """The recipes that the page compares, each with its seeds."""
    kinds = {
        "the recipe": (SMALL, 12),
        "equal attention": (replace(SMALL, attention=0.0), 10),
        "no weight decay": (replace(SMALL, weight_decay=0.0), 8),
        "little data": (replace(SMALL, share=0.3), 8),
    }
    return {
        name: [replace(recipe, seed=seed) for seed in range(min(n, seeds))]
        for name, (recipe, n) in kinds.items()
    }


def full(folder):
    """The paper's run, and its measures in float32, which say as much in less room."""
    run = train_modular(
        GrokkingRecipe(), steps=25_000, snapshot_every=500, folder=folder / "run"
    )
    found = progress(run)
    numbers = {k: v for k, v in vars(found).items() if isinstance(v, torch.Tensor)}
    small = {k: v.float() for k, v in numbers.items() if v.is_floating_point()}
    found = replace(found, **small)
    found.save(folder)
    print(found.to_pandas().round(3).to_string())
    for name, value in study(run).items():
        print(f"{name:14} {value:.3g}")


def main() -> None:
    """A step and an analysis, the seeds, or the paper's run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--paper", action="store_true", help="also p = 113")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--conditions", default=None)
    parser.add_argument("--full", default=None, type=Path)
    parser.add_argument("--seeds", type=int, default=12, help="at most")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.full:
        full(arguments.full)
        return
    if arguments.conditions:
        found = compare_conditions(conditions(arguments.seeds))
        found.save(arguments.conditions)
        print(found.summary().round(2).to_string())
        return
    for recipe in [SMALL, *[GrokkingRecipe()] * arguments.paper]:
        ours, plain = step(recipe, arguments.steps if recipe.p < 100 else 3)
        print(
            f"p = {recipe.p}: a step {1000 * ours:.1f} ms, plain {1000 * plain:.1f} ms"
            f" ({plain / ours:.1f}x)"
        )
    run = shipped_run()
    model, train = run.network(), run.settings().split().train
    keys = (3, 5, 11)
    ways = [lambda f=f: f(model, train, keys) for f in (analysis, plain_analysis)]
    rounds = [[measure(way) for way in ways] for _ in range(5)]
    ours, plain = (min(r[i][0] for r in rounds) for i in range(2))
    one, other = rounds[0][0][1], rounds[0][1][1]
    gap = 0.0
    for name, values in one.items():
        mine, theirs = torch.as_tensor(values), torch.as_tensor(other[name])
        gap = max(gap, float((mine - theirs).abs().max() / theirs.abs().max()))
    print(
        f"p = {model.p}: the analysis of a network {1000 * ours:.1f} ms, plain"
        f" {1000 * plain:.1f} ms ({plain / ours:.1f}x); numbers differ by {gap:.0e} of"
        " the largest"
    )


if __name__ == "__main__":
    main()
