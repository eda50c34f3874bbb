"""Path patching of all heads into the queries of two, on SmolLM2, against plain hooks.

    python benchmarks/path_patching.py [--pairs 4] [--rounds 3] [--threads 1]

The plain loop makes two whole passes for each sender (one with all other heads frozen,
which notes the queries, and one with these), with the same matrix products; it is timed
on a tenth of the heads before the receivers and scaled to all of them, because each
costs the same. `last`: the queries are replaced at the last token only. Prints CPU
seconds (medians over rounds), their ratio, and the largest difference.
"""

import argparse
import resource
import statistics

import torch
from common import measure

from mechtut.circuits.paths import path_patch_grid
from mechtut.experiments.smollm2 import ioi_batch
from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.patching.grids import AnswerMetric
from mechtut.patching.matmul import fast_matmul

LAYER, HEADS = 23, (0, 1)


def plain(model, clean, corrupted, metric, senders, where):
    """Two whole passes for each sender."""
    z, theirs, rows = capture(model, clean, "z"), capture(model, corrupted, "z"), []
    frozen = [Edit("z", i, z["z", i]) for i in range(model.n_layers)]
    for layer, head in senders:
        sent = Edit("z", layer, theirs["z", layer][:, :, head], head=head)
        q = capture(model, clean, f"q.{LAYER}", edits=[*frozen, sent])["q", LAYER]
        noted = [Edit("q", LAYER, q[:, where, h], pos=where, head=h) for h in HEADS]
        with intervene(model, noted):
            rows.append(metric(model.logits(clean)[None, :, -1])[0])
    return torch.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model("smollm2", device="cpu")
    shown, _ = ioi_batch(model, args.pairs, 0)
    clean, corrupted = shown["clean"], shown["corrupted"]
    metric = AnswerMetric("logit_diff", shown["right"], shown["wrong"])
    receivers = [f"a{LAYER}.{h}.q_in" for h in HEADS]
    before = [(i, h) for i in range(LAYER) for h in range(model.n_heads)]
    some = before[:: len(before) // 20]
    n_pos = clean.shape[1]
    with fast_matmul(model):  # the plain way gets the fast products as well
        for name, where in (("all", list(range(n_pos))), ("last", [n_pos - 1])):
            ours, theirs, worst = [], [], 0.0
            how = {"receiver_positions": where, "progress": False}
            for _ in range(args.rounds):
                took, grid = measure(
                    lambda how=how: path_patch_grid(
                        model, clean, corrupted, metric, receivers, **how
                    )
                )
                ours.append(took)
                took, values = measure(
                    lambda where=where: plain(
                        model, clean, corrupted, metric, some, where
                    )
                )
                theirs.append(took * len(before) / len(some))
                mine = torch.stack([grid.values[:, i, h] for i, h in some])
                worst = max(worst, float((mine - values).abs().max()))
            fast, slow = statistics.median(ours), statistics.median(theirs)
            largest = float(grid.change.abs().max())
            print(
                f"{name}: {fast:.1f} CPU s, plain {slow:.0f} s ({slow / fast:.1f}x) for"
                f" {len(before)} senders, {args.pairs} pairs of {n_pos} tokens;"
                f" apart by {worst:.1g} (largest effect {largest:.2f})",
                flush=True,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
