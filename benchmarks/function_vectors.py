"""Indirect effects of every head: the paper's loop against the streams engine, on a
seeded GPT-2-small-shaped model.

python benchmarks/function_vectors.py [--trials 25] [--naive-heads 12] [--rounds 3]
[--layers 12] [--threads 1]

Prompts of 119 to 131 tokens (125 on average), as ten word pairs make. The paper's loop
makes one full forward per trial and head plus a clean one; it is timed on one trial and
`--naive-heads` heads spread over the layers (0: all) and scaled to all heads, because
every forward costs the same. Prints CPU seconds per trial (median over rounds), their
ratio, the arithmetic that the engine cannot avoid, agreement with the loop on the timed
heads, and peak memory.
"""

import argparse
import resource
import statistics

import torch
from common import gpt2_small, measure

from mechtut.models.hooks import Edit, intervene
from mechtut.models.loading import Model
from mechtut.papers.function_vectors import indirect_effect
from mechtut.patching.matmul import fast_matmul
from mechtut.prompts.mean_activations import mean_head_activations


def random_prompts(model: Model, n: int) -> list[tuple[list[int], int]]:
    """Random token ids; the target is the model's own first choice, so that
    probabilities are not tiny.
    """
    g = torch.Generator().manual_seed(1)
    lengths = (119 + 12 * torch.arange(n) // max(1, n - 1)).tolist() if n > 1 else [125]
    all_ids = [torch.randint(0, 50257, (k,), generator=g) for k in lengths]
    return [
        (ids.tolist(), int(model.logits(ids[None])[0, -1].argmax())) for ids in all_ids
    ]


def paper_loop(
    model: Model,
    prompt: tuple[list[int], int],
    means: torch.Tensor,
    heads: list[tuple[int, int]],
) -> torch.Tensor:
    """One full forward per head, and one clean."""
    ids, target = torch.tensor([prompt[0]]), prompt[1]
    clean = model.logits(ids)[0, -1].softmax(-1)[target]
    effects = []
    for layer, head in heads:
        with intervene(
            model, [Edit("z", layer, means[layer, head], pos=-1, head=head)]
        ):
            effects.append(model.logits(ids)[0, -1].softmax(-1)[target] - clean)
    return torch.stack(effects)


def bound_gflop(model: Model, n_pos: float) -> float:
    """What one trial cannot do without: the prompt once, each head's cone, one
    unembedding per head.
    """
    d, vocab, block = model.d_model, model.embed.weight.shape[0], 12 * model.d_model**2
    above = (
        sum(model.n_layers - 1 - layer for layer in range(model.n_layers))
        * model.n_heads
    )
    own = (
        model.n_layers * model.n_heads * (8 * d * d + d * model.d_head)
    )  # the MLP of a head's own block, and its W_O
    attention = 2 * n_pos * d * (n_pos / 2 * model.n_layers + above)
    readout = (model.n_layers * model.n_heads + 1) * vocab * d
    return (
        2
        * (n_pos * model.n_layers * block + above * block + own + attention + readout)
        / 1e9
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--naive-heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = gpt2_small(
        args.layers, initializer_range=0.05
    )  # larger than usual, so that heads matter
    prompts = random_prompts(model, args.trials)
    n_pos = sum(len(ids) for ids, _ in prompts) / len(prompts)
    means = mean_head_activations(model, prompts[:5])
    every = [
        (layer, head)
        for layer in range(model.n_layers)
        for head in range(model.n_heads)
    ]
    timed = (
        every[:: max(1, len(every) // args.naive_heads)] if args.naive_heads else every
    )
    middle = prompts[len(prompts) // 2]
    start_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    naive, stock, fast = [], [], []
    for _ in range(args.rounds):
        with fast_matmul(model, False):
            seconds, effects = measure(
                lambda: indirect_effect(model, prompts, means, progress=False)
            )
        stock.append(seconds / len(prompts))
        seconds, effects = measure(
            lambda: indirect_effect(model, prompts, means, progress=False)
        )
        fast.append(seconds / len(prompts))
        seconds, slow = measure(lambda: paper_loop(model, middle, means, timed))
        naive.append(seconds / (len(timed) + 1) * (len(every) + 1))
    ours = effects[len(prompts) // 2][
        [layer for layer, _ in timed], [head for _, head in timed]
    ]
    p, s, f = (statistics.median(x) for x in (naive, stock, fast))
    flop = bound_gflop(model, n_pos)
    loop_flop = (
        (len(every) + 1)
        * 2
        * n_pos
        * (12 * model.d_model**2 * model.n_layers + 50257 * model.d_model)
        / 1e9
    )
    now_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{args.threads} thread(s), {len(prompts)} trials of {n_pos:.0f} tokens on"
        f" average, {len(every)} heads"
    )
    print(
        f"paper's loop  {p:7.2f} CPU s per trial ({len(timed)} of {len(every)} heads"
        f" timed), {loop_flop:.0f} GFLOP"
    )
    print(f"engine, stock {s:7.2f} CPU s per trial, {p / s:.0f}x")
    print(f"engine        {f:7.2f} CPU s per trial, {p / f:.0f}x")
    print(
        f"bound {flop:.1f} GFLOP per trial: {flop / f:.0f} GFLOP/s; the loop itself"
        f" runs at {loop_flop / p:.0f} GFLOP/s"
    )
    worst, largest = float((ours - slow).abs().max()), float(slow.abs().max())
    print(f"largest difference of an effect {worst:.1e} (largest effect {largest:.1e})")
    print(
        f"peak memory {now_mb:.0f} MB, of which {start_mb:.0f} MB before the first"
        " trial"
    )


if __name__ == "__main__":
    main()
