"""A sweep over layers, coefficients and prompts on SmolLM2, against whole passes.

    python benchmarks/steering.py [--prompts 16] [--sample 40] [--where last all]

The plain way adds the vector with a hook and runs the whole model once for each layer,
coefficient and prompt; its time is extrapolated from cells drawn at random (--sample).
A second plain way runs all prompts of one length in one batch. The bound is what has to
be computed in any case: for each cell the blocks above the steered layer for the
steered tokens, and one unembedding, at the pace of large batches. Agreement is measured
in nats of the log-probability of the next token, on the same cells.
"""

import argparse
import random
import resource

import torch
from common import measure

from mechtut.models.loading import load_model
from mechtut.patching.matmul import fast_matmul
from mechtut.prompts.everyday import sentence_pairs
from mechtut.steering.sweeps import TokenOdds, sweep
from mechtut.steering.vectors import mean_difference

PROMPTS = [
    f"{what} was"
    for what in (
        "The food at the new place",
        "The hotel by the station",
        "Our trip to the coast",
        "The talk this morning",
        "The soup that they served",
        "My first day at work",
        "The museum in the old town",
        "The train journey",
        "The play last night",
        "The garden behind the house",
        "The concert in the park",
        "The coffee at the corner",
        "Her answer to the question",
        "The room on the first floor",
        "The walk along the river",
        "The end of the story",
    )
]
COEFFICIENTS = (-4.0, -2.0, -1.0, -0.5, 1.0, 2.0, 4.0)


def plain_cell(model, vector, layer, coefficient, ids, where):
    """Last logits with the vector added by a hook, one whole pass."""

    def push(_block, _args, out):
        x = (out[0] if isinstance(out, tuple) else out).clone()
        columns = slice(-1, None) if where == "last" else slice(None)
        x[:, columns] += coefficient * vector.at(layer)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = model.blocks[layer].register_forward_hook(push)
    try:
        return model.logits(ids)[:, -1]
    finally:
        handle.remove()


def bound(model, cells, lengths, where):
    """Seconds for the blocks above each cell's layer and its unembedding."""
    rows = {n: torch.randn(512 // n, n, model.d_model) for n in set(lengths)}
    pace, total = {}, 0.0
    with fast_matmul(model), torch.no_grad():
        for n in set(lengths) if where == "all" else {1}:
            x = rows.get(n, torch.randn(512, 1, model.d_model))
            where_at = torch.arange(n)[None]
            rotary = model.hf.model.rotary_emb(x, where_at)
            block, given = model.blocks[3], {"position_embeddings": rotary}
            block(x, **given)
            seconds, _ = measure(lambda b=block, x=x, g=given: b(x, **g))
            pace[n] = seconds / len(x)
        states = torch.randn(512, model.d_model)
        model.unembed(states)
        head, _ = measure(lambda: model.unembed(states))
    for layer, length in cells:
        n = length if where == "all" else 1
        total += (model.n_layers - 1 - layer) * pace[n] + head / 512
    return total


def main() -> None:
    """The sweep beside its plain loop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--where", nargs="*", default=["last", "all"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model("smollm2", device="cpu")
    vector = mean_difference(model, sentence_pairs("sentiment")[:30])
    odds = TokenOdds.of(model, [" wonderful", " great"], [" terrible", " awful"])
    prompts = PROMPTS[: args.prompts]
    ids = [model.to_batch(prompt) for prompt in prompts]
    layers, n = range(model.n_layers), len(prompts)
    cells = [(la, c, i) for la in layers for c in COEFFICIENTS for i in range(n)]
    print(
        f"{len(cells)} cells: {len(layers)} layers, {len(COEFFICIENTS)} coefficients,"
    )
    print(f"{n} prompts of {min(x.shape[1] for x in ids)} to", end=" ")
    print(f"{max(x.shape[1] for x in ids)} tokens, one thread")
    drawn = random.Random(0).sample(cells, args.sample)
    for where in args.where:
        plain_cell(model, vector, 0, 1.0, ids[0], where)  # warm
        loop, logits = measure(
            lambda w=where: [
                plain_cell(model, vector, la, c, ids[i], w) for la, c, i in drawn
            ]
        )
        given = (model, vector, prompts, odds, None, COEFFICIENTS, 0)
        engine, swept = measure(
            lambda w=where, g=given: sweep(*g, where=w, progress=False)
        )
        same = [j for j in range(n) if ids[j].shape == ids[0].shape]
        batch = torch.cat([ids[j] for j in same])
        few = drawn[:8]
        batched, _ = measure(
            lambda w=where, b=batch, f=few: [
                plain_cell(model, vector, la, c, b, w) for la, c, _ in f
            ]
        )
        apart = max(
            abs(
                float(odds(x[0]))
                - float(
                    swept.effects[0, la, COEFFICIENTS.index(c), i] + swept.baseline[i]
                )
            )
            for (la, c, i), x in zip(drawn, logits, strict=True)
        )
        plain = loop / len(drawn) * len(cells)
        rows = batched / (8 * len(same)) * len(cells)
        least = bound(
            model,
            [(la, ids[i].shape[1]) for la, _, i in cells],
            [x.shape[1] for x in ids],
            where,
        )
        print(
            f"{where}: engine {engine:.0f} s, plain {plain:.0f} s"
            f" ({plain / engine:.1f}x), in batches of {len(same)} {rows:.0f} s"
            f" ({rows / engine:.1f}x), bound {least:.0f} s"
            f" ({engine / least:.1f}x of it); log-odds apart by {apart:.1e}"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
