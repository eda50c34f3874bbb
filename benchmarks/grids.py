"""Grids of activation patching on SmolLM2, against one whole pass per cell.

    python benchmarks/grids.py [--pairs 8] [--threads 1]

The plain way writes each cell with hooks and runs the whole model, with the same matrix
products; its time is extrapolated from the cells named by --sample, drawn at random.
The bound is the share of token-layers that a cell can change, at the plain way's pace
without unembedding: no exact engine can be faster without other arithmetic.
"""

import argparse
import random
import resource

import torch
from common import measure

from mechtut.experiments.smollm2 import ioi_batch
from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.patching.grids import AnswerMetric, patch_grid
from mechtut.patching.matmul import fast_matmul

GRIDS = {
    "residual stream, by position": {"site": "resid_pre", "by": "position"},
    "MLPs, by position": {"site": "mlp_out", "by": "position"},
    "heads at the last position": {"site": "z", "by": "head", "positions": [-1]},
    "heads at all positions together": {"site": "z", "by": "head"},
    "heads at every position": {"site": "z", "by": "head_position"},
}


def share_reached(site: str, layer: int, pos: int, n_layers: int, n_pos: int) -> float:
    """The share of token-layers that a cell can change, with its own block's part."""
    blocks = n_layers - layer - (0 if site == "resid_pre" else 0.5)
    return blocks * (n_pos - pos) / (n_layers * n_pos)


def main() -> None:
    """Every grid beside its plain loop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--sample", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model("smollm2", device="cpu")
    batch, _ = ioi_batch(model, arguments.pairs, 0)
    clean, corrupted = batch["clean"], batch["corrupted"]
    metric = AnswerMetric("logit_diff", batch["right"], batch["wrong"])
    n_pos, n_layers = clean.shape[1], model.n_layers
    print(f"{len(clean)} pairs of {n_pos} tokens")

    @torch.no_grad()
    def bare():  # blocks only
        for _ in range(3):
            model.hf.model(input_ids=corrupted, use_cache=False)

    with fast_matmul(model):
        bare()
        trunk = measure(bare)[0] / 3
    for name, what in GRIDS.items():

        def engine(what=what):
            return patch_grid(model, clean, corrupted, metric, **what, progress=False)

        took, grid = measure(engine)
        cells = [tuple(i) for i in torch.ones_like(grid.mean).nonzero().tolist()]
        some = random.Random(0).sample(cells, min(arguments.sample, len(cells)))
        site, by = what["site"], what["by"]
        acts = capture(model, clean, site)

        def place(cell, by=by, what=what):
            pos = {"position": cell[-1], "head_position": cell[-1]}.get(by)
            pos = what.get("positions", pos)
            return pos, cell[1] if by.startswith("head") else None

        def plain(some=some, acts=acts, site=site, place=place):
            found = []
            for cell in some:
                pos, head = place(cell)
                state = acts[site, cell[0]]
                state = state if pos is None else state[:, torch.tensor(pos).view(-1)]
                state = state if head is None else state[:, :, head]
                edit = Edit(site, cell[0], state, pos=pos, head=head)
                with fast_matmul(model), intervene(model, [edit]):
                    found.append(metric(model.logits(corrupted)[None, :, -1])[0])
            return torch.stack(found)

        slow, found = measure(plain)
        slow *= len(cells) / len(some)
        told = torch.stack([grid.values[(slice(None), *cell)] for cell in some])
        reached = [
            share_reached(
                site,
                cell[0],
                min([*torch.tensor(place(cell)[0] or 0).view(-1) % n_pos]),
                n_layers,
                n_pos,
            )
            for cell in cells
        ]
        bound = trunk * float(sum(reached))
        print(
            f"{name}: {len(cells)} cells, {took:.1f} s, plain {slow:.0f} s"
            f" ({slow / took:.1f}x), bound {bound:.1f} s ({took / bound:.2f} of it),"
            f" apart by {(told - found).abs().max():.1g} of"
            f" {float((grid.target - grid.before).abs().mean()):.1f}",
            flush=True,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
